"""What a conversion measured, as the one JSON that tables, plots and the model card are made from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..artifact import VERSION, InputError, read_json, write_json

RESULTS = "report/report.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Machine(_Strict):
    """Where it was measured; `cores` are the logical ones that the process may use."""

    cpu: str
    cores: int
    os: str
    memory_bytes: int | None = None
    gpu: str | None = None


class Text(_Strict):
    """Tokens that were read: how many, sha256 of the token batches, a name for people, and the Hub dataset when it is one."""

    tokens: int
    hash: str | None = None
    name: str | None = None
    dataset: str | None = None


class Speed(_Strict):
    """How the speeds were taken: one sequence, dense and sparse in turns.

    `precision` of the weights of both, `threads` None for the runtime's own choice; `disturbed` when other load made every pair of runs wait.
    """

    runtime: str
    precision: str
    provider: str
    threads: int | None
    prompt_tokens: int
    new_tokens: int
    executor: str | None = None
    command: str | None = None
    commit: str | None = None
    disturbed: bool = False


class Row(_Strict):
    """One model's quality and speed on the held-out text.

    `nll` and `kl` (dense to this one) in nats per token, `agreement` the share of equal argmax tokens, `density` the mean realised share of kept units, `cost`
    the bytes touched per token relative to the dense MLP, predictors included. `decode_ratio` is the median, over back-to-back pairs, of decoding speed
    relative to dense; `bench` the samples behind it.
    """

    method: str
    nll: float
    perplexity: float
    kl: float
    agreement: float = Field(ge=0, le=1)
    density: float = Field(ge=0, le=1)
    cost: float = Field(ge=0)
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    decode_ratio: float | None = Field(default=None, gt=0)
    selected: bool = False
    bench: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> Row:
        if not math.isclose(math.exp(self.nll), self.perplexity, rel_tol=1e-3):
            raise ValueError(f"perplexity must be exp(nll), got {self.perplexity} for {self.nll}")
        if self.method.startswith("oracle"):
            raise ValueError("an oracle must not stand among the methods")
        return self


class Layer(_Strict):
    """One site. Densities: `density_target` asked for, `density_calibrated` on held-out calibration tokens, `density_realised` on the evaluation text."""

    site: str
    density_target: float | None = None
    density_calibrated: float
    density_realised: float
    recall: float | None = None
    rank: int | None = None
    cost: float | None = None


class Check(_Strict):
    """A measured value, its bound, whether it holds, and a note on what was compared."""

    name: str
    value: float
    bound: float
    passed: bool
    note: str = ""


class Report(_Strict):
    """All measurements of one conversion. `model` is the Hub id (then `revision` is its commit) or the name of the source folder."""

    version: Literal[1] = 1
    model: str
    revision: str | None = None
    tool: str = VERSION
    date: str
    command: str
    machine: Machine
    versions: dict[str, str]
    recipe: dict[str, Any]
    calibration: Text
    evaluation: Text | None = None
    speed: Speed | None = None
    rows: list[Row]
    layers: list[Layer] = []
    checks: list[Check] = []

    @model_validator(mode="after")
    def _check(self) -> Report:
        if sum(row.method == "dense" for row in self.rows) != 1:
            raise ValueError("rows must hold exactly one of the method dense")
        if sum(row.selected for row in self.rows) > 1:
            raise ValueError("at most one row may be selected")
        if any(row.decode_ratio is not None for row in self.rows) and (self.speed is None or self.dense.decode_tokens_per_second is None):
            raise ValueError("a speed ratio needs the dense model's speed and the conditions in `speed`")
        return self

    @property
    def dense(self) -> Row:
        """The baseline's row."""
        return next(row for row in self.rows if row.method == "dense")

    @property
    def chosen(self) -> Row:
        """The checkpoint's own row: the selected one, else the only sparse one, else the baseline."""
        sparse = [row for row in self.rows if row.method != "dense"]
        return next((row for row in self.rows if row.selected), sparse[0] if len(sparse) == 1 else self.dense)


def write(folder: Path, report: Report) -> Path:
    """Store the report in a checkpoint folder and return the file."""
    path = folder / RESULTS
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report.model_dump(mode="json"))
    return path


def read(folder: Path) -> Report:
    """The report of a checkpoint folder. Raises InputError when it is missing or has another form."""
    path = folder / RESULTS
    value = read_json(path, "The report")
    try:
        return Report.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(f"The report must have the form of version 1, got {path} ({place}: {first['msg']}). Convert again.") from None

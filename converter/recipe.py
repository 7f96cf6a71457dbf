"""The recipe: what flags compile to, hashed and stored with every checkpoint, and readable from a YAML file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..runtime_onnx.untrusted import check_letters, read_bytes
from .artifact import InputError

LARGEST, MOST, DEEPEST = 1 << 20, 10_000, 40
"""Of a recipe: bytes, values and levels of values inside values."""
MOST_WINDOWS, LONGEST = 1 << 28, 1 << 20
"""Windows of a text, and tokens of a window."""
MOST_SEED = (1 << 32) - 1
"""What seeds are made of it, of texts, windows and predictors, stays within 64 bits."""
_Part = TypeVar("_Part", bound=BaseModel)
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def parse_duration(text: str) -> float:
    """Seconds of a time such as 90s, 20m or 1h30m. Raises ValueError for anything else, a number without a unit too."""
    found = _DURATION.fullmatch(text)
    seconds = 0.0 if found is None else sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True))
    if seconds <= 0:
        hint = f"Write {text}m for minutes" if re.fullmatch(r"\d+(\.\d+)?", text) else "Write hours, minutes and seconds in this order"
        raise ValueError(f"must be a time such as 90s, 20m or 1h30m, got {text!r}. {hint}.")
    return seconds


LARGEST_LOSS = 100.0
"""Most that a budget may allow: a hundredfold rise in perplexity, or nats per token. More bounds nothing."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Calibration(_Strict):
    """Where the tokens come from: a text file (None: the bundled one), or, when `generated`, text that the dense model writes itself; `windows` of `length`
    tokens.
    """

    file: str | None = None
    generated: bool = False
    windows: int = Field(default=128, ge=2, le=MOST_WINDOWS)
    length: int = Field(default=256, ge=16, le=LONGEST)


class Tune(_Strict):
    """Training end to end of what a method selects by: `steps` per density of `windows` windows, at peak `rate`; `local` weighs the lost energy of each
    layer's output against the divergence from the dense model; `precision` is that of the passes through the model (auto: bf16 where the machine multiplies it
    natively); `data` windows are trained on at most.
    """

    steps: int = Field(default=300, ge=1)
    windows: int = Field(default=2, ge=1)
    rate: float = Field(default=4e-3, gt=0)
    local: float = Field(default=0.2, ge=0)
    data: int = Field(default=1024, ge=4)
    precision: Literal["auto", "fp32", "bf16"] = "auto"


class Mix(_Strict):
    """A part of a mixture: UTF-8 text `files`, or a Hub `dataset` (with its `subset`, `split` and text `field`) that is streamed; `share` of the tokens, in any
    unit that all parts share.
    """

    name: str
    share: float = Field(gt=0)
    files: tuple[str, ...] = ()
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    field: str = "text"

    @model_validator(mode="after")
    def _check(self) -> Mix:
        if bool(self.files) == (self.dataset is not None):
            raise ValueError("a part must have either files or a dataset")
        return self


class Data(_Strict):
    """What weights are trained on: `windows` of `length` tokens, of a mixture, or, without one, sampled from the dense source itself at `temperature`."""

    windows: int = Field(default=4096, ge=2, le=MOST_WINDOWS)
    length: int = Field(default=256, ge=16, le=LONGEST)
    temperature: float = Field(default=1.0, gt=0)
    mixture: tuple[Mix, ...] = ()


class Losses(_Strict):
    """Weights of what is minimised, nats per token: `distill` KL(dense || student), `lm` the next token's cross-entropy; `hidden` a mean over blocks of the
    squared difference of their outputs from the dense source's, relative to its energy.
    """

    distill: float = Field(default=1.0, ge=0)
    lm: float = Field(default=0.0, ge=0)
    hidden: float = Field(default=0.0, ge=0)


class Penalty(_Strict):
    """What makes activations sparse, by its `kind`, per site and then the mean over sites.

    `count` is a smooth count of the open units, sigmoid(margin / softness) where the margin is the smaller of a unit's factors that must be positive, relative
    to the rms of each; `l1` is mean|z| / rms z. Its `weight` grows over the first `ramp` of the run along a straight line or, in `periods` steps, along sine
    curves (ProSparse, arXiv 2402.13516). With a `density` the weight is a controller's instead, which leads the share of non-zeros there along the same
    curve and holds it.
    """

    kind: Literal["count", "l1"] = "count"
    weight: float = Field(default=0.5, ge=0)
    ramp: float = Field(default=0.5, gt=0, le=1)
    shape: Literal["linear", "sine"] = "linear"
    periods: int = Field(default=1, ge=1)
    softness: float = Field(default=0.25, gt=0)
    density: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Penalty:
        if self.density is not None and self.weight == 0:
            raise ValueError("weight must be above 0 where a density is wished: it is what leads there")
        return self


class Lora(_Strict):
    """Low-rank updates W + alpha / rank B A of every linear map of the blocks in place of whole weights (LoRA, arXiv 2106.09685)."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)


class Joint(_Strict):
    """Predictors trained together with the weights: their cost (of the network's weights), the density that they predict after the first `ramp` of the run, to
    which they are led from 1 along `path`, and their peak rate; the mask is hard and its gradient the sigmoid's (Turbo Sparse, arXiv 2406.05955).
    """

    cost: float = Field(default=0.1, gt=0, lt=1)
    density: float = Field(default=0.14, gt=0, lt=1)
    rate: float = Field(default=4e-3, gt=0)
    ramp: float = Field(default=0.5, gt=0, le=1)
    path: Literal["linear", "geometric"] = "linear"


class ByBlock(_Strict):
    """Recovery block by block: every network is fitted to the dense block's output, in order, on the inputs that the blocks before really give; `steps` of
    `tokens` tokens a block at peak `rate`, between two closed-form solutions of the down projection; `l1` weighs mean|z| / rms z.
    """

    steps: int = Field(default=100, ge=1)
    tokens: int = Field(default=2048, ge=1)
    rate: float = Field(default=5e-3, gt=0)
    l1: float = Field(default=0.0, ge=0)


class Recovery(_Strict):
    """Training of weights after an activation was swapped or units were gated: `steps` of `accumulate` times `windows` windows each, over all processes.

    The rate rises over `warm_up` steps to `rate` and falls along `schedule` to `floor` of it. `optimizer` muon takes matrices by Muon and the rest by AdamW.
    `end_to_end` False leaves it at `by_block`. `parallel` says what several processes under torchrun share: nothing but gradients (data), or weights and
    optimizer too (fsdp). On a CPU, `processes` of this machine sample and train, sharing nothing but gradients (auto: as many as cores and
    windows allow, where a model is small); the result is the same up to rounding.
    """

    steps: int = Field(default=2000, ge=1)
    windows: int = Field(default=8, ge=1)
    accumulate: int = Field(default=1, ge=1)
    rate: float = Field(default=2e-3, gt=0)
    floor: float = Field(default=0.1, ge=0, le=1)
    warm_up: int = Field(default=50, ge=0)
    schedule: Literal["linear", "cosine"] = "cosine"
    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpointing: bool = False
    data: Data = Data()
    losses: Losses = Losses()
    penalty: Penalty = Penalty()
    lora: Lora | None = None
    predictors: Joint | None = None
    by_block: ByBlock | None = None
    end_to_end: bool = True
    parallel: Literal["data", "fsdp"] = "data"
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"


class Stage(_Strict):
    """One method, two joined by `+` (a neuron method and a channel method), `imported`, or `auto`, which tries every method; and the configuration, of which a
    method takes the fields that it knows. `steps` are those of methods that are trained end to end, by name, in place of the configuration's; 0 leaves a
    method out. `tune` trains the weights under the stage's plan.
    """

    method: str = "auto"
    config: dict[str, Any] = {}
    steps: dict[str, Annotated[int, Field(ge=0)]] = {}
    tune: Recovery | None = None


class Budget(_Strict):
    """What the result may lose on held-out text: a relative rise in perplexity (0.01 is 1 %) and a KL divergence to the dense model in nats per token."""

    max_ppl_increase: float | None = Field(default=None, ge=0, le=LARGEST_LOSS)
    max_kl: float | None = Field(default=None, ge=0, le=LARGEST_LOSS)

    @property
    def bounded(self) -> bool:
        """Whether anything is bounded."""
        return self.max_ppl_increase is not None or self.max_kl is not None


class Export(_Strict):
    """How the gated weights are stored in ONNX (`onnx_export.precision` has the table), and which execution provider the graph is for."""

    precision: Literal["fp32", "fp16", "bf16", "int8", "int4"] = "fp32"
    target: Literal["cpu", "cuda"] = "cpu"

    @model_validator(mode="after")
    def _check(self) -> Export:
        if self.target == "cuda" and self.precision == "fp32":
            raise ValueError("precision must be fp16, bf16, int8 or int4 for the target cuda")
        return self


class Recipe(_Strict):
    """Everything that decides the result, apart from the model's own bytes; of a recipe with a `time_budget` (as in 20m), or of one that says neither it nor
    steps, also how fast the machine is: what is decided by that is stored as steps.
    """

    version: Literal[1] = 1
    model: str
    calibration: Calibration = Calibration()
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    stages: tuple[Stage, ...] = Field(default=(Stage(),), min_length=1, max_length=3)
    budget: Budget = Budget()
    time_budget: str | None = None
    export: Export = Export()

    @field_validator("time_budget")
    @classmethod
    def _check_time(cls, value: str | None) -> str | None:
        if value is not None:
            parse_duration(value)
        return value

    @property
    def searches(self) -> bool:
        """Whether the budget decides the sparsity: it does when the stage sets none; else it is a check on the result."""
        return self.budget.bounded and "sparsity" not in self.stages[-1].config

    def yaml(self) -> str:
        """The recipe as a YAML document that `--recipe` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def make_recipe(values: dict[str, Any], where: str = "The recipe") -> Recipe:
    """A recipe from plain values. Raises InputError naming the first field that is wrong."""
    return make_part(Recipe, values, where)


def make_part(kind: type[_Part], values: dict[str, Any], where: str) -> _Part:
    """A recipe, or a part of one, from plain values. Raises InputError naming the first field that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "content"
        raise InputError(f"{where}'s {field:.200} must be valid, got {ascii(first.get('input')):.200} ({first['msg']}). Mend it.") from None


def _parse_yaml(text: bytes) -> Any:
    """The value of a YAML text, plain and finite. Raises ValueError with the reason alone."""
    try:
        values = yaml.safe_load(text.decode("utf-8"))
    except RecursionError:
        raise ValueError("values inside values too deep to read") from None
    except Exception as error:  # besides YAMLError whatever a tag's constructor raises: !!int x, !!timestamp x
        raise ValueError(next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)) from None
    _check_plain(values)
    return values


def _check_plain(values: Any) -> None:
    """Raise ValueError for values too deep, too many (aliases of aliases count each time) or too large, which an error could not even quote."""
    level, count = [values], 0
    for _ in range(DEEPEST):
        count += len(level)
        if count > MOST:
            raise ValueError(f"more than {MOST} values")
        if any(type(value) is int and abs(value) >= 1 << 63 for value in level):
            raise ValueError("a number outside 64 bits")
        below: list[Any] = []
        for value in level:
            below += [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else []
            if len(below) > MOST:
                raise ValueError(f"more than {MOST} values")
        level = below
        if not level:
            return check_letters(values)
    raise ValueError("values inside values too deep to read")


def read_recipe(path: Path, model: str | None = None, default: str | None = None) -> Recipe:
    """The recipe in a YAML file. `model` is taken where the file names none, else `default`.

    Raises InputError when the file is missing, no YAML or no recipe, and when both name a model.
    """
    try:
        values = _parse_yaml(read_bytes(path, LARGEST))
    except FileNotFoundError:
        raise InputError(f"The recipe must be a YAML file, got nothing at {path}. Check the path.") from None
    except ValueError as error:
        raise InputError(f"The recipe must be a YAML file, got {path} ({error}). Mend it.") from None
    if not isinstance(values, dict):
        raise InputError(f"The recipe must be a mapping with version, model and stages, got {type(values).__name__} in {path}. Mend it.")
    if model is not None and "model" in values:
        raise InputError(f"MODEL must stand without a recipe that names its model, got {model} and {values['model']!r} in {path}. Leave one out.")
    if "model" not in values and (model or default):
        values = values | {"model": model or default}
    return make_recipe(values, path.name)

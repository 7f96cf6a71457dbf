"""The recipe: what flags compile to, hashed and stored with every checkpoint, and readable from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .artifact import InputError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(_Strict):
    """Where the tokens come from: a text file (None: the bundled one), or, when `generated`, text that the dense model writes itself; `windows` of `length`
    tokens.
    """

    file: str | None = None
    generated: bool = False
    windows: int = Field(default=128, ge=2)
    length: int = Field(default=256, ge=16)


class Tune(_Strict):
    """Training end to end of what a method selects by: `steps` per density of `windows` windows, at peak `rate`; `local` weighs the lost energy of each
    layer's output against the divergence from the dense model; `precision` is that of the passes through the model (auto: bf16 where the machine multiplies it
    natively); `data` windows are trained on at most.
    """

    steps: int = Field(default=1000, ge=1)
    windows: int = Field(default=2, ge=1)
    rate: float = Field(default=4e-3, gt=0)
    local: float = Field(default=0.2, ge=0)
    data: int = Field(default=1024, ge=4)
    precision: Literal["auto", "fp32", "bf16"] = "auto"


class Stage(_Strict):
    """One method, two joined by `+` (a neuron method and a channel method), `imported`, or `auto`, which tries every method; and the configuration, of which a
    method takes the fields that it knows.
    """

    method: str = "auto"
    config: dict[str, Any] = {}


class Budget(_Strict):
    """What the result may lose on held-out text: a relative rise in perplexity (0.01 is 1 %) and a KL divergence to the dense model in nats per token."""

    max_ppl_increase: float | None = Field(default=None, ge=0)
    max_kl: float | None = Field(default=None, ge=0)

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
    """Everything that decides the result, apart from the model's own bytes."""

    version: Literal[1] = 1
    model: str
    calibration: Calibration = Calibration()
    seed: int = Field(default=0, ge=0)
    stages: tuple[Stage, ...] = Field(default=(Stage(),), min_length=1, max_length=1)
    budget: Budget = Budget()
    export: Export = Export()

    @property
    def searches(self) -> bool:
        """Whether the budget decides the sparsity: it does when the stage sets none; else it is a check on the result."""
        return self.budget.bounded and "sparsity" not in self.stages[0].config

    def yaml(self) -> str:
        """The recipe as a YAML document that `--recipe` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def make_recipe(values: dict[str, Any], where: str = "The recipe") -> Recipe:
    """A recipe from plain values. Raises InputError naming the first field that is wrong."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "content"
        raise InputError(f"{where}'s {field} must be valid, got {first.get('input')!r} ({first['msg']}). Mend it.") from None


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises InputError when the file is missing, no YAML or no recipe."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"The recipe must be a YAML file, got nothing at {path}. Check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise InputError(f"The recipe must be a YAML file, got {path} ({str(error).splitlines()[0]}). Mend it.") from None
    if not isinstance(values, dict):
        raise InputError(f"The recipe must be a mapping with version, model and stages, got {type(values).__name__} in {path}. Mend it.")
    return make_recipe(values, str(path))

"""The recipe: what flags compile to, hashed and stored with every checkpoint, and readable from a YAML file."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import check_letters, read_bytes
from ..bundled import BUNDLED_MODEL
from ..checkpoint.fields import LARGEST_LOSS, LONGEST, MOST_WINDOWS, Strict, make_part
from ..methods import DECIDES, EXACT, parts_of
from ..onnx_export.precision import FOR_CUDA, PRECISIONS, Export
from ..training.settings import Stage

SELF = "self"
"""The value of --calibration that means text sampled from the model itself."""
CHAT: Literal["chat"] = "chat"
"""The value of --calibration that means conversations that the model writes itself, in its chat template."""
RECIPES = Path(__file__).parents[1] / "recipes"

LARGEST, MOST, DEEPEST = 1 << 20, 10_000, 40
"""Of a recipe: bytes, values and levels of values inside values."""
MOST_SEED = (1 << 32) - 1
"""What seeds are made of it, of texts, windows and predictors, stays within 64 bits."""
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def parse_duration(text: str) -> float:
    """Seconds of a time such as 90s, 20m or 1h30m. Raises ValueError for anything else, a number without a unit too."""
    match = _DURATION.fullmatch(text)
    seconds = (
        0.0
        if match is None
        else sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True))
    )
    if seconds <= 0:
        hint = (
            f"Write {text}m for minutes"
            if re.fullmatch(r"\d+(\.\d+)?", text)
            else "Write hours, minutes and seconds in this order"
        )
        raise ValueError(f"must be a time such as 90s, 20m or 1h30m, got {text!r}. {hint}.")
    return seconds


class Calibration(Strict):
    """Where the tokens come from: a text file (None: the bundled one), or, when `generated`, text that the dense model
    writes itself, as `chat` conversations in its chat template; `windows` of `length` tokens.
    """

    file: str | None = None
    generated: bool | Literal["chat"] = False
    windows: int = Field(default=128, ge=2, le=MOST_WINDOWS)
    length: int = Field(default=256, ge=16, le=LONGEST)


class Budget(Strict):
    """What the result may lose on held-out text: a relative rise in perplexity (0.01 is 1 %), a KL divergence to the
    dense model in nats per token, and one of the tokens of long windows that have half a window before them, or more.
    """

    max_ppl_increase: float | None = Field(default=None, ge=0, le=LARGEST_LOSS)
    max_kl: float | None = Field(default=None, ge=0, le=LARGEST_LOSS)
    max_kl_long: float | None = Field(default=None, ge=0, le=LARGEST_LOSS)

    @property
    def bounded(self) -> bool:
        """Whether anything is bounded."""
        return any(getattr(self, name) is not None for name in type(self).model_fields)

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a bound on long context what is stored, and hashed, is what it was before there was one."""
        return {name: value for name, value in write(self).items() if (name, value) != ("max_kl_long", None)}


class Recipe(Strict):
    """Everything that decides the result, apart from the model's own bytes; of a recipe with a `time_budget` (as in
    20m), or of one that says neither it nor steps, also how fast the machine is: what is decided by that is stored as
    steps.

    `rotate` turns the model's residual stream to its principal axes before anything is planned, which changes the
    inputs of linear maps and not what the model computes.
    """

    version: Literal[1] = 1
    model: str
    calibration: Calibration = Calibration()
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    stages: tuple[Stage, ...] = Field(default=(Stage(),), min_length=1, max_length=3)
    budget: Budget = Budget()
    time_budget: str | None = None
    rotate: bool = False
    export: Export = Export()

    @field_validator("time_budget")
    @classmethod
    def _check_time(cls, value: str | None) -> str | None:
        if value is not None:
            parse_duration(value)
        return value

    @property
    def searches(self) -> bool:
        """Whether the budget decides the sparsity: it does when the stage sets none; else it is a check on
        the result.
        """
        return self.budget.bounded and "sparsity" not in self.stages[-1].config

    def yaml(self) -> str:
        """The recipe as a YAML document that `--recipe` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def make_recipe(values: dict[str, Any], where: str = "The recipe") -> Recipe:
    """A recipe from plain values. Raises InputError naming the first field that is wrong."""
    return make_part(Recipe, values, where)


def _parse_yaml(text: bytes) -> Any:
    """The value of a YAML text, plain and finite. Raises ValueError with the reason alone."""
    try:
        values = yaml.safe_load(text.decode("utf-8"))
    except RecursionError:
        raise ValueError("values inside values too deep to read") from None
    except Exception as error:  # besides YAMLError whatever a tag's constructor raises: !!int x, !!timestamp x
        raise ValueError(
            next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        ) from None
    _check_plain(values)
    return values


def _check_plain(values: Any) -> None:
    """Raise ValueError for values too deep, too many (aliases of aliases count each time) or too large, which an error
    could not even quote.
    """
    level, count = [values], 0
    for _ in range(DEEPEST):
        count += len(level)
        if count > MOST:
            raise ValueError(f"more than {MOST} values")
        if any(type(value) is int and abs(value) >= 1 << 63 for value in level):
            raise ValueError("a number outside 64 bits")
        below: list[Any] = []
        for value in level:
            below += (
                [*value, *value.values()]
                if isinstance(value, dict)
                else value
                if isinstance(value, list | tuple | set)
                else []
            )
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
        raise InputError(
            f"The recipe must be a mapping with version, model and stages, got {type(values).__name__} in {path}. Mend "
            "it."
        )
    if model is not None and "model" in values:
        raise InputError(
            f"MODEL must stand without a recipe that names its model, got {model} and {values['model']!r} in {path}. "
            "Leave one out."
        )
    if "model" not in values and (model or default):
        values = values | {"model": model or default}
    return make_recipe(values, path.name)


@dataclass(frozen=True)
class Flags:
    """What a command line says of a conversion's result; None where it says nothing."""

    model: str | None = None
    method: str | None = None
    sparsity: float | None = None
    max_ppl_increase: float | None = None
    max_kl: float | None = None
    recipe: str | Path | None = None
    calibration: str | Path | None = None
    precision: str | None = None
    target: str | None = None
    seed: int | None = None
    max_kl_long: float | None = None
    rotate: bool | None = None


def compile_recipe(flags: Flags) -> Recipe:
    """The recipe that flags mean, or the one in a file. Raises InputError for bad values, and for a file together with
    flags that it covers.
    """
    model, method, sparsity = flags.model, flags.method, flags.sparsity
    if flags.recipe:
        said = [name for name, value in asdict(flags).items() if value is not None]
        covered = [name for name in said if name not in ("model", "recipe")]
        if covered:
            raise InputError(
                f"--recipe must stand without the flags that it covers, got {', '.join(covered)} as well. Put them "
                "into the recipe."
            )
        return read_recipe(named_recipe(flags.recipe), None if model is None else str(model), BUNDLED_MODEL)
    if sparsity is not None and not 0 < sparsity < 1:
        raise InputError(
            f"sparsity must lie strictly between 0 and 1, got {sparsity}. Use 0.5 to skip half of the gated neurons."
        )
    parts = parts_of(method or "auto")
    budget = {name: getattr(flags, name) for name in Budget.model_fields}
    searches = sparsity is None and any(bound is not None for bound in budget.values())
    fixed = DECIDES.get(parts[0])
    config = {} if searches or fixed else {"sparsity": 0.5 if sparsity is None else sparsity}
    if fixed and sparsity is not None:
        raise InputError(
            f"sparsity must stand without method {method}, got {sparsity}: {fixed}. Leave it out or give a budget."
        )
    values = {
        "model": str(model) if model else BUNDLED_MODEL,
        "calibration": _calibration(flags.calibration),
        "seed": flags.seed or 0,
        "stages": [{"method": method or "auto", "config": config}],
        "budget": budget,
        "rotate": bool(flags.rotate),
        "export": _export(flags.precision, flags.target),
    }
    return make_recipe(values, "convert")


def _calibration(calibration: str | Path | None) -> dict[str, Any]:
    """The calibration part that the flag means."""
    generated = {SELF: True, CHAT: CHAT}.get(str(calibration))
    if generated is not None:
        return {"generated": generated}
    return {"file": str(calibration) if calibration else None}


def named_recipe(recipe: str | Path) -> Path:
    """The file of a recipe: one that comes with sparsegate, by its name, or a path."""
    bundled = RECIPES / f"{recipe}.yaml"
    return bundled if bundled.is_file() and not Path(recipe).is_file() else Path(recipe)


def training_stages(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages that train weights, in order, before anything is planned. Raises InputError for a recipe of another
    order.
    """
    *before, last = recipe.stages
    for stage in before:
        if stage.tune is None:
            raise InputError(
                f"Every stage but the last must train, got {stage.method} without tune. Give it tune, or leave the "
                "stage out."
            )
        if stage.tune.predictors is not None:
            raise InputError(
                "A stage that trains predictors must be the last one, got another after it. Leave the predictors or "
                "the last stage out."
            )
    trained = tuple(stage for stage in recipe.stages if stage.tune is not None)
    for number, stage in enumerate(trained):
        allowed = {"activation"} if number == 0 else set()
        if stage.method != EXACT or set(stage.config) - allowed:
            what = "with at most an activation" if allowed else "without a configuration after the first"
            raise InputError(
                f"A stage that trains must have method {EXACT} {what}, got {stage.method} with {sorted(stage.config)}. "
                "Mend it."
            )
    return trained


def _export(precision: str | None, target: str | None) -> dict[str, str]:
    """The export part: in fp32 for the CPU and in fp16 for CUDA where nothing else is asked for."""
    for name, value, known in (("precision", precision, tuple(PRECISIONS)), ("target", target, ("cpu", "cuda"))):
        if value is not None and value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}. Choose one of these.")
    if (precision, target) == ("fp32", "cuda"):
        raise InputError(
            f"precision must be {FOR_CUDA} for the target cuda, got fp32. Choose one of these, or leave it out for "
            "fp16."
        )
    return {"precision": precision or ("fp16" if target == "cuda" else "fp32"), "target": target or "cpu"}

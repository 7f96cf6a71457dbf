"""Values of files that people or sparsegate write: recipes, configurations and results, checked."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ...runtime_onnx.errors import InputError

MOST_WINDOWS, LONGEST = 1 << 28, 1 << 20
"""Windows of a text, and tokens of a window."""
LARGEST_LOSS = 100.0
"""Most that a budget may allow: a hundredfold rise in perplexity, or nats per token. More bounds nothing."""
PassPrecision = Literal["auto", "fp32", "bf16"]
"""Of passes through a model in training; auto is bfloat16 where the machine multiplies it natively."""
_Part = TypeVar("_Part", bound=BaseModel)


class Strict(BaseModel):
    """A file's values, or a part of them: no unknown field, only finite numbers, and nothing changes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def make_part(kind: type[_Part], values: dict[str, Any], where: str) -> _Part:
    """A recipe, or a part of one, from plain values. Raises InputError naming the first field that is wrong."""
    return _made(kind, values, f"{where}'s ", "content", "Mend it")


def validated(kind: type[_Part], values: dict[str, Any], name: str) -> _Part:
    """`values` as a configuration of `kind`. Raises InputError naming the field of `name` that is wrong."""
    return _made(kind, values, f"{name}.", "config", "Mend the recipe")


def _made(kind: type[_Part], values: dict[str, Any], owner: str, whole: str, remedy: str) -> _Part:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or whole
        raise InputError(
            f"{owner}{field:.200} must be valid, got {ascii(first.get('input')):.200} ({first['msg']}). {remedy}."
        ) from None

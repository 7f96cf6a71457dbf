"""Methods turn statistics into a plan. One file per method, one row per file.

A method module exports SOURCE, NEEDS (full statistic names; `{field}` is filled from the configuration), Config and `plan(stats, arch, config) -> Plan`.
Methods see tensors, never models, files or datasets.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pydantic import BaseModel, ValidationError

from ..artifact import InputError

METHODS = {
    "gate": ".gate",
    "predictor": ".predictor",
}


def load_method(name: str) -> Any:
    """The module of a method. Raises InputError for an unknown name."""
    if name not in METHODS:
        raise InputError(f"method must be one of auto, {', '.join(METHODS)}, got {name!r}. Choose one of these.")
    return import_module(METHODS[name], __name__)


def make_config(name: str, values: dict[str, Any]) -> BaseModel:
    """A method's configuration from plain values. Raises InputError naming the field that is wrong."""
    try:
        return load_method(name).Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "config"
        raise InputError(f"{name}.{where} must be valid, got {first.get('input')!r} ({first['msg']}). Mend the recipe.") from None


def needs(name: str, config: BaseModel) -> list[str]:
    """The full names of the statistics that a method needs under a configuration."""
    return [template.format(**config.model_dump()) for template in load_method(name).NEEDS]

"""Methods turn statistics into a plan. One file per method, one row per file.

A method module exports SOURCE, NEEDS (full statistic names; `{field}` is filled from the configuration), Config and
`plan(stats, arch, config) -> Plan`. A module may name more statistics for some configurations with
`more_needs(config)`. A module whose plan is to be trained end to end exports `start(config)`, the density of that plan
(None: not under this configuration), and its Config has `tune`. `plan` takes the sites of its own kind out of the
statistics. Methods see tensors, never models, files or datasets.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pydantic import BaseModel

from ...runtime_onnx.errors import InputError
from ..checkpoint.fields import validated

IMPORTED = "imported"
"""The method that takes predictors from files; it is none of METHODS because it reads them."""
NEURON_METHODS = ("gate", "chess", "cett", "trained_gate", "predictor")
"""Methods that keep a share of the neurons."""
LINEAR_METHODS = ("teal", "wina")
EXACT = "exact"
TUNED = "tuned"
"""What a recipe's plan is called when its last stage trains weights: what the training ended with."""
AUTO = {False: NEURON_METHODS, True: (*NEURON_METHODS, *LINEAR_METHODS, "chess+teal")}
"""What `auto` tries, by whether a budget is searched: a share of neurons means nothing to methods that skip input
channels. For a model with exact zeros it tries `exact` too.
"""

METHODS = {
    "exact": ".gating.exact",
    "gate": ".gating.gate",
    "chess": ".gating.chess",
    "cett": ".gating.cett",
    "teal": ".channels.teal",
    "wina": ".channels.wina",
    "trained_gate": ".gating.trained_gate",
    "predictor": ".gating.predictor",
}


def load_method(name: str) -> Any:
    """The module of a method. Raises InputError for an unknown name."""
    if name not in METHODS:
        raise InputError(f"method must be one of auto, {', '.join(METHODS)}, got {name!r}. Choose one of these.")
    return import_module(METHODS[name], __name__)


def make_config(name: str, values: dict[str, Any]) -> BaseModel:
    """A method's configuration from plain values. Raises InputError naming the field that is wrong."""
    return validated(load_method(name).Config, values, name)


def needs(name: str, config: BaseModel) -> list[str]:
    """The full names of the statistics that a method needs under a configuration."""
    module = load_method(name)
    more = module.more_needs(config) if hasattr(module, "more_needs") else ()
    return [template.format(**config.model_dump()) for template in (*module.NEEDS, *more)]


def parts_of(method: str) -> list[str]:
    """The methods that a name joins by `+`: one that gates neurons and one that skips input channels. Raises InputError
    for others.
    """
    parts = method.split("+")
    if len(parts) == 1:
        if method not in ("auto", IMPORTED):
            load_method(method)
    elif (
        len(parts) > 2
        or not any(part in NEURON_METHODS for part in parts)
        or not any(part in LINEAR_METHODS for part in parts)
    ):
        neurons, linears = ", ".join(NEURON_METHODS), ", ".join(LINEAR_METHODS)
        raise InputError(
            f"A joined method must be one of {neurons} and one of {linears}, got {method!r}. Name one of each, as in "
            "chess+teal."
        )
    return parts

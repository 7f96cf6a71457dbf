"""Methods turn statistics into a plan. One file per method, one row per file.

A method module exports:

1. SOURCE, NEEDS (full statistic names; `{field}` is filled from the configuration), Config and
   `plan(stats, arch, config) -> Plan`, which takes the sites of its own kind out of the statistics.
2. `more_needs(config)`, where some configurations need more statistics.
3. `start(config)`, where the plan is to be trained end to end: the density of that plan (None: not under this
   configuration). Its Config has `tune` then.
4. `rank(config, hidden, units, matrices)`, where the plan holds predictors: their rank.
5. `plan_tokens(config)`, where `plan` itself trains them: the tokens that it takes (0: none under this configuration).

Methods see tensors, never models, files or datasets.

Every list of names comes from the rows: what `auto` tries, what may be joined by `+`, what help and errors say.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from pydantic import BaseModel

from ...runtime_onnx.errors import InputError
from ..checkpoint.fields import validated

Kind = Literal["neuron", "channel"]
"""What a method skips: neurons of the networks, or input channels of linear maps."""


@dataclass(frozen=True)
class Method:
    """One row of METHODS.

    Attributes:
        module: Below this package.
        kind: What it skips.
        decides: What says how much is skipped, where it is not a share that is asked for; `auto` tries such a method
            only for a model with exact zeros.
        lost: Nats per token that a layer loses, by the cube of the share that is skipped (`pipeline.timing` says where
            from).
        variance: Of the paired difference over windows, by the nats lost.
        trained_form: The method that trains what this one selects by. `auto` makes it of its best candidate alone.
        tried: Whether `auto` tries it; it makes trained forms in any case.
    """

    module: str
    kind: Kind
    decides: str | None = None
    lost: float = 0.05
    variance: float = 0.02
    trained_form: str | None = None
    tried: bool = True


METHODS = {
    "exact": Method(".gating.exact", "neuron", decides="the activation's zeros decide", trained_form="predictor"),
    "gate": Method(".gating.gate", "neuron", lost=0.056, trained_form="trained_gate"),
    "chess": Method(".gating.chess", "neuron", lost=0.033, trained_form="trained_gate"),
    "cett": Method(".gating.cett", "neuron", lost=0.104, trained_form="trained_gate"),
    "svd": Method(".gating.svd", "neuron", lost=0.1, variance=0.03, tried=False),
    "teal": Method(".channels.teal", "channel", lost=0.05, trained_form="trained_input"),
    "wina": Method(".channels.wina", "channel", lost=0.06, trained_form="trained_input"),
    "trained_input": Method(".channels.trained_input", "channel", lost=0.02),
    "trained_gate": Method(".gating.trained_gate", "neuron", lost=0.025),
    "predictor": Method(".gating.predictor", "neuron", lost=0.114, variance=0.03),
}
EXACT = "exact"
IMPORTED = "imported"
"""The method that takes predictors from files; it is none of METHODS because it reads them."""
TUNED = "tuned"
"""What a recipe's plan is called when its last stage trains weights: what the training ended with."""
JOINED = ("chess+teal",)
"""What `auto` tries of the methods that `+` joins."""


def _shares(kind: Kind) -> tuple[str, ...]:
    return tuple(name for name, row in METHODS.items() if row.kind == kind and row.decides is None)


NEURON_METHODS = _shares("neuron")
"""Methods that keep a share of the neurons."""
LINEAR_METHODS = _shares("channel")
"""Methods that keep a share of the input channels."""
OF_ZEROS = tuple(name for name, row in METHODS.items() if row.decides)
"""Methods that keep what is not zero: `auto` tries them for a model with exact zeros."""
DECIDES = {name: METHODS[name].decides for name in OF_ZEROS} | {IMPORTED: "the predictors' thresholds decide"}
"""Methods that take no share to skip -> what decides instead."""
TRAINED_FORMS = tuple(dict.fromkeys(row.trained_form for row in METHODS.values() if row.trained_form))
"""Methods that train what another one selects by."""
CANDIDATES = {
    searches: tuple(name for name in names if name in JOINED or (METHODS[name].tried and name not in TRAINED_FORMS))
    for searches, names in ((False, NEURON_METHODS), (True, (*NEURON_METHODS, *LINEAR_METHODS, *JOINED)))
}
"""What `auto` tries without training, by whether a budget is searched: a share of neurons means nothing to methods that
skip input channels. For a model with exact zeros it tries OF_ZEROS too.
"""
NAMED = (*NEURON_METHODS, *OF_ZEROS, *LINEAR_METHODS, IMPORTED)
"""Every name that stands for a method alone, in the order of the help."""


def trained_form(method: str) -> str | None:
    """The method that trains what this one selects by; of methods joined by `+` the first one's. None without one."""
    row = METHODS.get(method.partition("+")[0])
    return None if row is None else row.trained_form


def with_trained_forms(methods: tuple[str, ...]) -> tuple[str, ...]:
    """The methods, then those that train what they select by."""
    forms = (trained_form(name) for name in methods)
    return tuple(dict.fromkeys((*methods, *(form for form in forms if form is not None))))


AUTO = {searches: with_trained_forms(names) for searches, names in CANDIDATES.items()}
"""All that `auto` may make of a model without exact zeros, by whether a budget is searched: the trained form of one
candidate at most.
"""


def load_method(name: str) -> Any:
    """The module of a method. Raises InputError for an unknown name."""
    if name not in METHODS:
        raise InputError(f"method must be one of auto, {', '.join(METHODS)}, got {name!r}. Choose one of these.")
    return import_module(METHODS[name].module, __name__)


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
            f"{JOINED[0]}."
        )
    return parts

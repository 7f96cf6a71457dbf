"""Methods turn statistics into a plan. One file per method, one row per file.

A method module exports SOURCE, NEEDS (full statistic names; `{field}` is filled from the configuration), Config and `plan(stats, arch, config) -> Plan`.
A module may name more statistics for some configurations with `more_needs(config)`. A module whose plan is to be trained end to end exports
`start(config)`, the density of that plan (None: not under this configuration), and its Config has `tune`. `plan` takes the sites of its own kind out of the
statistics. Methods see tensors, never models, files or datasets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError

from ..arch import Site
from ..artifact import InputError
from ..calibration_rules import along, cut
from ..plans import Entry, Threshold
from ..stats import Stats, of_kind

METHODS = {
    "exact": ".exact",
    "gate": ".gate",
    "chess": ".chess",
    "cett": ".cett",
    "teal": ".teal",
    "wina": ".wina",
    "trained_gate": ".trained_gate",
    "predictor": ".predictor",
}

Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Densities = dict[str, Annotated[float, Field(ge=0, le=1)]]
"""Kept shares by site key, as a budget search sets them."""


def load_method(name: str) -> Any:
    """The module of a method. Raises InputError for an unknown name."""
    if name not in METHODS:
        raise InputError(f"method must be one of auto, {', '.join(METHODS)}, got {name!r}. Choose one of these.")
    return import_module(METHODS[name], __name__)


def make_config(name: str, values: dict[str, Any]) -> BaseModel:
    """A method's configuration from plain values. Raises InputError naming the field that is wrong."""
    return validated(load_method(name).Config, values, name)


def validated(kind: type[BaseModel], values: dict[str, Any], name: str) -> BaseModel:
    """`values` as a configuration of `kind`. Raises InputError naming the field of `name` that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "config"
        raise InputError(f"{name}.{where} must be valid, got {first.get('input')!r} ({first['msg']}). Mend the recipe.") from None


def needs(name: str, config: BaseModel) -> list[str]:
    """The full names of the statistics that a method needs under a configuration."""
    module = load_method(name)
    more = module.more_needs(config) if hasattr(module, "more_needs") else ()
    return [template.format(**config.model_dump()) for template in (*module.NEEDS, *more)]


def densities_of(sites: Iterable[Site], sparsity: float, given: Mapping[str, float] | None) -> dict[Site, float]:
    """The kept share of every site: the given one, else 1 - sparsity. Raises InputError for a key that is none of the sites."""
    by_key = {site.key: site for site in sites}
    unknown = sorted(set(given or {}) - set(by_key))
    if unknown:
        raise InputError(f"densities must name sites such as {next(iter(by_key), 'layers.0.ffn')}, got {', '.join(unknown)}. Mend the keys.")
    return {site: (given or {}).get(key, 1.0 - sparsity) for key, site in by_key.items()}


def plan_linears(
    stats: Stats, score: str, sparsity: float, linears: Sequence[str] | None, greedy: bool, densities: Mapping[str, float] | None
) -> dict[Site, list[Entry]]:
    """Input thresholds on the linears of every block at a mean `sparsity`, weighted by their numbers of weights.

    The score is |x_j| c_j with c as the statistic `scale`. With `greedy` a block's shares lie on its path; where only some linears are gated, the path of all
    is followed until those reach their mean. Keys of `densities` are site keys or `layers.<i>`. Raises InputError for a linear or a key that there is not.
    """
    sites = [site for site in of_kind(stats, "linear") if linears is None or site.kind.removeprefix("linear:") in linears]
    missing = set(linears or ()) - {site.kind.removeprefix("linear:") for site in sites}
    if missing:
        raise InputError(f"linears must name linears of the model, got {', '.join(sorted(missing))}, which it has not. Leave them out.")
    blocks = {f"layers.{site.layer}" for site in sites}
    single = densities_of(sites, sparsity, {key: share for key, share in (densities or {}).items() if key not in blocks})
    found: dict[Site, list[Entry]] = {}
    for layer in sorted({site.layer for site in sites}):
        own = [site for site in sites if site.layer == layer]
        weights = torch.tensor([float(stats[site][f"histogram:{score}.units"] * stats[site][f"histogram:{score}.outputs"]) for site in own])
        mean = 1.0 - (densities or {}).get(f"layers.{layer}", 1.0 - sparsity)
        shares = [mean] * len(own)
        if greedy:
            shares = along(torch.stack([stats[site][f"greedy:{score}.path"] for site in own], dim=1), weights, mean).tolist()
        for site, share in zip(own, shares, strict=True):
            kept = single[site] if site.key in (densities or {}) else 1.0 - share
            tau, density = cut(stats[site][f"histogram:{score}.count"], kept)
            scale = stats[site][f"scale:{score}.scale"]
            found[site] = [Threshold("input", torch.where(scale > 0, tau / scale, torch.inf).float(), density)]
    return found

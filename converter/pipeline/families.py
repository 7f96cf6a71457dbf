"""The plans of a method by the densities of its keys: every network and every linear map, by its site's key.

What an allocation of bytes and the search of a budget choose among.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..arch.site import Site
from ..checkpoint.cost import site_cost, site_parameters
from ..checkpoint.plan import FFN_LINEARS, Plan, merge
from ..checkpoint.source import Source
from ..methods import load_method
from ..stats import Stats

Densities = Mapping[str, float]
"""Kept share by key."""


@dataclass(frozen=True)
class Family:
    """Plans by kept shares.

    Attributes:
        make: The plan of densities for all keys.
        sites: The site that each key governs.
        weights: Parameters that a unit of each key's density touches.
        parts: The method that each key is of, by its name.
    """

    make: Callable[[Densities], Plan]
    sites: Mapping[str, Site]
    weights: Mapping[str, float]
    parts: Mapping[str, str]

    def mean(self, densities: Densities) -> float:
        """The mean of densities, weighted by what they touch."""
        return sum(self.weights[key] * densities[key] for key in self.weights) / sum(self.weights.values())


def takes_densities(config: Any) -> bool:
    """Whether a method of this configuration can be told the density of every site."""
    return "densities" in type(config).model_fields


def family_of(source: Source, stats: Stats, configs: Mapping[str, Any]) -> Family:
    """The plans of the methods in `configs` (configurations by name, all with densities) joined."""

    def plan_of(name: str, densities: Densities) -> Plan:
        config = configs[name].model_copy(update={"densities": dict(densities)})
        return beside_swaps(source, load_method(name).plan(stats, source.arch, config))

    first = {name: plan_of(name, {}) for name in configs}
    plan, arch, config = merge(first.values()), source.arch, source.config
    parts = {site.key: name for name, alone in first.items() for site in alone if site in plan}

    def make(densities: Densities) -> Plan:
        return merge(
            [plan_of(name, {key: densities[key] for key, part in parts.items() if part == name}) for name in configs]
        )

    sizes = site_parameters(plan, arch, config)
    weights = {
        key: sizes[site]
        * (site_cost(plan, site, arch, config, density=1.0) - site_cost(plan, site, arch, config, density=0.0))
        for key, site in ((site.key, site) for site in plan)
    }
    return Family(make, {site.key: site for site in plan}, weights, parts)


def beside_swaps(source: Source, plan: Plan) -> Plan:
    """The plan without the linears inside networks that keep what a swapped activation leaves: both would skip the same
    weights.
    """
    return {
        site: entry
        for site, entry in plan.items()
        if site.kind.removeprefix("linear:") not in FFN_LINEARS or Site(site.layer) not in source.swaps
    }

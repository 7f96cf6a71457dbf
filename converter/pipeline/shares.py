"""The densities of single sites where a method's configuration asks for an allocation: at its own sparsity, or at every
level of a budget's search.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoint.plan import Plan, merge
from ..methods import load_method
from ..stats import Stats
from .allocation import allocate, evolve
from .conversion import Conversion
from .families import Densities, Family, beside_swaps, family_of, takes_densities
from .search import Judge
from .sensitivities import WINDOWS, few_windows, sensitivities

LEAST_AND_MOST = (0.02, 0.99)
"""Mean densities that a budget is searched between."""
EVOLUTION_WINDOWS = 8
_DIGITS = 4  # of a density


class _Shares:
    """The densities of a family at any mean, `allocation` being greedy or evolution. All are measured on windows that
    thresholds are calibrated on.
    """

    def __init__(self, conversion: Conversion, family: Family) -> None:
        self.conversion, self.family = conversion, family
        model, source = conversion.model(conversion.device), conversion.source
        self.model, self.arch, self.activation = model, source.arch, source.arch.activation(source.config)
        windows = few_windows(conversion.texts.calibration, WINDOWS)
        self.curves = sensitivities(model, self.arch, self.activation, windows, family)
        self.offsets = dict.fromkeys(family.sites, 0.0)

    def at(self, mean: float) -> dict[str, float]:
        """Densities with this mean."""
        densities = allocate(self.curves, self.family.weights, mean)
        moved = {key: density + self.offsets[key] for key, density in densities.items()}
        return fitted(self.family, moved, mean)

    def evolve(self, mean: float) -> None:
        """Let `at` follow what an evolution at this mean makes of its densities."""
        windows = few_windows(self.conversion.texts.calibration, EVOLUTION_WINDOWS)
        judge = Judge(self.model, self.arch, self.activation, windows)
        start = self.at(mean)
        evolved = evolve(
            self.family,
            start,
            lambda densities: judge.loss(self.family.make(densities)).kl,
            self.conversion.recipe.seed,
        )
        self.offsets = {key: self.offsets[key] + evolved[key] - start[key] for key in start}


def fitted(family: Family, densities: Densities, mean: float) -> dict[str, float]:
    """`densities` shifted together, within [0, 1], so that their weighted mean is `mean`."""
    low, high = -max(densities.values()), 1.0 - min(densities.values())
    for _ in range(60):
        shift = (low + high) / 2
        shifted = {key: min(1.0, max(0.0, density + shift)) for key, density in densities.items()}
        low, high = (shift, high) if family.mean(shifted) < mean else (low, shift)
    return {key: min(1.0, max(0.0, density + high)) for key, density in densities.items()}


def _allocation(config: Any) -> str:
    return getattr(config, "allocation", "uniform")


def with_densities(conversion: Conversion, stats: Stats, configs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configurations by part with the densities that their allocations give; the bytes that all such parts keep
    together are those of their sparsities. Others stay as they are.
    """
    parts = {part: config for part, config in configs.items() if _allocation(config) != "uniform"}
    parts = {part: config for part, config in parts.items() if config.densities is None}
    if not parts:
        return configs
    family = family_of(conversion.source, stats, parts)
    mean = family.mean({key: 1.0 - parts[part].sparsity for key, part in family.parts.items()})
    shares = _Shares(conversion, family)
    if "evolution" in map(_allocation, parts.values()):
        shares.evolve(mean)
    densities = {key: round(density, _DIGITS) for key, density in shares.at(mean).items()}
    told = {
        part: config.model_copy(
            update={"densities": {key: densities[key] for key, owner in family.parts.items() if owner == part}}
        )
        for part, config in parts.items()
    }
    return {part: told.get(part, config) for part, config in configs.items()}


class Levels:
    """A method's plans by their mean density, for the search of a budget; `configs` by part."""

    def __init__(self, conversion: Conversion, stats: Stats, configs: Mapping[str, Any]) -> None:
        self.conversion, self.stats, self.configs = conversion, stats, configs
        self.family, self.shares = None, None
        allocations = {_allocation(config) for config in configs.values()}
        self.evolves = "evolution" in allocations
        if all(map(takes_densities, configs.values())) and "uniform" not in allocations:
            self.family = family_of(conversion.source, stats, configs)
            self.shares = _Shares(conversion, self.family)

    def plan(self, level: float) -> Plan:
        """The plan of a mean density."""
        if self.family is not None and self.shares is not None:
            return self.family.make(self.shares.at(level))
        source, values = self.conversion.source, {"sparsity": min(0.99, max(0.01, 1.0 - level)), "densities": None}
        plans = []
        for part, config in self.configs.items():
            told = {name: value for name, value in values.items() if name in type(config).model_fields}
            plan = load_method(part).plan(self.stats, source.arch, config.model_copy(update=told))
            plans.append(beside_swaps(source, plan))
        return merge(plans)

    def evolve(self, level: float) -> bool:
        """Follow an evolution at this level from now on; whether there is one."""
        if self.shares is None or not self.evolves:
            return False
        self.shares.evolve(level)
        return True

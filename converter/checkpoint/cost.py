"""What of a block is computed and read under a plan, as a share of the dense block's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..arch import Arch
from ..arch.shapes import linear_shapes
from ..arch.site import Site
from .plan import FFN_LINEARS, Entry, Plan, Swap, Threshold, deciding


def predictor_cost(plan: Plan, arch: Arch, config: Any) -> float:
    """Parameters of predictors and residuals relative to those of all dense MLPs: their part of the MLP cost."""
    hidden, units, layers = (arch.size(config, space) for space in ("hidden", "units", "layers"))
    extra = sum(
        t.numel()
        for entries in plan.values()
        for entry in entries
        for role, t in entry.tensors().items()
        if role != "tau"
    )
    return extra / (layers * (2 if arch.ffn.kind == "plain" else 3) * hidden * units)


def cost(entry: Entry, hidden: int, units: int, matrices: int, density: float, opened: float | None = None) -> float:
    """Weight bytes touched per token relative to the site's dense weights, at a realised density, by the site's
    `deciding` entry.

    The dense weights are `matrices` [n, d] at a feed-forward site, the one matrix at a linear site. A threshold on the
    gate needs the gate in full (a plain network's: the up projection); a predictor adds its own weights, a residual its
    own. Thresholds themselves are not counted: n of n d. A swap needs the gate in full, the up projection where the
    gate is not zero (the share `opened`, None: the calibrated one), and the down projection at `density`.
    """
    if isinstance(entry, Swap):
        return (1 + density) / 2 if matrices == 2 else (1 + (entry.opened if opened is None else opened) + density) / 3
    if isinstance(entry, Threshold):
        if entry.score == "input":
            return density
        return (1 + (matrices - 1) * density) / matrices + 2 * entry.rank / (matrices * units)
    extra = entry.rank * (hidden + units) + (0 if entry.residual is None else entry.rank * hidden)
    return density + extra / (matrices * hidden * units)


Shares = Mapping[Site, float]


def mlp_cost(plan: Plan, arch: Arch, config: Any, density: Shares | None = None, opened: Shares | None = None) -> float:
    """Weight bytes of the feed-forward networks touched per token relative to dense, mean over all layers; a layer
    without an entry costs 1.

    `density` is the realised share by site, `opened` that of non-zero gates; None means the calibrated ones.
    """
    layers = arch.size(config, "layers")
    return sum(_layer_costs(plan, arch, config, layer, density, opened)[0] for layer in range(layers)) / layers


def block_cost(
    plan: Plan, arch: Arch, config: Any, density: Shares | None = None, opened: Shares | None = None
) -> float:
    """Bytes of all linears of the blocks (q, k, v, o, gate, up, down) touched per token, predictors and residuals
    included, relative to dense.
    """
    layers = arch.size(config, "layers")
    return sum(_layer_costs(plan, arch, config, layer, density, opened)[1] for layer in range(layers)) / layers


def _layer_costs(
    plan: Plan, arch: Arch, config: Any, layer: int, density: Shares | None, opened: Shares | None
) -> tuple[float, float]:
    """(Cost of a layer's network, cost of all its linears), both relative to dense."""
    sizes = {name: d_out * d_in for name, (d_out, d_in) in linear_shapes(arch, config).items()}

    def site_cost(site: Site) -> float:
        if site not in plan:
            return 1.0
        entry = deciding(plan[site])
        matrices, share = 2 if arch.ffn.kind == "plain" else 3, entry.density if density is None else density[site]
        return cost(
            entry, arch.size(config, "hidden"), arch.size(config, "units"), matrices, share, (opened or {}).get(site)
        )

    touched = {name: size * site_cost(Site(layer, kind=f"linear:{name}")) for name, size in sizes.items()}
    network = [name for name in sizes if name in FFN_LINEARS]
    dense_network, dense = sum(sizes[name] for name in network), sum(sizes.values())
    inside = dense_network * site_cost(Site(layer)) if Site(layer) in plan else sum(touched[name] for name in network)
    return inside / dense_network, (sum(touched.values()) - sum(touched[name] for name in network) + inside) / dense


def site_parameters(plan: Plan, arch: Arch, config: Any) -> dict[Site, int]:
    """Dense weights, biases left out, that each site of a plan gates: all matrices of a feed-forward network, the one
    matrix of a linear site.
    """
    hidden, units, matrices = (
        arch.size(config, "hidden"),
        arch.size(config, "units"),
        2 if arch.ffn.kind == "plain" else 3,
    )
    shapes = linear_shapes(arch, config)
    linear = {site: shapes[site.kind.removeprefix("linear:")] for site in plan if site.kind.startswith("linear:")}
    return {site: linear[site][0] * linear[site][1] if site in linear else matrices * hidden * units for site in plan}


def site_units(plan: Plan, arch: Arch, config: Any) -> dict[Site, int]:
    """Units that each site of a plan decides on: neurons, or a linear's input channels."""
    shapes = linear_shapes(arch, config)
    return {
        site: arch.size(config, "units") if site.kind == "ffn" else shapes[site.kind.removeprefix("linear:")][1]
        for site in plan
    }


def site_cost(plan: Plan, site: Site, arch: Arch, config: Any, density: float, opened: float | None = None) -> float:
    """Bytes of a site touched per token relative to its own dense weights, predictor included."""
    return cost(
        deciding(plan[site]),
        arch.size(config, "hidden"),
        arch.size(config, "units"),
        2 if arch.ffn.kind == "plain" else 3,
        density,
        opened,
    )


def weighted(values: Mapping[Site, float], sizes: Mapping[Site, int]) -> float:
    """Mean over the sites of `values`, weighted by their parameters."""
    return sum(value * sizes[site] for site, value in values.items()) / sum(sizes[site] for site in values)

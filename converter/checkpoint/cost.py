"""What of a block is computed and read under a plan, as a share of the dense block's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ..arch import Arch
from ..arch.shapes import linear_shapes
from ..arch.site import Site
from .plan import FFN_LINEARS, Exact, Plan, Predictor, SitePlan, Swap, Threshold, part_tensors

Shares = Mapping[Site, float]


class SiteSize(NamedTuple):
    """A feed-forward network's `matrices` [units, hidden]: three when gated, two when plain."""

    hidden: int
    units: int
    matrices: int

    @property
    def weights(self) -> int:
        """Weights of all matrices."""
        return self.matrices * self.hidden * self.units


def network_size(arch: Arch, config: Any, layer: int | None = None) -> SiteSize:
    """The sizes of a layer's feed-forward network; `layer` None: of every one."""
    return SiteSize(arch.size(config, "hidden"), arch.size(config, "units", layer), arch.matrices)


def predictor_cost(plan: Plan, arch: Arch, config: Any) -> float:
    """Parameters of predictors and residuals relative to those of all dense MLPs: their part of the MLP cost."""
    extra = sum(t.numel() for entry in plan.values() for role, t in entry.tensors().items() if role != "tau")
    return extra / sum(network_size(arch, config, layer).weights for layer in range(arch.size(config, "layers")))


def cost(entry: SitePlan, size: SiteSize, density: float, opened: float | None = None) -> float:
    """Weight bytes touched per token relative to the site's dense weights, at a realised density.

    The dense weights are those of `size` at a feed-forward site, the one matrix at a linear site. A residual adds its
    own. Thresholds are not counted: n of n d. `opened` is the share of units with a non-zero gate, None: the calibrated
    one.
    """
    gate = entry.gating
    share = COSTS[type(gate)](gate, size, density, opened)
    for edit in entry.edits:
        share *= EDIT_COSTS[type(edit)](edit, size)
    return share + sum(tensor.numel() for tensor in part_tensors(entry.residual).values()) / size.weights


def _exact(gate: Exact, size: SiteSize, density: float, opened: float | None) -> float:
    """The gate in full, the up projection where the gate is not zero, the down projection where the product is not."""
    if size.matrices == 2:
        return (1 + density) / 2
    return (1 + (gate.opened if opened is None else opened) + density) / 3


def _threshold(gate: Threshold, size: SiteSize, density: float, opened: float | None) -> float:
    """The kept channels of a linear; or the gate (a plain network's up) in full and the rest of kept neurons."""
    return density if gate.score == "input" else (1 + (size.matrices - 1) * density) / size.matrices


def _predictor(gate: Predictor, size: SiteSize, density: float, opened: float | None) -> float:
    """The predictor in full, and the kept neurons."""
    return density + gate.rank * (size.hidden + size.units) / size.weights


COSTS: dict[type, Callable[[Any, SiteSize, float, float | None], float]] = {
    Exact: _exact,
    Threshold: _threshold,
    Predictor: _predictor,
}
"""Kind of gate -> what it touches of the dense weights, its own included."""
EDIT_COSTS: dict[type, Callable[[Any, SiteSize], float]] = {Swap: lambda edit, size: 1.0}
"""Kind of edit -> the weights after it, relative to those before."""


def mlp_cost(plan: Plan, arch: Arch, config: Any, density: Shares | None = None, opened: Shares | None = None) -> float:
    """Weight bytes of the feed-forward networks touched per token relative to dense, mean over all layers; a layer
    without a plan costs 1.

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
    sizes = {name: d_out * d_in for name, (d_out, d_in) in linear_shapes(arch, config, layer).items()}

    def share(site: Site) -> float:
        if site not in plan:
            return 1.0
        kept = plan[site].gating.density if density is None else density[site]
        return cost(plan[site], network_size(arch, config, layer), kept, (opened or {}).get(site))

    touched = {name: size * share(Site(layer, kind=f"linear:{name}")) for name, size in sizes.items()}
    network = [name for name in sizes if name in FFN_LINEARS]
    dense_network, dense = sum(sizes[name] for name in network), sum(sizes.values())
    inside = dense_network * share(Site(layer)) if Site(layer) in plan else sum(touched[name] for name in network)
    return inside / dense_network, (sum(touched.values()) - sum(touched[name] for name in network) + inside) / dense


def site_parameters(plan: Plan, arch: Arch, config: Any) -> dict[Site, int]:
    """Dense weights, biases left out, that each site of a plan gates: all matrices of a feed-forward network, the one
    matrix of a linear site.
    """

    def weights(site: Site) -> int:
        if site.kind == "ffn":
            return network_size(arch, config, site.layer).weights
        d_out, d_in = linear_shapes(arch, config, site.layer)[site.kind.removeprefix("linear:")]
        return d_out * d_in

    return {site: weights(site) for site in plan}


def site_units(sites: Iterable[Site], arch: Arch, config: Any) -> dict[Site, int]:
    """Units that are decided on at each site: neurons, or a linear's input channels."""

    def units(site: Site) -> int:
        if site.kind == "ffn":
            return arch.size(config, "units", site.layer)
        return linear_shapes(arch, config, site.layer)[site.kind.removeprefix("linear:")][1]

    return {site: units(site) for site in sites}


def site_cost(plan: Plan, site: Site, arch: Arch, config: Any, density: float, opened: float | None = None) -> float:
    """Bytes of a site touched per token relative to its own dense weights, predictor included."""
    return cost(plan[site], network_size(arch, config, site.layer), density, opened)


def weighted(values: Mapping[Site, float], sizes: Mapping[Site, int]) -> float:
    """Mean over the sites of `values`, weighted by their parameters."""
    return sum(value * sizes[site] for site, value in values.items()) / sum(sizes[site] for site in values)

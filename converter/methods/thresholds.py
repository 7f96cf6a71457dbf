"""Calibration rules: what statistics or sample activations say about thresholds. Pure functions of tensors.

Shares are of tokens times units; a score stays when it is above its threshold, strictly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ..arch.site import Site
from ..checkpoint.plan import Plan, SitePlan, Threshold
from ..stats import Stats, of_kind
from ..stats.bins import UNIT_BINS, cut, unit_edges

Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Densities = dict[str, Annotated[float, Field(ge=0, le=1)]]
"""Kept shares by site key, as an allocation sets them."""
Allocation = Literal["uniform", "greedy", "evolution"]
"""How kept bytes are shared among sites: all alike, by what each costs alone, or from there by moves between pairs that
lower the measured divergence.
"""


class NeuronShare(BaseModel):
    """`sparsity`: the share of gated neurons to skip, the mean over all layers; `allocation` says how layers share it,
    unless `densities` sets kept shares of single layers by site key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    allocation: Allocation = "uniform"
    densities: Densities | None = None


class ChannelShare(BaseModel):
    """`sparsity`: the mean share of weights to skip in the chosen `linears` (None: all of a block).

    `allocation` says how all linears of all blocks share it. Under uniform every block skips the same share; `greedy`
    lets its linears differ by TEAL's greedy split, else all have the same. `densities` sets kept shares by site key, or
    of a block's mean by `layers.<i>`, in place of both.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    linears: tuple[Linear, ...] | None = Field(default=None, min_length=1)
    allocation: Allocation = "uniform"
    greedy: bool = True
    densities: Densities | None = None

    @property
    def follows_path(self) -> bool:
        """Whether the shares inside a block are those of TEAL's greedy path."""
        return self.greedy and self.allocation == "uniform"


# CHESS


def chess_taus(count: Tensor, up_moment: Tensor, density: float) -> tuple[Tensor, float]:
    """Thresholds on |act(gate_i)| with tau_i^2 E[up_i^2] one constant, and the share above them: [n] fp32, density
    (CHESS, arXiv 2409.01366, section 3).

    `count` [n, UNIT_BINS] of |act(gate_i)|, `up_moment` [n] = E[up_i^2]. The constant c is found by bisection, so that
    the share of gate_i^2 E[up_i^2] > c is `density`; a neuron whose up is always 0 is never kept. With equal moments
    this is the plain quantile (CATS).
    """
    units, root = count.shape[0], up_moment.double().sqrt()
    if density <= 0:
        return torch.full((units,), torch.inf), 0.0
    lower, counts = unit_edges(), count.double()
    above = torch.cat([counts.flip(1).cumsum(1).flip(1), torch.zeros(units, 1, dtype=torch.float64)], dim=1)
    total = float(counts.sum())

    def share(log_c: float) -> float:
        tau = torch.where(root > 0, np.exp(log_c) / root, torch.inf)
        bin_ = (torch.searchsorted(lower, tau, right=True) - 1).clamp(0, UNIT_BINS - 1)
        left, right = lower[bin_], lower[bin_ + 1]
        # bin 0 holds the zeros, which no threshold >= 0 keeps
        inside = torch.where(bin_ > 0, ((right - tau) / (right - left)).clamp(0, 1), 0.0)
        kept = above.gather(1, bin_[:, None] + 1)[:, 0] + inside * counts.gather(1, bin_[:, None])[:, 0]
        return float(torch.where(root > 0, kept, 0.0).sum()) / total

    positive = root[root > 0]
    if len(positive) == 0:
        return torch.full((units,), torch.inf), 0.0
    low, high = (
        float(np.log(float(lower[1]) * float(positive.min()))),
        float(np.log(float(lower[-1]) * float(positive.max()))),
    )
    if share(low) <= density:  # not even every non-zero score reaches the density
        return torch.where(root > 0, 0.0, torch.inf).float(), share(low)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > density else (low, middle)
    return torch.where(root > 0, np.exp(high) / root, torch.inf).float(), share(high)


# CETT


def share_at(share: Tensor, error: Tensor, wanted: float) -> float:
    """The dropped share whose error is `wanted`, on a measured curve error(share) [L]; (0, 0) and (1, 1) belong to
    every curve.

    Errors are made non-decreasing; where several shares have one error (exact zeros) the largest counts.
    """
    x = np.concatenate([[0.0], np.maximum.accumulate(error.double().numpy().clip(0, 1)), [1.0]])
    y = np.concatenate([[0.0], share.double().numpy(), [1.0]])
    at = int(np.searchsorted(x, wanted, side="right"))
    if at >= len(x):
        return 1.0
    return float(y[at - 1] + (y[at] - y[at - 1]) * (wanted - x[at - 1]) / (x[at] - x[at - 1]))


def one_cett(curves: Sequence[tuple[Tensor, Tensor]], sparsity: float, steps: int = 60) -> float:
    """The one CETT at which the mean dropped share of all layers is `sparsity`, by bisection; `curves` are (share,
    error) of every layer, as in `share_at`.
    """
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        mean = sum(share_at(share, error, middle) for share, error in curves) / len(curves)
        low, high = (middle, high) if mean < sparsity else (low, middle)
    return high


# TEAL


def along(path: Tensor, weights: Tensor, sparsity: float) -> Tensor:
    """The point of a path [steps, linears] of dropped shares where their mean, weighted by `weights` [linears], is
    `sparsity`: [linears] fp64.

    Beyond the path's end all shares go to 1 together.
    """
    whole = torch.cat([path.double(), torch.ones(1, path.shape[1], dtype=torch.float64)])
    mean = (whole * weights.double()).sum(1) / weights.double().sum()
    at = int((mean >= min(sparsity, 1.0) - 1e-12).nonzero().min())
    if at == 0:
        return whole[0]
    part = (sparsity - float(mean[at - 1])) / float(mean[at] - mean[at - 1])
    return whole[at - 1] + part * (whole[at] - whole[at - 1])


def densities_of(sites: Iterable[Site], sparsity: float, densities: Mapping[str, float] | None) -> dict[Site, float]:
    """The kept share of every site: the given one, else 1 - sparsity. Raises InputError for a key that is none of the
    sites.
    """
    by_key = {site.key: site for site in sites}
    unknown = sorted(set(densities or {}) - set(by_key))
    if unknown:
        raise InputError(
            f"densities must name sites such as {next(iter(by_key), 'layers.0.ffn')}, got {', '.join(unknown)}. Mend "
            "the keys."
        )
    return {site: (densities or {}).get(key, 1.0 - sparsity) for key, site in by_key.items()}


def plan_linears(stats: Stats, score: str, config: ChannelShare) -> Plan:
    """Input thresholds on the linears of every block at a mean sparsity, weighted by their numbers of weights.

    The score is |x_j| c_j with c as the statistic `scale`. Where the shares of a block lie on its greedy path, and only
    some linears are gated, the path of all is followed until those reach their mean. Keys of `densities` are site keys
    or `layers.<i>`. Raises InputError for a linear or a key that there is not.
    """
    linears, densities = config.linears, config.densities or {}
    sites = [
        site for site in of_kind(stats, "linear") if linears is None or site.kind.removeprefix("linear:") in linears
    ]
    missing = set(linears or ()) - {site.kind.removeprefix("linear:") for site in sites}
    if missing:
        raise InputError(
            f"linears must name linears of the model, got {', '.join(sorted(missing))}, which it has not. Leave them "
            "out."
        )
    blocks = {f"layers.{site.layer}" for site in sites}
    single = densities_of(sites, config.sparsity, {key: share for key, share in densities.items() if key not in blocks})
    plan: Plan = {}
    for layer in sorted({site.layer for site in sites}):
        in_layer = [site for site in sites if site.layer == layer]
        weights = torch.tensor(
            [
                float(stats[site][f"histogram:{score}.units"] * stats[site][f"histogram:{score}.outputs"])
                for site in in_layer
            ]
        )
        mean = 1.0 - densities.get(f"layers.{layer}", 1.0 - config.sparsity)
        shares = [mean] * len(in_layer)
        if config.follows_path:
            shares = along(
                torch.stack([stats[site][f"greedy:{score}.path"] for site in in_layer], dim=1), weights, mean
            ).tolist()
        for site, share in zip(in_layer, shares, strict=True):
            kept = single[site] if site.key in densities else 1.0 - share
            tau, density = cut(stats[site][f"histogram:{score}.count"], kept)
            scale = stats[site][f"scale:{score}.scale"]
            plan[site] = SitePlan(
                gate=Threshold("input", torch.where(scale > 0, tau / scale, torch.inf).float(), density)
            )
    return plan

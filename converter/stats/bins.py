"""Bins of histograms of absolute values, and what is read from them. Pure functions of tensors.

Histograms are counts over bins of constant relative width, which add up over batches: `edges` for a site as a whole,
`unit_edges` (coarser) for every unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

BINS = 1 << 16
_SHIFT = 15  # a bin is the upper 17 bits of the fp32 pattern without the sign: 2^8 bins per octave
_UNIT_SHIFT = 19  # the upper 12 bits after the sign: 16 bins per octave
_UNIT_FIRST = (127 - 24) * 16  # 2^-24; scores below it share bin 0
UNIT_BINS = 40 * 16 + 1  # up to 2^16


def bins(score: Tensor) -> Tensor:
    """The bin of every score's absolute value, int32, in [0, BINS)."""
    return (score.float().contiguous().view(torch.int32) >> _SHIFT).bitwise_and_(BINS - 1)  # without the sign


def edges(first: int, last: int) -> Tensor:
    """Lower edges of the bins first..last (exclusive), fp64."""
    return (torch.arange(first, last, dtype=torch.int32) << _SHIFT).view(torch.float32).double()


def unit_bins(score: Tensor) -> Tensor:
    """The coarse bin of every score's absolute value, int32, in [0, UNIT_BINS)."""
    bits = (score.float().contiguous().view(torch.int32) >> _UNIT_SHIFT).bitwise_and_(
        (1 << 31 - _UNIT_SHIFT) - 1
    )  # without the sign
    return bits.sub_(_UNIT_FIRST - 1).clamp_(0, UNIT_BINS - 1)


def unit_edges() -> Tensor:
    """The UNIT_BINS + 1 edges of the coarse bins, fp64; the first is 0."""
    bounds = (
        (torch.arange(_UNIT_FIRST - 1, _UNIT_FIRST + UNIT_BINS, dtype=torch.int32) << _UNIT_SHIFT)
        .view(torch.float32)
        .double()
    )
    bounds[0] = 0.0
    return bounds


def cut(count: Tensor, density: float) -> tuple[float, float]:
    """The threshold above which the share `density` of a histogram [BINS] lies, and the share really above it.

    Inside its bin the threshold is interpolated linearly; a bin of exact zeros is never split, since a score must
    exceed its threshold. Density 0 gives inf.
    """
    if density <= 0:
        return torch.inf, 0.0
    total = int(count.sum())
    above = count.flip(0).cumsum(0).flip(0)
    wanted = density * total
    bin_ = int((above >= wanted).nonzero().max()) if bool((above >= wanted).any()) else 0
    if bin_ == 0:
        return 0.0, float(above[1]) / total
    low, high = edges(bin_, bin_ + 2).tolist()
    inside = (wanted - float(above[bin_ + 1] if bin_ + 1 < len(above) else 0)) / max(1.0, float(count[bin_]))
    tau = torch.tensor(high - inside * (high - low), dtype=torch.float32).item()
    return tau, wanted / total


def dropped_norm(z: Tensor, w_down: Tensor, keep: Tensor) -> float:
    """CETT of a mask: mean over tokens of norm(sum of the dropped z_i w_down_i) / norm(sum of all). z, keep [T, n];
    w_down [n, d].

    Tokens whose whole output is 0 count as 0.
    """
    full, lost = (z @ w_down).norm(dim=-1), (torch.where(keep, 0.0, z) @ w_down).norm(dim=-1)
    return float(torch.where(full > 0, lost / full, 0.0).mean())


def greedy_split(
    sizes: Mapping[str, int],
    error: Callable[[Mapping[str, float]], float],
    step: float = 0.05,
    widest: float = 0.1,
    last: float = 0.95,
) -> Tensor:
    """The path along which a block's linears are made sparser, the one that hurts least first: shares [steps + 1,
    linears], from 0 to `last`.

    Greedy block-wise optimisation of TEAL (arXiv 2408.14690, algorithm 1): every step skips the same number of weights,
    the share `step` of the block's, in one linear. `sizes` are its weights by linear. `error` takes {linear: dropped
    share} and gives the squared error of the block's output. Two deviations:

    1. A linear's own share rises by at most `widest` at once: small key and value projections would be dropped whole.
       So rises in error are compared per weight skipped.
    2. A linear's rise is measured again only when its old value is the least. That finds the same linear where rises
       grow with the share.
    """
    total, names = sum(sizes.values()), list(sizes)
    width = {name: min(widest, step * total / sizes[name]) for name in names}
    now, path = dict.fromkeys(names, 0.0), []
    level = error(now)

    def rise(name: str) -> float:
        further = min(width[name], last - now[name])
        return (error(now | {name: now[name] + further}) - level) / (further * sizes[name])

    rises = {name: rise(name) for name in names}
    fresh = set(names)
    path.append([now[name] for name in names])
    while rises:
        name = min(rises, key=lambda name: rises[name])
        if name not in fresh:
            rises[name] = rise(name)
            fresh.add(name)
            continue
        further = min(width[name], last - now[name])
        level += rises[name] * further * sizes[name]
        now[name] += further
        path.append([now[other] for other in names])
        fresh.clear()
        if last - now[name] < 1e-9:
            del rises[name]
    return torch.tensor(path, dtype=torch.float64)

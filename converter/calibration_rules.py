"""Calibration rules: what statistics or sample activations say about thresholds. Pure functions of tensors.

Histograms are counts over bins of constant relative width, which add up over batches: `edges` for a site as a whole, `unit_edges` (coarser) for every unit.
Shares are of tokens times units; a score stays when it is above its threshold, strictly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .artifact import InputError

BINS = 1 << 16
_SHIFT = 15  # a bin is the upper 17 bits of the fp32 pattern without the sign: 2^8 bins per octave
_UNIT_SHIFT = 19  # the upper 12 bits after the sign: 16 bins per octave
_UNIT_FIRST = (127 - 24) * 16  # 2^-24; scores below it share bin 0
UNIT_BINS = 40 * 16 + 1  # up to 2^16


# Histograms


def bins(score: Tensor) -> Tensor:
    """The bin of every score's absolute value, int32, in [0, BINS)."""
    return (score.float().contiguous().view(torch.int32) >> _SHIFT).bitwise_and_(BINS - 1)  # without the sign


def edges(first: int, last: int) -> Tensor:
    """Lower edges of the bins first..last (exclusive), fp64."""
    return (torch.arange(first, last, dtype=torch.int32) << _SHIFT).view(torch.float32).double()


def unit_bins(score: Tensor) -> Tensor:
    """The coarse bin of every score's absolute value, int32, in [0, UNIT_BINS)."""
    found = (score.float().contiguous().view(torch.int32) >> _UNIT_SHIFT).bitwise_and_((1 << 31 - _UNIT_SHIFT) - 1)  # without the sign
    return found.sub_(_UNIT_FIRST - 1).clamp_(0, UNIT_BINS - 1)


def unit_edges() -> Tensor:
    """The UNIT_BINS + 1 edges of the coarse bins, fp64; the first is 0."""
    found = (torch.arange(_UNIT_FIRST - 1, _UNIT_FIRST + UNIT_BINS, dtype=torch.int32) << _UNIT_SHIFT).view(torch.float32).double()
    found[0] = 0.0
    return found


def cut(count: Tensor, density: float) -> tuple[float, float]:
    """The threshold above which the share `density` of a histogram [BINS] lies, and the share really above it.

    Inside its bin the threshold is interpolated linearly; a bin of exact zeros is never split, since a score must exceed its threshold. Density 0 gives inf.
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


# CHESS


def chess_taus(count: Tensor, up_moment: Tensor, density: float) -> tuple[Tensor, float]:
    """Thresholds on |act(gate_i)| with tau_i^2 E[up_i^2] one constant, and the share above them: [n] fp32, density (CHESS, arXiv 2409.01366, section 3).

    `count` [n, UNIT_BINS] of |act(gate_i)|, `up_moment` [n] = E[up_i^2]. The constant c is found by bisection, so that the share of gate_i^2 E[up_i^2] > c is
    `density`; a neuron whose up is always 0 is never kept. With equal moments this is the plain quantile (CATS).
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
    low, high = float(np.log(float(lower[1]) * float(positive.min()))), float(np.log(float(lower[-1]) * float(positive.max())))
    if share(low) <= density:  # not even every non-zero score reaches the density
        return torch.where(root > 0, 0.0, torch.inf).float(), share(low)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > density else (low, middle)
    return torch.where(root > 0, np.exp(high) / root, torch.inf).float(), share(high)


# CETT


def dropped_norm(z: Tensor, w_down: Tensor, keep: Tensor) -> float:
    """CETT of a mask: mean over tokens of norm(sum of the dropped z_i w_down_i) / norm(sum of all). z, keep [T, n]; w_down [n, d].

    Tokens whose whole output is 0 count as 0.
    """
    full, lost = (z @ w_down).norm(dim=-1), (torch.where(keep, 0.0, z) @ w_down).norm(dim=-1)
    return float(torch.where(full > 0, lost / full, 0.0).mean())


def cett_threshold(z: Tensor, w_down: Tensor, cett: float, steps: int = 40) -> tuple[float, float]:
    """The threshold eps on norm(z_i w_down_i) whose CETT is `cett`, and the CETT at eps, by bisection (ReLU2 Wins, arXiv 2402.03804).

    z [T, n], w_down [n, d]. Kept are neurons above eps. CETT at the returned eps is at most `cett`. Raises InputError for a `cett` outside (0, 1).
    """
    if not 0 < cett < 1:
        raise InputError(f"cett must lie strictly between 0 and 1, got {cett}. Give the relative norm that may be dropped.")
    size = z.abs() * w_down.norm(dim=1)
    low, high = 0.0, float(size.max())
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if dropped_norm(z, w_down, size > middle) <= cett else (low, middle)
    return low, dropped_norm(z, w_down, size > low)


def share_at(share: Tensor, error: Tensor, wanted: float) -> float:
    """The dropped share whose error is `wanted`, on a measured curve error(share) [L]; (0, 0) and (1, 1) belong to every curve.

    Errors are made non-decreasing; where several shares have one error (exact zeros) the largest counts.
    """
    x = np.concatenate([[0.0], np.maximum.accumulate(error.double().numpy().clip(0, 1)), [1.0]])
    y = np.concatenate([[0.0], share.double().numpy(), [1.0]])
    at = int(np.searchsorted(x, wanted, side="right"))
    if at >= len(x):
        return 1.0
    return float(y[at - 1] + (y[at] - y[at - 1]) * (wanted - x[at - 1]) / (x[at] - x[at - 1]))


def one_cett(curves: Sequence[tuple[Tensor, Tensor]], sparsity: float, steps: int = 60) -> float:
    """The one CETT at which the mean dropped share of all layers is `sparsity`, by bisection; `curves` are (share, error) of every layer, as in `share_at`."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        mean = sum(share_at(share, error, middle) for share, error in curves) / len(curves)
        low, high = (middle, high) if mean < sparsity else (low, middle)
    return high


# TEAL


def greedy_split(
    sizes: Mapping[str, int], error: Callable[[Mapping[str, float]], float], step: float = 0.05, widest: float = 0.1, last: float = 0.95
) -> Tensor:
    """The path along which a block's linears are made sparser, the one that hurts least first: shares [steps + 1, linears], from 0 to `last`.

    Greedy block-wise optimisation of TEAL (arXiv 2408.14690, algorithm 1): every step skips the same number of weights, the share `step` of the block's, in
    one linear. `sizes` are its weights by linear; `error` takes {linear: dropped share} and gives the squared error of the block's output. Two deviations: a
    linear's own share rises by at most `widest` at once (small key and value projections would be dropped whole), so rises in error are compared per weight
    skipped; and a linear's rise is measured again only when its old value is the least, which finds the same linear where rises grow with the share.
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


def along(path: Tensor, weights: Tensor, sparsity: float) -> Tensor:
    """The point of a path [steps, linears] of dropped shares where their mean, weighted by `weights` [linears], is `sparsity`: [linears] fp64.

    Beyond the path's end all shares go to 1 together.
    """
    whole = torch.cat([path.double(), torch.ones(1, path.shape[1], dtype=torch.float64)])
    mean = (whole * weights.double()).sum(1) / weights.double().sum()
    at = int((mean >= min(sparsity, 1.0) - 1e-12).nonzero().min())
    if at == 0:
        return whole[0]
    part = (sparsity - float(mean[at - 1])) / float(mean[at] - mean[at - 1])
    return whole[at - 1] + part * (whole[at] - whole[at - 1])

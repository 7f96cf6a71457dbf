"""Selectors: scores to masks, True where a unit stays. Pure functions of tensors; larger scores stay.

Scores are [..., n]: the last axis is the units of one site, each row one token. `top_k`, `paper_cut` and `global_pool`
choose for every token by itself; `threshold` compares with fixed values that `quantile_tau` finds on calibration
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ....runtime_onnx.errors import InputError

Key = TypeVar("Key")


def unit_count(density: float, units: int) -> int:
    """Units that a density keeps of n: round half up. Raises InputError for a density outside [0, 1]."""
    if not 0 <= density <= 1:
        raise InputError(f"density must be in [0, 1], got {density}. Give the share of units to keep.")
    return int(density * units + 0.5)


def top_k(scores: Tensor, density: float) -> Tensor:
    """The round(density * n) largest scores of every row, exactly that many: [..., n] bool. Among equal scores the
    lower index stays.
    """
    return _largest(scores, unit_count(density, scores.shape[-1]))


def _largest(scores: Tensor, k: int) -> Tensor:
    units = scores.shape[-1]
    if k <= 0 or k >= units:
        return torch.full_like(scores, k > 0, dtype=torch.bool)
    least = scores.kthvalue(units - k + 1, dim=-1, keepdim=True).values
    keep, ties = scores > least, scores == least
    return keep | (ties & (ties.cumsum(-1) <= k - keep.sum(-1, keepdim=True)))


def paper_cut(scores: Tensor, sparsity: float) -> Tensor:
    """The rule of arXiv 2406.06562: tau = ascending scores[int(p n)], a score >= tau stays: [..., n] bool.

    Without ties n - int(p n) units stay; scores equal to tau all stay, so that a tail of zeros is never cut. p in [0,
    1), else InputError.
    """
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity must be in [0, 1), got {sparsity}. Give the share of units to drop.")
    tau = scores.kthvalue(int(sparsity * scores.shape[-1]) + 1, dim=-1, keepdim=True).values
    return scores >= tau


def threshold(scores: Tensor, tau: Tensor | float) -> Tensor:
    """Scores above tau (a number, or [n]), strictly: [..., n] bool."""
    return scores > tau


def nonzero(scores: Tensor) -> Tensor:
    """Scores that are not exactly zero: [..., n] bool. Exact for networks whose activation gives zeros."""
    return scores != 0


def quantile_tau(scores: Tensor, density: float) -> float:
    """The threshold above which the share `density` of all scores [..., n] lies: the largest score that is to go.

    With ties at it fewer stay. -inf for density 1.
    """
    flat = scores.flatten()
    drop = flat.numel() - unit_count(density, flat.numel())
    return float("-inf") if drop == 0 else float(flat.kthvalue(drop).values)


def global_pool(scores: Mapping[Key, Tensor], density: float, floor: float = 0.0) -> dict[Key, Tensor]:
    """One pool of all sites for every token: the largest scores stay wherever they are, but every site keeps its own
    largest `floor` share.

    `scores` {site: [..., n]} with equal leading axes; together exactly round(density * sum of n) units of a token stay.
    Sites are compared as they are, so the scores have to be on one scale. Raises InputError for a floor above the
    density.
    """
    if not 0 <= floor <= density:
        raise InputError(f"floor must be in [0, density], got {floor} for density {density}. Lower it.")
    sizes = [values.shape[-1] for values in scores.values()]
    forced = torch.cat([_largest(values, int(floor * values.shape[-1])) for values in scores.values()], dim=-1)
    pool = torch.cat([values for values in scores.values()], dim=-1)
    keep = _largest(torch.where(forced, torch.inf, pool), unit_count(density, sum(sizes)))
    return dict(zip(scores, keep.split(sizes, dim=-1), strict=True))


def used_groups(heads: Tensor, kv_heads: int) -> Tensor:
    """Key-value groups of which any query head stays: [..., H] bool -> [..., kv_heads] bool. Query heads of a group are
    neighbours.
    """
    return heads.unflatten(-1, (kv_heads, -1)).any(-1)

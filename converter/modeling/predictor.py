"""Fresh predictors and residual heads: ranks from a share of the network's weights, and first values."""

from __future__ import annotations

import torch

from ..checkpoint.plan import Predictor

_START_BIAS = 1.0  # logits of a fresh predictor are about this


def fresh_predictor(hidden: int, units: int, rank: int, generator: torch.Generator) -> Predictor:
    """A predictor [r, d], [n, r] that keeps nearly everything, for inputs of rms 1: random directions and logits about
    1.
    """
    fc1 = torch.randn(rank, hidden, generator=generator) / hidden**0.5
    fc2 = 0.3 * torch.randn(units, rank, generator=generator) / rank**0.5
    return Predictor(fc1, fc2, torch.full((units,), -_START_BIAS), 1.0)


def rank_for(hidden: int, units: int, matrices: int, cost: float = 0.1) -> int:
    """The largest r with r (d + n) <= cost * m d n, m matrices of [n, d]; at least 1."""
    return max(1, int(cost * matrices * hidden * units / (hidden + units)))


COST = 0.05  # of the network's weights, for a residual with an fc1 of its own


def residual_rank(units: int, matrices: int) -> int:
    """The largest even r with 2 r d <= COST * m d n, m matrices of [n, d]; at least 2."""
    return max(2, int(COST * matrices * units / 2) // 2 * 2)

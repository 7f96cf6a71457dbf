"""Histogram of a non-negative score over all tokens and units of a site, in bins of constant relative width.

A bin is the upper 17 bits of the value's fp32 pattern without the sign: 2^8 bins per octave, so the range is never
guessed and counts of batches add up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import StatSetup
from .bins import BINS, bins, edges

__all__ = ["BINS", "edges", "finish", "init", "update"]


def init(setup: StatSetup) -> dict[str, Any]:
    """An empty count per bin int64 [BINS], n as `units` int64 [], and the width of the site's output as `outputs` int64
    [].
    """
    return {
        "count": torch.zeros(BINS, dtype=torch.int64),
        "units": torch.tensor(setup.units),
        "outputs": torch.tensor(setup.outputs),
    }


def update(state: dict[str, Any], x: Tensor, score: Tensor, positions: Tensor) -> None:
    """Count the scores [T, n] of the T tokens that are not padding."""
    state["count"] += torch.bincount(bins(score).flatten().cpu(), minlength=BINS)


def finish(state: dict[str, Any]) -> dict[str, Tensor]:
    """{"count": int64 [BINS], "units": int64 [], "outputs": int64 []}."""
    return state

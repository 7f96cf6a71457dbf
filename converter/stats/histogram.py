"""Histogram of a non-negative score over all tokens and units of a site, in bins of constant relative width.

A bin is the upper 17 bits of the value's fp32 pattern without the sign: 2^8 bins per octave, so the range is never guessed and counts of batches add up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import Setting

BINS = 1 << 16
_SHIFT = 15


def init(setting: Setting) -> dict[str, Any]:
    """An empty count per bin int64 [BINS], and n as `units` int64 []."""
    return {"count": torch.zeros(BINS, dtype=torch.int64), "units": torch.tensor(setting.units)}


def update(state: dict[str, Any], x: Tensor, score: Tensor, positions: Tensor) -> None:
    """Count the scores [T, n] of the T tokens that are not padding."""
    bins = score.float().abs().contiguous().view(torch.int32) >> _SHIFT
    state["count"] += torch.bincount(bins.flatten().cpu(), minlength=BINS)


def finish(state: dict[str, Any]) -> dict[str, Tensor]:
    """{"count": int64 [BINS], "units": int64 []}."""
    return state


def edges(first: int, last: int) -> Tensor:
    """Lower edges of the bins first..last (exclusive), fp64."""
    return (torch.arange(first, last, dtype=torch.int32) << _SHIFT).view(torch.float32).double()

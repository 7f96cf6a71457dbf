"""Histogram of a non-negative score for every unit of a site, in 16 bins per octave from 2^-24 to 2^16, with the second
moment of the up projection.

Memory is 641 counts a unit, whatever the text's length: 37 MB for 14336 neurons.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import StatSetup
from .bins import UNIT_BINS, unit_bins

FIELDS = ("up",)


def init(setup: StatSetup) -> dict[str, Any]:
    """Empty counts int32 [n, UNIT_BINS], and sums of up^2 fp64 [n] over `tokens`."""
    sums = torch.zeros(setup.units, dtype=torch.float64)
    return {"count": torch.zeros(setup.units, UNIT_BINS, dtype=torch.int32), "squares": sums, "tokens": 0}


def update(state: dict[str, Any], x: Tensor, score: Tensor, positions: Tensor) -> None:
    """Count the scores [T, n] unit by unit, and add up^2 of the field `up` [T, n]."""
    units = score.shape[1]
    places = unit_bins(score).cpu().add_(torch.arange(units, dtype=torch.int32) * UNIT_BINS)
    state["count"].view(-1).add_(torch.bincount(places.flatten(), minlength=units * UNIT_BINS))
    state["squares"] += state["fields"]["up"].float().square().sum(0, dtype=torch.float64).cpu()
    state["tokens"] += len(score)


def finish(state: dict[str, Any]) -> dict[str, Tensor]:
    """{"count": int32 [n, UNIT_BINS], "up_moment": E[up^2] fp32 [n]}."""
    return {"count": state["count"], "up_moment": (state["squares"] / max(1, state["tokens"])).float()}

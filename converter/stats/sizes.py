"""The sizes of a site, for methods that begin from nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import StatSetup


def init(setup: StatSetup) -> dict[str, Any]:
    """Widths d of the input and n of the score, int64 []."""
    return {"hidden": torch.tensor(setup.hidden), "units": torch.tensor(setup.units)}


def update(state: dict[str, Any], x: Tensor, score: Tensor, positions: Tensor) -> None:
    """Sizes do not change."""


def finish(state: dict[str, Any]) -> dict[str, Tensor]:
    """{"hidden": int64 [], "units": int64 []}."""
    return state

"""The score of an input of 1 at every channel of a linear, for scores of the form |x_j| c_j: a threshold tau on the
score is tau / c_j on |x_j|.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import StatSetup

FIELDS = ("scale",)


def init(setup: StatSetup) -> dict[str, Any]:
    """No scale yet."""
    return {"scale": torch.ones(setup.units)}


def update(state: dict[str, Any], x: Tensor, score: Tensor, positions: Tensor) -> None:
    """Take the field `scale` [d_in], which depends on weights only."""
    state["scale"] = state["fields"]["scale"]


def finish(state: dict[str, Any]) -> dict[str, Tensor]:
    """{"scale": c fp32 [d_in]}."""
    return {"scale": state["scale"].float().cpu().contiguous()}

"""Magnitude of a neuron's contribution: the norm of the vector it adds to the block's output."""

from __future__ import annotations

from torch import Tensor

from . import Context

SOURCE = ("ReLU2 Wins, arXiv 2402.03804", "s_i = norm(z_i w_down_i)", "none")
NEEDS = ("z", "w_down")
PHASE = "post"


def score(context: Context) -> Tensor:
    """|z_i| * norm2(w_down_i): [T, n]."""
    assert context.z is not None and context.w_down is not None
    return context.z.abs() * context.w_down.norm(dim=1)

"""Magnitude of the activated gate, weighted by how large the up projection usually is."""

from __future__ import annotations

from torch import Tensor

from . import Context

SOURCE = (
    "CHESS, arXiv 2409.01366",
    "s_i = |act(w_gate_i x)| sqrt(E[up_i^2])",
    "one threshold tau on s is the paper's tau_i = tau / sqrt(E[up_i^2]) on |act(gate)|; a plain network has no up, so "
    "E[up^2] = 1 there",
)
NEEDS = ("gate", "up_moment")
PHASE = "mid"


def score(context: Context) -> Tensor:
    """|act(gate_i)| * sqrt(E[up_i^2]): [T, n]."""
    assert context.gate is not None and context.up_moment is not None
    return context.gate.abs() * context.up_moment.sqrt()

"""Magnitude of the activated gate."""

from __future__ import annotations

from torch import Tensor

from . import Context

SOURCE = (
    "CATS, arXiv 2404.08763",
    "s_i = |act(w_gate_i x)|",
    "for a plain network the gate is the activated up projection",
)
NEEDS = ("gate",)
PHASE = "mid"


def score(context: Context) -> Tensor:
    """|act(gate_i)|: [T, n]."""
    assert context.gate is not None
    return context.gate.abs()

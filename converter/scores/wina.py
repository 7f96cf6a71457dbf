"""Magnitude of what an input channel adds to a linear's output."""

from __future__ import annotations

from torch import Tensor

from . import Context

SOURCE = (
    "WINA, arXiv 2505.19427",
    "s_j = |x_j| norm2(W[:, j])",
    "column norms of every linear, up and down included; no rotation",
)
NEEDS = ("x", "w")
PHASE = "in"
KIND = "linear"


def score(context: Context) -> Tensor:
    """|x_j| * norm2(W[:, j]): [T, d_in]."""
    assert context.x is not None and context.w is not None
    return context.x.abs() * context.w.norm(dim=0)

"""Magnitude of an input channel of one linear."""

from __future__ import annotations

from torch import Tensor

from . import Context

SOURCE = (
    "TEAL, arXiv 2408.14690",
    "s_j = |x_j|",
    "every position is masked; the paper leaves the first half of a prompt dense",
)
NEEDS = ("x",)
PHASE = "in"
KIND = "linear"


def score(context: Context) -> Tensor:
    """|x_j|: [T, d_in]."""
    assert context.x is not None
    return context.x.abs()

"""SNIP: size of the first-order change of the loss when a unit is removed. Needs a label, so an oracle."""

from __future__ import annotations

from torch import Tensor

from . import Context

SOURCE = (
    "Achieving Sparse Activation in Small Language Models, arXiv 2406.06562, SNIP",
    "s_i = |z_i dL/dz_i|; heads: |mean_d o_hd dL/do_hd|",
    "none",
)
NEEDS = ("z", "grad", "label")
HEAD_NEEDS = ("o", "o_grad", "label")
PHASE = "oracle"


def score(context: Context) -> Tensor:
    """|z_i g_i|: [T, n]."""
    assert context.z is not None and context.grad is not None
    return (context.z * context.grad).abs()


def score_heads(context: Context) -> Tensor:
    """|mean_d o_d g_d|: [T, H]."""
    assert context.o is not None and context.o_grad is not None
    return (context.o * context.o_grad).mean(-1).abs()

"""Signed gradient: how the loss falls as a unit's value grows. Needs a label, so an oracle."""

from __future__ import annotations

from torch import Tensor

from . import Context

SOURCE = (
    "Achieving Sparse Activation in Small Language Models, arXiv 2406.06562, gradient",
    "s_i = -dL/dz_i; heads: -mean_d dL/do_hd",
    "signs as keep the largest",
)
NEEDS = ("grad", "label")
HEAD_NEEDS = ("o_grad", "label")
PHASE = "oracle"


def score(context: Context) -> Tensor:
    """-g_i: [T, n]."""
    assert context.grad is not None
    return -context.grad


def score_heads(context: Context) -> Tensor:
    """-mean_d g_d: [T, H]."""
    assert context.o_grad is not None
    return -context.o_grad.mean(-1)

"""Magnitude of a neuron's value, or norm of a head's."""

from __future__ import annotations

from torch import Tensor

from . import Context

SOURCE = (
    "Achieving Sparse Activation in Small Language Models, arXiv 2406.06562, magnitude",
    "s_i = |z_i|; heads: norm2(o_h)",
    "none",
)
NEEDS = ("z",)
HEAD_NEEDS = ("o",)
PHASE = "post"


def score(context: Context) -> Tensor:
    """|z_i|: [T, n]."""
    assert context.z is not None
    return context.z.abs()


def score_heads(context: Context) -> Tensor:
    """norm2(o_h): [T, H]."""
    assert context.o is not None
    return context.o.norm(dim=-1)

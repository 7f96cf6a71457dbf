"""Magnitude of a neuron's contribution: the norm of the vector it adds to the block's output."""

from __future__ import annotations

from torch import Tensor

from . import Context

SOURCE = (
    "ReLU2 Wins, arXiv 2402.03804; the quantity that CETT cuts, Sparsing Law, arXiv 2411.02335",
    "s_i = norm(z_i w_down_i)",
    "heads by norm2(o_h), as DejaVu does, without the output projection",
)
NEEDS = ("z", "w_down")
HEAD_NEEDS = ("o",)
PHASE = "post"


def score(context: Context) -> Tensor:
    """|z_i| * norm2(w_down_i): [T, n]."""
    assert context.z is not None and context.w_down is not None
    return context.z.abs() * context.w_down.norm(dim=1)


def score_heads(context: Context) -> Tensor:
    """norm2(o_h): [T, H]."""
    assert context.o is not None
    return context.o.norm(dim=-1)

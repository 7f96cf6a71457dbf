"""Fisher: the squared first-order change of the loss when a unit is removed; the order of SNIP. Needs a label, so an
oracle.
"""

from __future__ import annotations

from torch import Tensor

from . import Context

SOURCE = (
    "Achieving Sparse Activation in Small Language Models, arXiv 2406.06562, Fisher",
    "s_i = (z_i dL/dz_i)^2; heads: (mean_d o_hd dL/do_hd)^2",
    "none",
)
NEEDS = ("z", "grad", "label")
HEAD_NEEDS = ("o", "o_grad", "label")
PHASE = "oracle"


def score(context: Context) -> Tensor:
    """(z_i g_i)^2: [T, n]."""
    assert context.z is not None and context.grad is not None
    return (context.z * context.grad).square()


def score_heads(context: Context) -> Tensor:
    """(mean_d o_d g_d)^2: [T, H]."""
    assert context.o is not None and context.o_grad is not None
    return (context.o * context.o_grad).mean(-1).square()

"""Integrated gradients: GxO averaged along the path that scales one layer's units from zero to their value. Needs a
label, so an oracle.
"""

from __future__ import annotations

from torch import Tensor

from . import Context

SOURCE = (
    "Achieving Sparse Activation in Small Language Models, arXiv 2406.06562, IG",
    "s_i = -z_i (1/K) sum_k dL/dz_i at k/K z, k = 1..K; heads: mean over d of the same",
    "zero baseline, right Riemann sum; one layer is scaled at a time, at every token by itself",
)
NEEDS = ("z", "grad_path", "label")
HEAD_NEEDS = ("o", "o_grad_path", "label")
PHASE = "oracle"


def score(context: Context) -> Tensor:
    """-z_i mean_k g_i(k/K z): [T, n]."""
    assert context.z is not None and context.grad_path is not None
    return -context.z * context.grad_path.mean(0)


def score_heads(context: Context) -> Tensor:
    """-mean_d o_d mean_k g_d(k/K o): [T, H]."""
    assert context.o is not None and context.o_grad_path is not None
    return -(context.o * context.o_grad_path.mean(0)).mean(-1)

"""Corrected GxO: GxO plus half the Cauchy-Schwarz bound on what the other layers' pruning can change. Needs a label, so
an oracle.
"""

from __future__ import annotations

from torch import Tensor

from . import Context

SOURCE = (
    "Achieving Sparse Activation in Small Language Models, arXiv 2406.06562, Corrected GxO",
    "s_i = -z_i g_i + 1/2 |z_i| norm2(g), the norm over the layer's units at the token; heads: -mean_d(o_h g_h) + 1/2 "
    "norm2(o_h) norm2_h(mean_d g_h)",
    "computed from one forward and one backward for all layers, where the released code regenerates per layer",
)
NEEDS = ("z", "grad", "label")
HEAD_NEEDS = ("o", "o_grad", "label")
PHASE = "oracle"


def score(context: Context) -> Tensor:
    """-z_i g_i + 1/2 |z_i| norm2(g): [T, n]."""
    z, g = context.z, context.grad
    assert z is not None and g is not None
    return 0.5 * z.abs() * g.norm(dim=-1, keepdim=True) - z * g


def score_heads(context: Context) -> Tensor:
    """-mean_d o_d g_d + 1/2 norm2(o_h) norm2 over heads of mean_d g_d: [T, H]."""
    o, g = context.o, context.o_grad
    assert o is not None and g is not None
    return 0.5 * o.norm(dim=-1) * g.mean(-1).norm(dim=-1, keepdim=True) - (o * g).mean(-1)

"""Share of inputs whose sign agrees with the gate row's: a guess at whether the gate is positive, from packed signs
alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import Context

SOURCE = (
    "SparseInfer, arXiv 2411.12692",
    "inactive when 100 * mismatches > alpha * matches of sign(x_j) and sign(w_gate_ij)",
    "given as the share of matches, so that the paper's rule is a threshold (`tau`); sign bits as stored, so +0 counts "
    "as positive",
)
NEEDS = ("x", "w_gate")
PHASE = "pre"


def score(context: Context) -> Tensor:
    """Matches of sign bits / d, in [0, 1]: [T, n]."""
    assert context.x is not None and context.w_gate is not None
    x, w = (torch.where(v.signbit(), -1.0, 1.0).to(v.dtype) for v in (context.x, context.w_gate))
    return (x @ w.T / x.shape[-1] + 1) / 2


def tau(alpha: float, hidden: int) -> float:
    """The threshold for which `score > tau` is SparseInfer's rule at `alpha` (about 100), for d = `hidden` inputs;
    halfway between two counts.
    """
    least = 100 * hidden / (100 + alpha)  # matches m are enough when 100 (d - m) <= alpha m
    return (math.ceil(least - 1e-9) - 0.5) / hidden

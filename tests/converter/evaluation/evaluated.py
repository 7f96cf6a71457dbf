"""A plan with neurons and input channels on a tiny Llama, and windows of tokens for it."""

from __future__ import annotations

import torch
from models import VOCAB

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Plan, SitePlan, Threshold, uniform_tau
from sparsegate.converter.text.windows import Batches

D, N, R = 64, 176, 6
NEVER = uniform_tau(float("inf"), N)


def mixed_plan() -> Plan:
    """Neurons of layer 0, and input channels of two linears of layer 1 that differ in size."""
    return {
        Site(0): SitePlan(gate=Threshold("gate", uniform_tau(0.25, N), 0.5)),
        Site(1, kind="linear:q_proj"): SitePlan(gate=Threshold("input", uniform_tau(0.5, D), 0.5)),
        Site(1, kind="linear:down_proj"): SitePlan(gate=Threshold("input", uniform_tau(0.05, N), 0.5)),
    }


def text_windows(rows: int = 5, length: int = 24) -> Batches:
    tokens = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(7))
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[-1, 9:] = False
    return Batches(tokens, mask)

"""Plans of input channels and of thresholds with a residual, and logits of a model on fixed tokens."""

from __future__ import annotations

from typing import Any

import torch
from models import VOCAB
from torch import Tensor

from sparsegate.converter.arch import Arch
from sparsegate.converter.arch.shapes import linear_shapes
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import LINEARS, Plan, Residual, SitePlan, Threshold

TOKENS = torch.randint(3, VOCAB, (2, 26), generator=torch.Generator().manual_seed(0))
D, N, R = 64, 176, 5


def linear(layer: int, name: str) -> Site:
    return Site(layer, kind=f"linear:{name}")


def input_plan(arch: Arch, config: Any, names: tuple[str, ...] = LINEARS, seed: int = 0) -> Plan:
    """Another tau at every channel of every linear, near the size of its inputs."""
    g, found = torch.Generator().manual_seed(seed), {}
    for layer in range(2):
        for name, (_, width) in linear_shapes(arch, config).items():
            if name in names:
                found[linear(layer, name)] = SitePlan(
                    gate=Threshold("input", (0.1 if name == "down_proj" else 0.5) * torch.rand(width, generator=g), 0.5)
                )
    return found


def residual_entry(seed: int = 0) -> SitePlan:
    g = torch.Generator().manual_seed(seed)
    tau, fc1, residual = (
        0.2 + 0.3 * torch.rand(N, generator=g),
        torch.randn(R, D, generator=g) / 8,
        torch.randn(R, D, generator=g) / 4,
    )
    return SitePlan(gate=Threshold("gate", tau, 0.5), residual=Residual(residual, fc1))


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens).logits

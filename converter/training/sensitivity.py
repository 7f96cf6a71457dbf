"""What sites are weighed by in training: the size of their inputs, and what noise in their outputs costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arch import Arch
from ..arch.site import Site
from ..modeling.losses import kl_divergence

_NOISE = 0.01  # relative energy


@torch.no_grad()
def input_rms(model: Any, arch: Arch, sites: Sequence[Site], tokens: Tensor) -> dict[Site, float]:
    """Root mean square of the feed-forward inputs by site, on windows [N, S]."""
    found: dict[Site, float] = {}

    def hook(site: Site) -> Any:
        return lambda module, inputs: found.__setitem__(
            site, float(inputs[0].float().square().mean().sqrt().clamp_min(1e-6))
        )

    handles = [model.get_submodule(arch.ffn_module(site.layer)).register_forward_pre_hook(hook(site)) for site in sites]
    try:
        model(input_ids=tokens.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def noise_costs(model: Any, arch: Arch, sites: Sequence[Site], tokens: Tensor) -> dict[Site, float]:
    """Nats of divergence per unit of relative noise energy in one layer's feed-forward output, by site: KL / _NOISE
    under Gaussian noise of energy _NOISE * |y|^2 a token, on windows [N, S].
    """
    tokens = tokens.to(model.device)
    dense = model(input_ids=tokens, use_cache=False).logits
    generator = torch.Generator().manual_seed(0)

    def hook(module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        noise = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
        return y + noise * (_NOISE**0.5 * y.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))

    found = {}
    for site in sites:
        handle = model.get_submodule(arch.ffn_module(site.layer)).register_forward_hook(hook)
        try:
            found[site] = float(kl_divergence(dense, model(input_ids=tokens, use_cache=False).logits)) / _NOISE
        finally:
            handle.remove()
    return found

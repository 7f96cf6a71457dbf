"""What sites are weighed by in training: the size of their inputs, and what noise in their outputs costs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..arch import Arch
from ..arch.site import Site
from ..modeling.losses import kl_divergence
from ..modeling.taps import tapped_inputs, tapped_outputs

_NOISE = 0.01  # relative energy


@torch.no_grad()
def input_rms(model: Any, arch: Arch, sites: Sequence[Site], tokens: Tensor) -> dict[Site, float]:
    """Root mean square of the feed-forward inputs by site, on windows [N, S]."""
    rms: dict[Site, float] = {}

    def note(site: Site, x: Tensor) -> None:
        rms[site] = float(x.float().square().mean().sqrt().clamp_min(1e-6))

    with tapped_inputs({model.get_submodule(arch.ffn_module(site.layer)): partial(note, site) for site in sites}):
        model(input_ids=tokens.to(model.device), use_cache=False)
    return rms


@torch.no_grad()
def noise_costs(model: Any, arch: Arch, sites: Sequence[Site], tokens: Tensor) -> dict[Site, float]:
    """Nats of divergence per unit of relative noise energy in one layer's feed-forward output, by site: KL / _NOISE
    under Gaussian noise of energy _NOISE * |y|^2 a token, on windows [N, S].
    """
    tokens = tokens.to(model.device)
    dense = model(input_ids=tokens, use_cache=False).logits
    generator = torch.Generator().manual_seed(0)

    def noisy(y: Tensor) -> Tensor:
        noise = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
        return y + noise * (_NOISE**0.5 * y.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))

    costs = {}
    for site in sites:
        with tapped_outputs({model.get_submodule(arch.ffn_module(site.layer)): noisy}):
            costs[site] = float(kl_divergence(dense, model(input_ids=tokens, use_cache=False).logits)) / _NOISE
    return costs

"""What sites are weighed by in training: the size of their inputs, and what noise in their outputs costs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..arch import Arch
from ..arch.site import Site
from ..modeling.fisher import fisher_gradients
from ..modeling.taps import tapped_inputs

_DRAWS = 4


@torch.no_grad()
def input_rms(model: Any, arch: Arch, sites: Sequence[Site], tokens: Tensor) -> dict[Site, float]:
    """Root mean square of the feed-forward inputs by site, on windows [N, S]."""
    rms: dict[Site, float] = {}

    def note(site: Site, x: Tensor) -> None:
        rms[site] = float(x.float().square().mean().sqrt().clamp_min(1e-6))

    with tapped_inputs({model.get_submodule(arch.ffn_module(site.layer)): partial(note, site) for site in sites}):
        model(input_ids=tokens.to(model.device), use_cache=False)
    return rms


def noise_costs(model: Any, arch: Arch, sites: Sequence[Site], tokens: Tensor) -> dict[Site, float]:
    """Nats of divergence per unit of relative noise energy in one layer's feed-forward output, by site, on windows
    [N, S]: KL / e under Gaussian noise of energy e |y|^2 a token, as e goes to 0.

    That is E[|g|^2] |y|^2 / (2 d) a token, g [d] the gradients of `fisher_gradients` at y [d]. One pass and _DRAWS
    backward passes serve all layers.
    """
    costs = dict.fromkeys(sites, 0.0)
    modules = [model.get_submodule(arch.ffn_module(site.layer)) for site in sites]
    generator = torch.Generator(model.device).manual_seed(0)
    for window in tokens.to(model.device):
        for outputs, gradients in fisher_gradients(model, modules, window[None], _DRAWS, generator):
            for site, y, gradient in zip(sites, outputs, gradients, strict=True):
                energy = y.float().square().sum(-1) * gradient.float().square().sum(-1)
                costs[site] += float(energy.sum()) / (2 * y.shape[-1] * _DRAWS * tokens.numel())
    return costs

"""What noise in a site's output costs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from selection_cases import (
    Load,
    logits,
    windows,
)
from torch import Tensor

from sparsegate.converter.arch import Site
from sparsegate.converter.modeling.losses import kl_divergence
from sparsegate.converter.modeling.taps import tapped_inputs, tapped_outputs
from sparsegate.converter.training.sensitivity import noise_costs

ENERGY = 4e-4


def with_noise(seed: int, y: Tensor) -> Tensor:
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    return y + noise * (ENERGY**0.5 * y.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_noise_costs_equal_what_noise_costs(load: Load, model_type: str) -> None:
    """One layer at a time, by the divergence of the whole model."""
    model, arch, _ = load(model_type)
    sites, tokens = [Site(0), Site(1)], windows(24)
    estimated, dense = noise_costs(model, arch, sites, tokens), logits(model, tokens)
    assert list(estimated) == sites
    for site in sites:
        measured = 0.0
        for seed in range(8):
            with tapped_outputs({model.get_submodule(arch.ffn_module(site.layer)): partial(with_noise, seed)}):
                measured += float(kl_divergence(dense, logits(model, tokens))) / ENERGY / 8
        assert estimated[site] == pytest.approx(measured, rel=0.1)
    assert torch.equal(logits(model, tokens), dense)


def test_noise_costs_are_drawn_once_and_leave_the_model_alone(load: Load) -> None:
    model, arch, _ = load("llama")
    before = [parameter.requires_grad for parameter in model.parameters()]
    assert noise_costs(model, arch, [Site(1)], windows(4)) == noise_costs(model, arch, [Site(1)], windows(4))
    assert not any(module._forward_hooks for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_noise_costs_run_every_block_once_a_window(load: Load) -> None:
    """However many sites there are."""
    model, arch, _ = load("llama")
    calls: list[Tensor] = []
    with tapped_inputs(dict.fromkeys(model.get_decoder().layers, calls.append)):
        for sites in ([Site(0)], [Site(0), Site(1)]):
            calls.clear()
            noise_costs(model, arch, sites, windows(4))
            assert len(calls) == 4 * len(model.get_decoder().layers)

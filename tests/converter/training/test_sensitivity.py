"""What noise in a site's output costs."""

from __future__ import annotations

import pytest
from selection_cases import (
    Load,
    windows,
)

from sparsegate.converter.arch import Site
from sparsegate.converter.training import sensitivity
from sparsegate.converter.training.sensitivity import noise_costs


def test_noise_costs_more_where_the_output_is_larger(load: Load) -> None:
    model, arch, _ = load("llama")
    sites, tokens = [Site(0), Site(1)], windows(4)
    before = noise_costs(model, arch, sites, tokens)
    assert list(before) == sites and min(before.values()) > 0 and noise_costs(model, arch, sites, tokens) == before
    for site in sites:
        weight = model.model.layers[site.layer].mlp.down_proj.weight.data
        weight *= 4
        larger = noise_costs(model, arch, sites, tokens)[site]
        weight /= 16
        smaller = noise_costs(model, arch, sites, tokens)[site]
        weight *= 4
        assert larger > before[site] > 2 * smaller, "the output is a larger or a smaller part of the residual stream"
    assert not any(module._forward_hooks for module in model.modules())


def test_noise_costs_are_per_unit_of_energy(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model, arch, _ = load("llama")
    at = []
    for energy in (0.0004, 0.0016):
        monkeypatch.setattr(sensitivity, "_NOISE", energy)
        at.append(noise_costs(model, arch, [Site(0), Site(1)], windows(4)))
    assert at[0] == pytest.approx(at[1], rel=0.1)

"""Sizes of an architecture's spaces, by layer where the configuration lists them, and the sites of experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from sparsegate.converter.arch import SPACES, Arch, load_arch, supported
from sparsegate.converter.arch.shapes import linear_rows, linear_shapes
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.cost import mlp_cost, network_size, site_parameters, site_units
from sparsegate.converter.checkpoint.plan import Plan, SitePlan, Threshold, uniform_tau
from sparsegate.converter.onnx_export.emit import emissions
from sparsegate.runtime_onnx.errors import InputError

D, UNITS = 8, [24, 40, 16]


def config(**fields: Any) -> SimpleNamespace:
    """A llama of three layers, two query heads and one key-value head."""
    shared = {"num_hidden_layers": 3, "hidden_size": D, "vocab_size": 90, "hidden_act": "silu"}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return SimpleNamespace(**{**shared, **heads, "intermediate_size": UNITS, **fields})


def toy(**spaces: dict[str, str]) -> Arch:
    """A llama with further spaces."""
    raw = load_arch("llama").model_dump()
    return Arch.model_validate(raw | {"spaces": raw["spaces"] | spaces})


def test_a_size_may_differ_between_layers() -> None:
    arch = load_arch("llama")
    assert [arch.size(config(), "units", layer) for layer in range(3)] == UNITS
    assert [network_size(arch, config(), layer).weights for layer in range(3)] == [3 * D * units for units in UNITS]
    shapes = linear_shapes(arch, config(), 1)
    assert shapes["up_proj"] == (40, D) and shapes["down_proj"] == (D, 40) and shapes["k_proj"] == (4, D)
    rows = linear_rows(load_arch("phi3"), config(), 2)["mlp.gate_up_proj"]
    assert rows == {"gate_proj": slice(0, 16), "up_proj": slice(16, 32)}


def test_what_is_needed_for_every_layer_must_not_differ() -> None:
    arch = load_arch("llama")
    assert arch.size(config(intermediate_size=[24, 24, 24]), "units") == 24
    with pytest.raises(InputError, match=r"intermediate_size must be the same in every layer here, got \[24, 40, 16\]"):
        arch.size(config(), "units")
    with pytest.raises(InputError, match="intermediate_size must have a size for each of 3 layers, got 2"):
        arch.size(config(intermediate_size=[24, 40]), "units", 0)


def test_a_plan_is_counted_by_the_sizes_of_its_layers() -> None:
    """Layer 1 keeps half of its neurons, layer 2 half of its down projection's inputs."""
    arch = load_arch("llama")
    down = Site(2, kind="linear:down_proj")
    plan: Plan = {
        Site(1): SitePlan((), Threshold("gate", uniform_tau(0.0, 40), 0.5)),
        down: SitePlan((), Threshold("input", uniform_tau(0.0, 16), 0.5)),
    }
    assert site_units(plan, arch, config()) == {Site(1): 40, down: 16}
    assert site_parameters(plan, arch, config()) == {Site(1): 3 * 40 * D, down: 16 * D}
    assert mlp_cost(plan, arch, config()) == pytest.approx((1 + (1 + 2 * 0.5) / 3 + (2 + 0.5) / 3) / 3)


def test_a_plan_is_emitted_by_the_sizes_of_its_layers() -> None:
    plan: Plan = {
        Site(1): SitePlan((), Threshold("gate", uniform_tau(0.0, 40), 0.5)),
        Site(2, kind="linear:o_proj"): SitePlan((), Threshold("input", uniform_tau(0.0, D), 0.5)),
    }
    emitted = emissions(plan, load_arch("llama"), config())
    assert {site: emission.tensors["tau"].shape for site, emission in emitted.items()} == {
        Site(1): (40,),
        Site(2, kind="linear:o_proj"): (D,),
    }
    with pytest.raises(InputError, match=r"tau must have shape \[40\], got \[24\]"):
        emissions({Site(1): SitePlan((), Threshold("gate", uniform_tau(0.0, 24), 0.5))}, load_arch("llama"), config())


def test_attention_has_spaces() -> None:
    for model_type in supported():
        arch = load_arch(model_type)
        assert set(SPACES) <= set(arch.spaces)
        assert arch.size(config(), "heads") == 2 and arch.size(config(), "kv_heads") == 1
        assert arch.head_dim(config()) == 4 and arch.head_dim(config(head_dim=6)) == 6
    raw = load_arch("llama").model_dump()
    with pytest.raises(ValidationError, match="got no kv_heads"):
        Arch.model_validate(raw | {"spaces": {name: raw["spaces"][name] for name in SPACES if name != "kv_heads"}})


def test_experts_are_sites() -> None:
    arch, experts = toy(experts={"config": "num_local_experts"}), config(num_local_experts=2)
    assert arch.sites(experts) == [Site(layer, expert) for layer in range(3) for expert in range(2)]
    assert arch.sites(experts)[3].key == "layers.1.experts.1.ffn"
    assert load_arch("llama").sites(config()) == [Site(0), Site(1), Site(2)]


def test_networks_have_two_matrices_or_three() -> None:
    assert (load_arch("phi").matrices, load_arch("llama").matrices, load_arch("phi3").matrices) == (2, 3, 3)

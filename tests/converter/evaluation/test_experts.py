"""Neurons inside experts (f 21) against a dense computation of all experts by hand."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from sparsegate.converter.arch.site import Site
from sparsegate.converter.evaluation.analysis.experts import (
    ExpertActivity,
    expert_modules,
    expert_sites,
    measure,
    swapped,
)
from sparsegate.converter.text.windows import Batches
from sparsegate.runtime_onnx.errors import InputError

D, N, E, K, LAYERS, VOCAB = 32, 40, 8, 2, 2, 61


def expected_active(chosen: int, experts: int, sparsity: float) -> float:
    """(k / E) (1 - s): the active share of all neurons when k of E experts run and each has the share s of zeros."""
    return chosen / experts * (1 - sparsity)


def make_mixture(seed: int = 0) -> Any:
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=N,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=E,
        num_experts_per_tok=K,
        max_position_embeddings=64,
    )
    model = MixtralForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator)
                    * (1 if "embed" in name else parameter.shape[-1] ** -0.5)
                )
    return model


def make_windows(windows: int, length: int = 32) -> Batches:
    tokens = torch.randint(0, VOCAB, (windows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, length // 2 :] = False
    return Batches(tokens, mask)


def everywhere(model: Any, activation: str = "drelu") -> dict[Site, str]:
    return dict.fromkeys(expert_sites(model), activation)


def by_hand(
    module: Any, activations: dict[Site, str], layer: int, x: Tensor, chosen: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All experts on all tokens: output [T, d], the products z [E, T, n] and who is routed where [E, T]."""
    products, out, routed = [], torch.zeros_like(x), []
    for expert in range(E):
        w_gate, w_up = module.gate_up_proj[expert][:N], module.gate_up_proj[expert][N:]
        gate, up = x @ w_gate.T, x @ w_up.T
        z = (
            gate.clamp(min=0) * up.clamp(min=0)
            if activations.get(Site(layer, expert)) == "drelu"
            else gate * torch.sigmoid(gate) * up
        )
        weight = (weights * (chosen == expert)).sum(-1)
        out = out + weight[:, None] * (z @ module.down_proj[expert].T)
        products.append(z)
        routed.append((chosen == expert).any(-1))
    return out, torch.stack(products), torch.stack(routed)


@torch.no_grad()
def test_experts_equal_a_computation_of_all_of_them() -> None:
    """Dense, all experts swapped, and one of them swapped; counts too."""
    model, batches = make_mixture(), make_windows(3)
    module = expert_modules(model)[1]
    calls: list[tuple[Tensor, ...]] = []
    module.register_forward_pre_hook(lambda _, given: calls.append(given))
    stock = model(input_ids=batches.tokens).logits
    for activations in ({}, everywhere(model), {Site(1, 3): "drelu"}):
        seen: dict[Site, tuple[Tensor, Tensor]] = {}
        calls.clear()
        with swapped(model, activations, lambda site, rows, z, kept=seen: kept.update({site: (rows, z)})):
            logits = model(input_ids=batches.tokens).logits
            out = module(*calls[0])
        expected, products, routed = by_hand(module, activations, 1, *calls[0])
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
        for expert in range(E):
            rows, z = seen[Site(1, expert)]
            assert rows.sort().values.tolist() == routed[expert].nonzero()[:, 0].tolist()
            torch.testing.assert_close(z, products[expert, rows], rtol=0, atol=1e-6)
        difference = float((logits - stock).abs().max())
        assert difference > 1e-3 if activations else difference < 1e-4
    assert not [name for name in vars(module) if name == "forward"]
    assert torch.equal(model(input_ids=batches.tokens).logits, stock)


def test_counts_equal_brute_force_and_leave_padding_out() -> None:
    model, batches = make_mixture(), make_windows(3)
    calls: dict[int, tuple[Tensor, ...]] = {}
    for layer, module in expert_modules(model).items():
        module.register_forward_pre_hook(lambda _, given, k=layer: calls.update({k: given}))
    activity = measure(model, batches, everywhere(model))
    real, total = batches.mask.flatten(), 0
    for layer, module in expert_modules(model).items():
        _, products, routed = by_hand(module, everywhere(model), layer, *calls[layer])
        for expert in range(E):
            found, here = activity.sites[Site(layer, expert)], routed[expert] & real
            assert found == ExpertActivity(batches.count, int(here.sum()), int((products[expert][here] > 0).sum()), N)
            total += found.nonzero
    assert activity.active == pytest.approx(total / (batches.count * LAYERS * E * N), abs=1e-15)
    assert (
        sum(site.routed for site in activity.sites.values())
        == LAYERS * K * batches.count
        < LAYERS * K * batches.tokens.numel()
    )


def test_f21_active_share_of_exchangeable_experts() -> None:
    """(k/E)(1-s) within sampling error; it fails where a busy expert is a silent one."""
    model, batches = make_mixture(), make_windows(48)
    activity = measure(model, batches, everywhere(model))
    sites = activity.sites.values()
    share, density = torch.tensor([site.share for site in sites]), torch.tensor([site.density for site in sites])
    error = float(share.std() * density.std()) / math.sqrt(
        len(share)
    )  # of the mean of share times density, the two independent
    assert abs(activity.active - K / E * (1 - activity.sparsity)) < 4 * error < 0.03 * activity.active
    assert 0.2 < float(density.mean()) < 0.3, (
        "gates and ups of random weights are positive for half of the tokens, together for a quarter"
    )

    silu = measure(model, batches)
    assert silu.active == pytest.approx(K / E, abs=1e-12) and silu.sparsity == pytest.approx(0, abs=1e-12)

    for module in expert_modules(model).values():
        module.gate_up_proj.data[0] = 0
    for block in model.model.layers:
        block.mlp.gate.weight.data[0] *= 10
    uneven = measure(model, batches, everywhere(model))
    assert abs(uneven.active - K / E * (1 - uneven.sparsity)) > 0.08 * uneven.active


@torch.no_grad()
def test_f21_masking_in_experts_that_a_token_is_not_routed_to_changes_nothing() -> None:
    model, batches = make_mixture(), make_windows(2)
    chosen: dict[int, Tensor] = {}
    for layer, module in expert_modules(model).items():
        module.register_forward_pre_hook(lambda _, given, k=layer: chosen.update({k: given[1]}))
    activations = everywhere(model)
    with swapped(model, activations):
        plain = model(input_ids=batches.tokens).logits
    generator = torch.Generator().manual_seed(5)
    masks = {site: torch.rand(batches.tokens.numel(), N, generator=generator) < 0.5 for site in activations}
    routed = {site: (chosen[site.layer] == site.expert).any(-1) for site in activations}
    assert all(0 < int(here.sum()) < len(here) for here in routed.values())

    def outside(site: Site, rows: Tensor, z: Tensor) -> Tensor:
        return (masks[site] | routed[site][:, None])[rows]

    def inside(victim: Site, site: Site, rows: Tensor, z: Tensor) -> Tensor | None:
        return masks[site][rows] if site == victim else None

    with swapped(model, activations, outside):
        assert torch.equal(model(input_ids=batches.tokens).logits, plain)
    for victim in (Site(0, 0), Site(1, 7)):
        with swapped(model, activations, partial(inside, victim)):
            assert not torch.equal(model(input_ids=batches.tokens).logits, plain)


@torch.no_grad()
def test_f21_an_expert_without_tokens_can_lose_everything() -> None:
    """Weights and all neurons of experts that no token of the input reaches; then of one that some reach."""
    model, batches = make_mixture(), make_windows(1, 3)
    activations = everywhere(model)
    with swapped(model, activations):
        plain = model(input_ids=batches.tokens).logits
    reached = {
        site
        for site, found in measure(
            model, Batches(batches.tokens, torch.ones_like(batches.mask)), activations
        ).sites.items()
        if found.routed
    }
    idle = set(activations) - reached
    assert idle and reached
    for sites, equal in ((idle, True), ({min(reached)}, False)):
        changed = make_mixture()
        for site in sites:
            expert_modules(changed)[site.layer].gate_up_proj[site.expert] = torch.nan if equal else 0.0
        with swapped(
            changed,
            activations,
            lambda site, rows, z, sites=sites: torch.zeros(N, dtype=torch.bool) if site in sites else None,
        ):
            assert torch.equal(changed(input_ids=batches.tokens).logits, plain) == equal


@torch.no_grad()
def test_f21_router_logits_of_layer_0_stay_those_of_the_dense_model() -> None:
    model, batches = make_mixture(), make_windows(2)
    logits: dict[int, list[Tensor]] = {0: [], 1: []}
    for layer, block in enumerate(model.model.layers):
        block.mlp.gate.register_forward_hook(lambda _, __, out, k=layer: logits[k].append(out[0]))
    model(input_ids=batches.tokens)
    with swapped(model, everywhere(model)):
        model(input_ids=batches.tokens)
    assert torch.equal(*logits[0])
    assert (logits[1][0] - logits[1][1]).abs().max() > 1e-2, (
        "behind swapped experts the next router must see another input"
    )


def test_fatrelu_in_one_expert() -> None:
    model = make_mixture()
    module = expert_modules(model)[0]
    x, chosen = torch.randn(5, D, generator=torch.Generator().manual_seed(2)), torch.tensor([[2, 0]] * 5)
    seen: dict[Site, Tensor] = {}
    with torch.no_grad(), swapped(model, {Site(0, 2): "fatrelu(0.5)"}, lambda site, rows, z: seen.update({site: z})):
        module(x, chosen, torch.full((5, 2), 0.5))
    gate, up = (x @ module.gate_up_proj[2].T).chunk(2, dim=-1)
    torch.testing.assert_close(seen[Site(0, 2)], torch.where(gate > 0.5, gate, 0.0) * up)
    gate, up = (x @ module.gate_up_proj[0].T).chunk(2, dim=-1)
    torch.testing.assert_close(seen[Site(0, 0)], F.silu(gate) * up)


def test_what_is_refused() -> None:
    model = make_mixture()
    with (
        pytest.raises(InputError, match=re.escape("must be an expert of the model, got layers.1.experts.8.ffn")),
        swapped(model, {Site(1, 8): "drelu"}),
    ):
        pass
    with pytest.raises(InputError, match="must hold a token, got none"):
        measure(model, Batches(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.bool)))
    small = LlamaConfig(vocab_size=31, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(InputError, match=r"must have experts in 3-D weights .* got none in LlamaForCausalLM"):
        expert_modules(LlamaForCausalLM(small))
    module = expert_modules(model)[0]
    module.has_bias = True
    with pytest.raises(
        InputError, match=r"without biases, got MixtralExperts with gate_up_proj \[8, 80, 32\] at layer 0"
    ):
        expert_modules(model)

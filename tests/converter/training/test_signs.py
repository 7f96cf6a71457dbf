"""Orientation: the model's function stays, the choice is brute force's, and dReLU keeps more of a neuron's energy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import make_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from sparsegate.converter.arch import load_arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.training.signs import orient
from sparsegate.runtime_onnx.errors import InputError

TOKENS = torch.randint(
    3, 290, (11, 24), generator=torch.Generator().manual_seed(4)
)  # more windows than go through at once
CASES = {
    "llama": ("llama", {}),
    "biases": ("llama", {"mlp_bias": True}),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", {}),
}
ACTS = {"silu": F.silu, "gelu_tanh": lambda v: F.gelu(v, approximate="tanh")}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A model, its architecture and its activation."""
    model_type, changes = CASES[request.param]
    folder = make_model(model_type, tmp_path_factory.mktemp("orientation") / "model", **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    arch = load_arch(model_type)
    return model, arch, arch.activation(model.config)


@torch.no_grad()
def logits(model) -> Tensor:
    return model(input_ids=TOKENS).logits


@torch.no_grad()
def energies(model, activation: str) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """By layer: each neuron's energy where gate and up are positive, where gate is positive and up is not, and all of
    it; [n] fp64, from the matrices.
    """
    found = {}
    for layer, block in enumerate(model.model.layers):
        seen: list[Tensor] = []
        handle = block.mlp.register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(given[0].flatten(0, 1).double())
        )
        model(input_ids=TOKENS)
        handle.remove()
        rows = [list(block.mlp.gate_up_proj.parameters())] if hasattr(block.mlp, "gate_up_proj") else []
        pairs = (
            [p.chunk(2) for p in rows[0]]
            if rows
            else list(zip(block.mlp.gate_proj.parameters(), block.mlp.up_proj.parameters(), strict=True))
        )
        g, u = (F.linear(seen[0], *(p[k].double() for p in pairs)) for k in (0, 1))
        z = ACTS[activation](g) * u
        found[layer] = tuple(
            (z.square() * side).sum(0) for side in ((g > 0) & (u > 0), (g > 0) & (u <= 0), torch.ones_like(z))
        )
    return found


def up_and_down(model, layer: int) -> tuple[list[Tensor], Tensor]:
    mlp = model.model.layers[layer].mlp
    ups = (
        [p[-176:] for p in mlp.gate_up_proj.parameters()]
        if hasattr(mlp, "gate_up_proj")
        else list(mlp.up_proj.parameters())
    )
    return [p.detach().clone() for p in ups], mlp.down_proj.weight.detach().clone()


def test_the_model_stays_and_signs_are_brute_forces(case) -> None:
    model, arch, activation = copy.deepcopy(case[0]), *case[1:]
    before, wanted, weights = logits(model), energies(model, activation), [up_and_down(model, k) for k in range(2)]
    others = {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if not any(part in name for part in ("up_proj", "down_proj.weight"))
    }
    kept = orient(model, arch, activation, TOKENS)
    assert list(kept) == [Site(0), Site(1)]
    assert float((logits(model) - before).abs().max()) <= 1e-6 * float(before.abs().max())
    for layer, (positive, negative, total) in wanted.items():
        flipped = negative > positive
        assert 0.2 < float(flipped.float().mean()) < 0.8
        signs = torch.where(flipped, -1.0, 1.0)
        (ups, down), (ups_now, down_now) = weights[layer], up_and_down(model, layer)
        assert all(
            torch.equal(now, old * signs.view(-1, *[1] * (old.dim() - 1)))
            for now, old in zip(ups_now, ups, strict=True)
        ) and torch.equal(down_now, down * signs)
        share = float(torch.maximum(positive, negative).sum() / total.sum())
        assert kept[Site(layer)] == pytest.approx(share, rel=1e-5)
        opened = float((positive + negative).sum() / total.sum())
        assert kept[Site(layer)] >= 0.5 * opened and kept[Site(layer)] > float(positive.sum() / total.sum())
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in others.items())
    if hasattr(model.model.layers[0].mlp, "gate_up_proj"):
        old, now = (m.model.layers[0].mlp.gate_up_proj.weight[:176] for m in (case[0], model))
        assert torch.equal(old, now), "gate keeps its signs"


def test_a_second_call_flips_nothing(case) -> None:
    model, arch, activation = copy.deepcopy(case[0]), *case[1:]
    kept = orient(model, arch, activation, TOKENS)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert orient(model, arch, activation, TOKENS) == pytest.approx(kept, rel=1e-5)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_drelu_keeps_what_is_returned(case) -> None:
    """Control: the unoriented model keeps less energy with the negative side dropped."""
    model, arch, activation = copy.deepcopy(case[0]), *case[1:]
    kept = orient(model, arch, activation, TOKENS)
    for layer, (positive, _, total) in energies(model, activation).items():
        assert float(positive.sum() / total.sum()) == pytest.approx(kept[Site(layer)], rel=1e-5)
    for layer, (positive, _, total) in energies(case[0], activation).items():
        assert float(positive.sum() / total.sum()) < 0.8 * kept[Site(layer)]


def test_only_the_sites_named(case) -> None:
    model, arch, activation = copy.deepcopy(case[0]), *case[1:]
    whole = copy.deepcopy(case[0])
    orient(whole, arch, activation, TOKENS)
    assert list(orient(model, arch, activation, TOKENS, [Site(1)])) == [Site(1)]
    for name, p in model.named_parameters():
        wanted = whole if "layers.1." in name else case[0]
        assert torch.equal(p, dict(wanted.named_parameters())[name])
    assert not torch.equal(up_and_down(whole, 0)[1], up_and_down(model, 0)[1])


def test_a_plain_network_is_left_alone(tiny_model: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("phi"), dtype=torch.float32).eval()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert orient(model, load_arch("phi"), "gelu_tanh", TOKENS) == {}
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_after_the_swap_signs_are_not_free(case) -> None:
    model, arch, activation = copy.deepcopy(case[0]), *case[1:]
    model.model.layers[1].mlp.swapped = "drelu"
    assert list(orient(model, arch, activation, TOKENS, [Site(0)])) == [Site(0)]
    with pytest.raises(InputError, match=r"layers\.1\.ffn must be oriented .* Orient before the swap\.$"):
        orient(model, arch, activation, TOKENS)

"""Low-rank updates against W + alpha / rank B A by hand, merging, freezing, resumable names, and passes in bf16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsegate.converter.checkpoint.stage import Header
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.modeling.lora import add_lora, linear_names, lora_tensors, merge_lora, plain_state
from sparsegate.converter.text.windows import Batches
from sparsegate.converter.training.loop import train
from sparsegate.converter.training.settings import Settings
from sparsegate.runtime_onnx.errors import InputError

TOKENS = torch.randint(3, 290, (6, 10), generator=torch.Generator().manual_seed(0))
RANK, ALPHA = 3, 6.0
Load = Callable[[], Any]


@pytest.fixture(name="load")
def _load(tiny_model: Callable[[str], Path]) -> Load:
    return lambda: load_dense(tiny_model("phi3")).requires_grad_(False)  # fused projections


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


@torch.no_grad()
def shake(tensors: dict[str, Tensor]) -> None:
    g = torch.Generator().manual_seed(4)
    for tensor in tensors.values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=g)


def names_of(model: Any) -> list[str]:
    return linear_names(model, "model.layers.")


def test_linear_maps_of_the_blocks(load: Load) -> None:
    parts = ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert set(names_of(load())) == {f"model.layers.{layer}.{part}" for layer in range(2) for part in parts}
    assert set(linear_names(load())) - set(names_of(load())) == {"lm_head"}


def test_update_by_hand_merged_and_parametrised_agree(load: Load) -> None:
    model, plain = load(), load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = names_of(model)
    tensors = add_lora(model, names, RANK, ALPHA, seed=0)
    assert torch.equal(logits(model), logits(plain)), "an update is 0 at first"
    shake(tensors)
    expected = load()
    for name in names:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        weight = expected.get_submodule(name).weight
        assert a.shape == (RANK, weight.shape[1]) and b.shape == (weight.shape[0], RANK)
        weight.data += (ALPHA / RANK) * (b.detach() @ a.detach())
        original = model.get_submodule(name).parametrizations.weight.original
        assert torch.equal(original, before[f"{name}.weight"]) and not original.requires_grad, "the base is as it was"
    found = logits(model)
    assert float((found - logits(expected)).abs().max()) < 1e-5
    assert float((found - logits(plain)).abs().max()) > 0.1, "the update does something"
    kinds = {name: type(module) for name, module in plain.named_modules()}
    assert plain_state(model).keys() == before.keys()
    merge_lora(model)
    assert torch.equal(logits(model), found)
    assert {name: type(module) for name, module in model.named_modules()} == kinds and not lora_tensors(model)
    merged = plain_state(model)
    assert merged.keys() == before.keys()
    assert {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])} == {
        f"{name}.weight" for name in names
    }
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_start_depends_on_seed_and_name_alone(load: Load) -> None:
    model, other, third = load(), load(), load()
    first = add_lora(model, names_of(model), RANK, ALPHA, seed=0)
    fewer = add_lora(other, names_of(other)[:1:-1], RANK, ALPHA, seed=0)
    seeded = add_lora(third, names_of(third), RANK, ALPHA, seed=1)
    assert set(fewer) < set(first) and all(torch.equal(first[name], tensor) for name, tensor in fewer.items())
    drawn = torch.cat(
        [tensor.detach().flatten() * tensor.shape[1] ** 0.5 for name, tensor in first.items() if name.endswith("a")]
    )
    assert abs(float(drawn.std()) - 1) < 0.05 and abs(float(drawn.mean())) < 0.05
    assert not any(torch.equal(first[name], seeded[name]) for name in first if name.endswith("a"))
    assert not any(bool(tensor.any()) for name, tensor in first.items() if name.endswith("b"))


@pytest.mark.parametrize("kind", ["unknown", "norm", "twice", "none"])
def test_what_cannot_be_updated(kind: str, load: Load) -> None:
    model = load()
    names = {"unknown": ["model.layers.0.mlp.up"], "norm": ["model.norm"], "twice": names_of(model)[:1], "none": []}[
        kind
    ]
    if kind == "twice":
        add_lora(model, names, RANK, ALPHA, seed=0)
    match = {
        "unknown": r"got model\.layers\.0\.mlp\.up \(NoneType\)",
        "norm": r"\(Phi3RMSNorm\)",
        "twice": "Merge the first",
        "none": "got no name",
    }[kind]
    with pytest.raises(InputError, match=match):
        add_lora(model, names, RANK, ALPHA, seed=0)


class Small:
    """Squared logits of the model in bf16, of the tensors of its updates; stops in step `cut`."""

    def __init__(self, model: Any, tensors: dict[str, Tensor], cut: int | None = None) -> None:
        self.model, self.tensors, self.cut, self.begun = model, tensors, cut, 0

    def parameters(self) -> dict[str, tuple[Tensor, float]]:
        return {name: (tensor, 1.0) for name, tensor in self.tensors.items()}

    def loss(self, tokens: Tensor, mask: Tensor, step: int) -> Tensor:
        if step == self.cut:
            raise KeyboardInterrupt
        self.begun += 1
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(input_ids=tokens, use_cache=False).logits.float().square().mean()

    def after(self, step: int) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: dict[str, float]) -> None:
        assert not state


def test_training_in_bf16_and_resume(load: Load, tmp_path: Path) -> None:
    data = Batches(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
    settings = Settings(20, 2, 1e-2, save_every=4, optimizer="muon")

    def go(folder: str, cut: int | None = None) -> tuple[Small, list[dict[str, float]]]:
        model = load()
        objective = Small(model, add_lora(model, names_of(model), RANK, ALPHA, seed=0), cut)
        return objective, train(objective, data, settings, tmp_path / folder, Header(format="test"), lambda level: None)

    whole, curve = go("whole")
    with pytest.raises(KeyboardInterrupt):
        go("cut", 14)
    resumed, again = go("cut")
    assert resumed.begun == 8 and again == curve
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in whole.tensors.items())
    assert all(tensor.dtype == torch.float32 for tensor in whole.tensors.values())
    losses = [float(Small(model, {}).loss(TOKENS, TOKENS, 0).detach()) for model in (load(), whole.model)]
    assert losses[1] < 0.7 * losses[0], "it learns"

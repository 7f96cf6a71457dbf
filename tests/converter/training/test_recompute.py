"""Checkpointed passes: the same gradients, fewer stored activations, and no dropout although blocks say that they
train.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODEL_TYPES, make_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError

from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.training import recompute
from sparsegate.converter.training.recompute import checkpointed
from sparsegate.runtime_onnx.errors import InputError

TOKENS = torch.randint(3, 290, (3, 20), generator=torch.Generator().manual_seed(0))
DROPOUT = {"attention_dropout": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}


def gradients(model: Any, through: Any, tokens: Tensor = TOKENS) -> tuple[dict[str, Tensor], int]:
    """Gradients of the squared logits by name, and the bytes of different storages that the pass keeps for them."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad(set_to_none=True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with through, saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=tokens, use_cache=False).logits.square().mean()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, sum(
        size for place, size in kept.items() if place not in weights
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_are_equal_without_dropout_and_less_is_kept(model_type: str, tmp_path: Path) -> None:
    model = load_dense(make_model(model_type, tmp_path / "model", **DROPOUT))
    plain, much = gradients(model, nullcontext())
    found, little = gradients(model, checkpointed(model))
    assert all(torch.equal(found[name], gradient) for name, gradient in plain.items())
    inputs = 2 * TOKENS.numel() * 64 * 4  # what checkpoints themselves hold: every block's input, fp32
    assert little + inputs < much / 2
    assert not any(module.training for module in model.modules()), "back in evaluation mode"
    again, as_much = gradients(model, nullcontext())
    assert as_much == much and all(torch.equal(again[name], gradient) for name, gradient in plain.items())
    dropped, _ = gradients(model.train(), nullcontext())
    assert not any(torch.equal(dropped[name], gradient) for name, gradient in plain.items()), "a control with dropout"


@pytest.mark.parametrize("kept", [True, False])
def test_blocks_are_computed_again_with_the_forwards_of_the_pass(
    kept: bool, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network's forward that is set for the pass alone, and a term of the loss that it hands out."""
    model = load_dense(tiny_model("llama"))
    if not kept:
        monkeypatch.setattr(recompute, "replacements", lambda block: {})

    def found(through: Any) -> list[Tensor]:
        terms: list[Tensor] = []
        with through:
            for layer in model.model.layers:
                plain = type(layer.mlp).forward.__get__(layer.mlp)
                layer.mlp.forward = lambda x, plain=plain: terms.append(x.abs().mean()) or plain(x).sin()
            loss = model(input_ids=TOKENS, use_cache=False).logits.square().mean() + sum(terms)
            for layer in model.model.layers:
                del layer.mlp.forward
        return list(torch.autograd.grad(loss, list(model.parameters())))

    plain = found(nullcontext())
    if not kept:
        with pytest.raises(CheckpointError):
            found(checkpointed(model))
        return
    assert all(torch.equal(one, other) for one, other in zip(found(checkpointed(model)), plain, strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_without_blocks() -> None:
    with pytest.raises(InputError, match="got Linear"), checkpointed(torch.nn.Linear(2, 2)):
        pass


def test_flags_return_after_an_error(tiny_model: Callable[[str], Path]) -> None:
    model = load_dense(tiny_model("llama"))
    with pytest.raises(KeyboardInterrupt), checkpointed(model):
        assert [module.training for module in model.model.layers] == [True, True] and not model.model.layers[
            0
        ].mlp.training
        raise KeyboardInterrupt
    assert not any(module.training or getattr(module, "gradient_checkpointing", False) for module in model.modules())

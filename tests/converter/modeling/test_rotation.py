"""A rotation of the residual stream changes nothing of what a model computes, and its axes are the principal ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODEL_TYPES, make_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsegate.converter.arch import load_arch
from sparsegate.converter.checkpoint.source import HEAD, open_source
from sparsegate.converter.modeling.rotation import principal_axes, rotated_weights, stream_of
from sparsegate.converter.modeling.taps import replace, tapped_inputs
from sparsegate.runtime_onnx.errors import InputError

ROTATED = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3")


def tokens_of(count: int = 2, length: int = 24) -> Tensor:
    return torch.randint(290, (count, length), generator=torch.Generator().manual_seed(0))


def random_rotation(width: int) -> Tensor:
    drawn = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return torch.linalg.qr(drawn)[0]


def in_double(folder: Path) -> Any:
    """The model in fp64, its norms too, which transformers computes in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    def norm(module: Any, x: Tensor) -> Tensor:
        return module.weight * x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            replace(module, partial(norm, module))
    return model


@torch.no_grad()
def rotated_error(folder: Path, q: Tensor, drop: str = "") -> float:
    """Largest difference of the rotated model's logits, relative to the largest logit; `drop` leaves out a weight."""
    model = in_double(folder)
    expected = model(input_ids=tokens_of()).logits
    weights = dict(rotated_weights(open_source(folder), q, torch.float64))
    weights.pop(drop, None)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(weights[HEAD].clone())
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    return float((model(input_ids=tokens_of()).logits - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("model_type", ROTATED)
def test_a_rotated_model_has_the_logits_of_the_model(tiny_model: Callable[[str], Path], model_type: str) -> None:
    assert rotated_error(tiny_model(model_type), random_rotation(64)) < 1e-10


def test_biases_are_rotated(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "m", attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    assert rotated_error(folder, random_rotation(64)) < 1e-10
    assert rotated_error(folder, random_rotation(64), "model.layers.0.mlp.down_proj.bias") > 1e-3


def test_types_that_cannot_absorb_a_rotation_are_refused() -> None:
    assert {name for name in MODEL_TYPES if load_arch(name).stream is not None} == set(ROTATED)
    for name in ("gemma2", "phi"):
        with pytest.raises(InputError, match=f"got {name}. Leave rotate out"):
            stream_of(load_arch(name))


@torch.no_grad()
def test_axes_are_principal_ones_of_all_normed_inputs(tiny_model: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    inputs: list[Tensor] = []
    layers = [
        layer for block in model.model.layers for layer in (block.input_layernorm, block.post_attention_layernorm)
    ]
    with tapped_inputs(dict.fromkeys(layers, inputs.append)):
        model(input_ids=tokens_of())
    rows = torch.cat([x.flatten(0, 1) for x in inputs]).double()
    rows = rows / rows.square().mean(1, keepdim=True).sqrt()
    q = principal_axes(model, load_arch("llama"), tokens_of())
    assert torch.allclose(q.T @ q, torch.eye(64, dtype=torch.float64), atol=1e-12)
    energy = (rows @ q).square().sum(0)
    assert torch.all(energy.diff() <= 1e-6 * energy[0])
    moments = q.T @ (rows.T @ rows) @ q
    assert float((moments - moments.diag().diag()).abs().max()) < 1e-4 * float(energy[0])
    assert float(energy[:32].sum()) > float((rows.square().sum(0)).sort().values[32:].sum())

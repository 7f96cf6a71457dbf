"""Predictors as other systems store them, of a tiny llama: as a folder, and beside the weights of a copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import VOCAB
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Plan, Predictor

D, N, LAYERS = 64, 176, 2
RANKS = (12, 5)
TOKENS = torch.randint(3, VOCAB, (3, 30), generator=torch.Generator().manual_seed(0))
NORMS = {"gemma2": "pre_feedforward_layernorm"}
BELOW_ZERO = -float(np.nextafter(np.float32(0), np.float32(1)))


def make_tensors_of(layer: int, biases: bool = False) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(layer)
    r = RANKS[layer]
    weights = {"fc1.weight": torch.randn(r, D, generator=g) / D**0.5, "fc2.weight": torch.randn(N, r, generator=g)}
    return weights | (
        {"fc1.bias": torch.randn(r, generator=g), "fc2.bias": torch.randn(N, generator=g)} if biases else {}
    )


def make_folder(folder: Path, config: dict[str, Any] | None = None, biases: bool = False) -> Path:
    folder.mkdir(parents=True)
    for layer in range(LAYERS):
        save_file(make_tensors_of(layer, biases), folder / f"model_{layer}.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def put_beside(model: Path, out: Path) -> Path:
    """A copy of `model` with predictors beside its feed-forward weights, in bfloat16."""
    shutil.copytree(model, out)
    extra = {
        f"model.layers.{k}.mlp.predictor.{role}": t.bfloat16()
        for k in range(LAYERS)
        for role, t in make_tensors_of(k).items()
    }
    save_file(load_file(out / "model.safetensors") | extra, out / "model.safetensors", metadata={"format": "pt"})
    return out


def kept(entry: Predictor, x: Tensor) -> Tensor:
    return torch.relu(x @ entry.fc1.T) @ entry.fc2.T > entry.tau


def entry_of(plan: Plan, layer: int) -> Predictor:
    entry = plan[Site(layer)].gate
    assert isinstance(entry, Predictor)
    return entry

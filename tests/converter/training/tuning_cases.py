"""Recipes whose first stage trains a tiny model for a moment, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from small_recipe import small_recipe
from torch import Tensor

from sparsegate.converter.pipeline.tune import tune
from sparsegate.runtime_onnx.errors import InputError

TRAIN = {
    "steps": 4,
    "windows": 4,
    "precision": "fp32",
    "data": {"windows": 8, "length": 24},
    "penalty": {"density": 0.2},
}


def recipe(
    model: Path, folder: Path, last: dict[str, Any] | None = None, activation: str | None = "drelu", **changes: Any
) -> Path:
    """A recipe whose first stage trains for a moment."""
    folder.mkdir(exist_ok=True)
    config = {} if activation is None else {"activation": activation}
    stages = [{"method": "exact", "config": config, "tune": TRAIN | changes}, *([last] if last else [])]
    return small_recipe(model, folder, stages=stages)


def tuned(model: Path, folder: Path, name: str = "out", **changes: Any) -> Path:
    return tune(output=folder / name, recipe=recipe(model, folder, **changes)).folder


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        action()
    return str(error.value)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")

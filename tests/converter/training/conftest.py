"""Fixtures of the trainings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from selection_cases import (
    Load,
)

from sparsegate.converter.arch import Arch, load_arch
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.pipeline import candidates


@pytest.fixture(name="load")
def _load(tiny_model: Callable[[str], Path]) -> Load:
    """A tiny model with its architecture and activation, by type."""

    def load(model_type: str) -> tuple[Any, Arch, str]:
        model, arch = load_dense(tiny_model(model_type)), load_arch(model_type)
        return model, arch, arch.activation(model.config)

    return load


@pytest.fixture(name="no_speed")
def _no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions time nothing."""
    monkeypatch.setattr(candidates, "_speed", lambda base, onnx, texts: {})


@pytest.fixture(name="model")
def _model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")

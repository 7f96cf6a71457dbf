"""A masked model and a converted one, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluated import mixed_plan
from small_recipe import small_recipe

from sparsegate.converter.arch import load_arch
from sparsegate.converter.modeling.gated import apply_plan, load_dense
from sparsegate.converter.pipeline import candidates
from sparsegate.converter.pipeline.convert import convert


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Any:
    found = load_dense(tiny_model("llama"))
    arch = load_arch("llama")
    return apply_plan(found, mixed_plan(), arch, arch.activation(found.config))


@pytest.fixture(scope="session")
def converted(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted tiny Llama, its text beside it; copy it before changing anything in it."""
    folder = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "_speed", lambda base, onnx, texts: {})
        return convert(recipe=small_recipe(tiny_model("llama"), folder), output=folder / "out").folder

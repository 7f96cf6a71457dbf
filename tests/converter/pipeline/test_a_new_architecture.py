"""An architecture is one JSON file: with one for a type that has none, its model is converted, verified and loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import test_registry
import torch
from small_recipe import small_recipe

from sparsegate.converter import arch
from sparsegate.converter.evaluation.records import RESULTS, Report
from sparsegate.converter.modeling.gated import dense, load, load_dense
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.verify import verify
from sparsegate.runtime_onnx.errors import InputError

pytestmark = pytest.mark.usefixtures("no_speed")
TYPE, NEAREST = "gemma", "llama"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the architectures' files, empty."""
    folder = tmp_path / "arch"
    folder.mkdir()
    monkeypatch.setattr(arch, "_FOLDER", folder)
    arch.load_arch.cache_clear()
    yield folder
    arch.load_arch.cache_clear()


@torch.no_grad()
def test_a_file_makes_an_architecture(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TYPE not in models.MODEL_TYPES
    monkeypatch.setitem(models._CONFIGS, TYPE, {"head_dim": 32, "tie_word_embeddings": True})
    model, out = models.make_model(TYPE, tmp_path / "model"), tmp_path / "out"
    recipe = small_recipe(model, tmp_path)
    with pytest.raises(InputError, match=f"model_type must be one of .*, got '{TYPE}'"):
        convert(recipe=recipe, output=out)
    nearest = json.loads((Path(arch.__file__).parent / f"{NEAREST}.json").read_text(encoding="utf-8"))
    (files / f"{TYPE}.json").write_text(json.dumps(nearest | {"model_type": TYPE}), encoding="utf-8")
    test_registry.test_architecture_matches_transformers(TYPE, lambda _: model)
    report = convert(recipe=recipe, output=out).report
    assert report is not None and 0 < Report.load(out / RESULTS).chosen.density < 1
    assert all(check.passed for check in verify(out).checks)
    tokens = torch.randint(3, models.VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    sparse = load(out)
    gated = sparse(input_ids=tokens).logits
    with dense(sparse):
        whole = sparse(input_ids=tokens).logits
    assert torch.equal(whole, load_dense(model)(input_ids=tokens).logits) and not torch.allclose(gated, whole)

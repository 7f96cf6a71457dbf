"""A source of models is a row: a toy one, which writes a model by a number, is opened, estimated and calibrated on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import VOCAB, make_model
from safetensors.torch import load_file

from sparsegate.converter.arch.site import Site
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.sources import named
from sparsegate.converter.stats.collect import collect
from sparsegate.converter.text.windows import Batches
from sparsegate.runtime_onnx.errors import InputError


def fetch(model: str, folder: Path) -> named.Fetched:
    """The tiny Llama of a seed."""
    return named.Fetched(make_model("llama", folder, int(model.removeprefix("seed:"))), label=f"tiny {model}")


def test_a_row_makes_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError):
        named.resolve("seed:5", tmp_path / "before")
    row = named.SourceKind(lambda model: model.startswith("seed:"), fetch)
    monkeypatch.setattr(named, "SOURCES", {"seed": row, **named.SOURCES})
    source = named.resolve("seed:5", tmp_path / "work")
    twin = load_file(make_model("llama", tmp_path / "twin", 5) / "model.safetensors")
    weights = load_file(source.folder / "model.safetensors")
    assert set(weights) == set(twin) and all(torch.equal(weights[name], twin[name]) for name in twin)
    assert source.name == "tiny seed:5"
    tokens = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    stats = collect(source, Batches(tokens, torch.ones_like(tokens, dtype=torch.bool)), ["sizes:gate"], tmp_path / "s")
    assert int(stats[Site(1)]["sizes:gate.units"]) == source.config.intermediate_size
    planned, same = (convert(model, output=tmp_path / "out", dry_run=True) for model in ("seed:5", str(source.folder)))
    assert planned.estimate is not None and same.estimate is not None
    times, expected = planned.estimate.seconds, same.estimate.seconds
    assert times | {"open": 0.0} == expected | {"open": 0.0}, "but for what reading the folder took"

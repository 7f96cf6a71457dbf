"""The calibration pass goes on from its finished sites, and begins again where something else was asked of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from calibration_walk import BOTH, contents, make_batches, times
from safetensors.torch import load_file, save_file

from sparsegate.converter.checkpoint.source import Source, open_source
from sparsegate.converter.stats import histogram
from sparsegate.converter.stats.collect import collect, drop_samples

pytestmark = pytest.mark.usefixtures("small_groups")


def test_a_finished_site_is_not_made_again(source: Source, tmp_path: Path) -> None:
    collect(source, make_batches(), BOTH, tmp_path)
    before, whole = times(tmp_path), contents(tmp_path)
    collect(source, make_batches(), BOTH, tmp_path)
    assert times(tmp_path) == before
    for key in ("layers.0.ffn", "layers.1.ffn"):
        shutil.rmtree(tmp_path / key)
        kept = times(tmp_path)
        collect(source, make_batches(), BOTH, tmp_path)
        assert contents(tmp_path) == whole and times(tmp_path).items() > kept.items()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_pass_goes_on(
    failure: type[BaseException], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect(source, make_batches(), BOTH, tmp_path / "whole")
    calls, real = [], histogram.update

    def update(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > 4:  # three groups a layer
            raise failure
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(histogram, "update", update)
        with pytest.raises(failure):
            collect(source, make_batches(), BOTH, tmp_path / "cut")
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["layers.0.ffn"], (
        "the first layer is finished, of the second nothing is left"
    )
    before = times(tmp_path / "cut")
    collect(source, make_batches(), BOTH, tmp_path / "cut")
    assert (
        contents(tmp_path / "cut") == contents(tmp_path / "whole") and times(tmp_path / "cut").items() > before.items()
    )


def test_fewer_statistics_are_not_collected_again(source: Source, tmp_path: Path) -> None:
    """A run that was stopped between two methods asks for the second one's statistics only."""
    collect(source, make_batches(), BOTH, tmp_path)
    before = times(tmp_path)
    (found, _) = collect(source, make_batches(), ["samples:magnitude"], tmp_path).values()
    assert times(tmp_path) == before and sorted(found) == ["samples:magnitude.score", "samples:magnitude.x"]
    collect(source, make_batches(), [*BOTH, "histogram:magnitude"], tmp_path)
    assert not times(tmp_path).items() & before.items(), "more statistics are"


@pytest.mark.parametrize("change", ["batches", "seed", "model"])
def test_other_parents_are_collected_again(change: str, source: Source, tmp_path: Path) -> None:
    collect(source, make_batches(), BOTH, tmp_path)
    before = times(tmp_path)
    if change == "model":
        folder = shutil.copytree(source.folder, tmp_path.with_name(tmp_path.name + "m"))
        tensors = load_file(folder / "model.safetensors")
        save_file({name: t * 1.01 for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        source = open_source(folder)
    collect(source, make_batches(seed=int(change == "batches")), BOTH, tmp_path, seed=int(change == "seed"))
    assert not times(tmp_path).items() & before.items()


def test_dropped_samples_are_collected_again(source: Source, tmp_path: Path) -> None:
    collect(source, make_batches(), BOTH, tmp_path)
    whole = contents(tmp_path)
    drop_samples(tmp_path)
    assert sorted(contents(tmp_path)) == [
        "layers.0.ffn/histogram.gate.safetensors",
        "layers.1.ffn/histogram.gate.safetensors",
    ]
    before = times(tmp_path)
    collect(source, make_batches(), ["histogram:gate"], tmp_path)
    assert times(tmp_path) == before
    collect(source, make_batches(), BOTH, tmp_path)
    assert contents(tmp_path) == whole

"""The benchmark of all methods, on few windows: every kind of row is measured, stored and found again."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pytest

from benchmarks import curves
from pages import curves_page
from sparsegate.converter.methods.tune import Tune
from sparsegate.converter.report.curves import Curves
from sparsegate.converter.text.windows import Batches

TRAINED = ("predictor end to end", "gate end to end + ridge")
CALIBRATED = ("gate", "chess")
SMALL_METHODS = (*CALIBRATED, *TRAINED)


class SmallStudy(curves.Study):
    """Few windows, to calibrate on and to measure on."""

    @cached_property
    def calibration(self) -> Batches:
        return self.windows(0, 4)

    @cached_property
    def heldout(self) -> Batches:
        whole = self.windows(1, 4)
        return Batches(whole.tokens[:2, :64], whole.mask[:2, :64])

    def windows(self, seed: int, count: int = 4) -> Batches:
        return super().windows(seed, min(count, 4))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The benchmark made small; the folder of its results."""
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(curves, "Study", SmallStudy)
    monkeypatch.setattr(curves, "DENSITIES", (0.5,))
    monkeypatch.setattr(curves, "METHODS", {name: replace(curves.METHODS[name], more=()) for name in SMALL_METHODS})
    monkeypatch.setattr(curves, "PROMPT", 32)
    monkeypatch.setattr(curves, "ORACLES", {"magnitude": ()})
    for name in ("PREDICTOR", "GATE"):
        monkeypatch.setattr(curves, name, Tune(steps=2, windows=2))
    for module in (curves, curves_page):
        monkeypatch.setattr(module, "RESULTS", results)
    monkeypatch.setattr(curves_page, "PAGE", results / "curves.md")
    return results


@pytest.mark.slow
def test_every_kind_of_row_is_measured_once(small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["curves.py", "--work", str(tmp_path / "work"), "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", [*words, "--only", ",".join([*SMALL_METHODS, "magnitude", "prompt"])])
    curves.main()
    found = Curves.load(small / "curves.json")
    assert {row.method for row in found.rows} == {"dense", "magnitude", *SMALL_METHODS}
    assert {row.seed for row in found.rows if row.method in TRAINED} == {0}
    at_half = [row for row in found.rows if row.density_target == 0.5 and row.method in (*CALIBRATED, "magnitude")]
    assert len(at_half) == 3 and all(abs(row.density - 0.5) < 0.1 and row.kl > 0 for row in at_half)
    assert [row.method for row in Curves.load(small / "curves_prompt.json").rows][0] == "dense"
    assert "magnitude" in (small / "curves.md").read_text(encoding="utf-8") and (small / "curves.png").is_file()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    for name in ("collect", "train_plan", "analyse_all", "measure_quality"):
        monkeypatch.setattr(curves, name, refuse)
    curves.main()
    assert Curves.load(small / "curves.json").rows == found.rows


def test_a_name_that_is_not_known_is_refused(
    small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["curves.py", "--work", str(tmp_path / "work"), "--only", "gate,guess"])
    with pytest.raises(SystemExit):
        curves.main()
    assert "got guess" in capsys.readouterr().err and not (tmp_path / "work").exists()

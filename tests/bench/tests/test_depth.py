"""The benchmark of depths on tiny models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import depth
from records.depth_results import Depths
from sparsegate.converter.evaluation.speed.shapes import Shape

TINY = Shape("tiny", "llama", 64, 96, 2, 4, 2, 16, 300, True)


def test_growth_is_the_power_of_the_depth() -> None:
    assert depth.growth([4, 8, 16], [1.0, 2.0, 4.0]) == pytest.approx(1.0)
    assert depth.growth([4, 8, 16], [9.0, 2.0, 8.0]) == pytest.approx(2.0)
    assert math.isnan(depth.growth([4, 8], [0.0, 1.0]))


@pytest.mark.slow
def test_every_stage_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "find_shape", lambda _: TINY)
    found = depth.main(["--layers", "1,2", "--windows", "8", "--steps", "2", "-o", str(tmp_path / "depth.json")])
    assert Depths.load(tmp_path / "depth.json") == found
    assert list(found.seconds) == ["1", "2"]
    for stages in found.seconds.values():
        assert {"calibrate", "train trained_gate", "plan", "quality", "export", "agreement"} <= set(stages)
        assert all(seconds >= 0 for seconds in stages.values())
    text = depth.table(found)
    assert text.count("\n") == len(found.seconds["1"]) + 1 and "| 1 layers | 2 layers | growth |" in text

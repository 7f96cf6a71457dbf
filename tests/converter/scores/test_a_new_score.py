"""A score is its file and its row: a toy one ranks units in the analysis, is held to its promise, and feeds a
statistic.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import test_registry
import torch
import toys
from analysis_loops import Make, tiny, windows

from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.evaluation.analysis.executor import analyse
from sparsegate.converter.evaluation.analysis.setting import Setting
from sparsegate.converter.scores import SCORES, load_score
from sparsegate.converter.stats.collect import collect
from sparsegate.runtime_onnx.errors import InputError

TEXT = """
SOURCE = ("none, arXiv 0000.00000", "s_i = 2 |z_i|", "none")
NEEDS = ("z",)
PHASE = "post"


def score(context):
    return 2 * context.z.abs()
"""


def test_a_file_and_a_row_make_a_score(tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="score must be one of .*, got 'toy'"):
        load_score("toy")
    toys.add(monkeypatch, tmp_path, SCORES, TEXT)
    test_registry.test_score("toy")
    model, arch = tiny(tiny_model)
    batches = windows()
    toy, known, other = (analyse(model, arch, batches, Setting(name, 0.3)) for name in ("toy", "abs_z", "gate"))
    assert toy.setting.score == "toy" and replace(toy, setting=known.setting) == known, "the same order of units"
    assert toy.nll != other.nll
    found = collect(open_source(tiny_model("llama")), batches, ["histogram:toy", "histogram:abs_z"], tmp_path / "stats")
    for tensors in found.values():  # twice the score is an octave, 256 bins, further
        toy_count, known_count = (tensors[f"histogram:{name}.count"] for name in ("toy", "abs_z"))
        assert torch.equal(toy_count[512:], known_count[256:-256]) and known_count[256:-256].any()

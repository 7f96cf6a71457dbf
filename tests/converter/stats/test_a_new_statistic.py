"""A statistic is its file and its row: a toy one is collected block by block, stored, and equals hooks on the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_registry
import torch
import toys
from calibration_walk import make_batches
from torch.nn import functional as F

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.source import Source
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.stats import STATS, SiteStats, load_stat
from sparsegate.converter.stats.collect import collect
from sparsegate.runtime_onnx.errors import InputError

TEXT = """
import torch


def init(setup):
    return {"total": torch.zeros(setup.units, dtype=torch.float64), "tokens": torch.tensor(0)}


def update(state, x, score, positions):
    state["total"] += score.double().sum(0)
    state["tokens"] += len(score)


def finish(state):
    return state
"""
pytestmark = pytest.mark.usefixtures("small_groups")


@torch.no_grad()
def test_a_file_and_a_row_make_a_statistic(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="statistic must be one of .*, got 'toy'"):
        load_stat("toy:gate")
    toys.add(monkeypatch, tmp_path, STATS, TEXT)
    test_registry.test_statistic("toy")
    batches, folder = make_batches(), tmp_path / "stats"
    found = collect(source, batches, ["toy:gate", "histogram:gate"], folder)
    model, sums = load_dense(source.folder), {}
    for layer in range(2):
        module = model.get_submodule(f"model.layers.{layer}.mlp.gate_proj")
        module.register_forward_hook(
            lambda _, inputs, out, layer=layer: sums.__setitem__(layer, F.silu(out)[batches.mask].abs().double().sum(0))
        )
    model(input_ids=batches.tokens, attention_mask=batches.mask)
    for layer, expected in sums.items():
        stored = SiteStats(folder / Site(layer).key, ["toy:gate"])
        torch.testing.assert_close(stored["toy:gate.total"], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[Site(layer)]["toy:gate.total"], stored["toy:gate.total"])
        assert stored["toy:gate.tokens"] == batches.mask.sum()

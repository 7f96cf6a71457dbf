"""Conversions in which weights are trained together with what selects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import TUNE, one_method, small_recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsegate.converter.checkpoint.manifest import read_manifest
from sparsegate.converter.checkpoint.plan import Plan
from sparsegate.converter.evaluation.checks import read_plan
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.pipeline import candidates
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.verify import verify
from sparsegate.converter.text.windows import Batches

pytestmark = pytest.mark.usefixtures("no_speed")
MOVING = TUNE | {"updates": "low_rank", "offsets": True, "update_rate": 0.02, "rank": 4}


@pytest.mark.parametrize(
    "method",
    [
        "trained_gate",
        pytest.param("predictor", marks=pytest.mark.slow),
        pytest.param("trained_input", marks=pytest.mark.slow),
        pytest.param("trained_gate+trained_input", marks=pytest.mark.slow),
    ],
)
def test_the_checkpoint_has_the_trained_weights(method: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    recipe = small_recipe(model, tmp_path, stages=one_method(method, sparsity=0.4, tune=MOVING))
    result = convert(recipe=recipe, output=out, keep_stages=True)
    assert result.report is not None and result.report.updated and read_manifest(out).updated
    checks = {check.name: check for check in result.report.checks}
    assert all(check.passed for check in checks.values()) and "kernel ops" in checks
    before, after = load_dense(model).state_dict(), AutoModelForCausalLM.from_pretrained(out).state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {name.split(".")[-2] for name in moved} == {
        f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")
    }
    (stored,) = (tmp_path / "out.work" / "plan").rglob("weights.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in load_file(stored).items())
    if method != "trained_input":
        assert all(entry.offset is not None for site, entry in read_plan(out).items() if site.kind == "ffn")
    row = result.report.chosen
    for verification in (verify(out, source=model, calibration=tmp_path / "text.txt"), verify(out)):
        assert verification.passed
    assert verify(out, source=model, calibration=tmp_path / "text.txt").quality.kl == pytest.approx(row.kl, abs=1e-6), (
        "against the model before its training"
    )
    assert "whose weights were trained" in (out / "README.md").read_text()


def test_frozen_weights_stay(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    result = convert(
        recipe=small_recipe(model, tmp_path, stages=one_method("trained_gate", sparsity=0.4, tune=TUNE)), output=out
    )
    assert result.report is not None and not result.report.updated and not read_manifest(out).updated
    assert (out / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert all(entry.offset is None for entry in read_plan(out).values())


def test_plans_for_different_models_are_measured_on_the_same_windows(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the candidates without training need decides for the trained form, whose weights are its own."""
    plain, asked = candidates.measure_qualities, list[tuple[tuple[str, ...], int, float]]()

    def measured(model: Any, plans: dict[str, Plan], heldout: Batches, reference: Any, error: float, most: int) -> Any:
        asked.append((tuple(plans), len(heldout.tokens), error))
        few = 5 if error else len(heldout.tokens)
        return plain(model, plans, Batches(heldout.tokens[:few], heldout.mask[:few]), reference, 0.0)

    monkeypatch.setattr(candidates, "measure_qualities", measured)
    monkeypatch.setattr("sparsegate.converter.pipeline.configs.CANDIDATES", {False: ("gate", "chess")})
    stages = [{"method": "auto", "config": {"sparsity": 0.4, "tune": MOVING}}]
    result = convert(recipe=small_recipe(tiny_model("llama"), tmp_path, stages=stages), output=tmp_path / "out")
    assert result.report is not None
    assert [(plans, error == 0) for plans, _, error in asked] == [(("gate", "chess"), False), (("trained_gate",), True)]
    assert asked[-1][1] == 5
    assert [row.method for row in result.report.rows] == ["dense", "gate", "chess", "trained_gate"]
    assert result.report.updated == (result.report.chosen.method == "trained_gate")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.measured["windows"] == 5

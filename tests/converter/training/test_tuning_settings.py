"""tune: what is trained and on what, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from models import TEXT
from small_recipe import call_cli, small_recipe
from tuning_cases import recipe, refused, tuned, weights

from sparsegate.converter.checkpoint.plan import Predictor
from sparsegate.converter.evaluation.checks import read_plan
from sparsegate.converter.evaluation.recovery_record import RECOVERY, RecoveryRecord
from sparsegate.converter.pipeline.tune import tune
from sparsegate.converter.text import generated as generated_module
from sparsegate.converter.training import training_text

pytestmark = pytest.mark.usefixtures("no_speed")


def test_lora_changes_the_linear_maps_alone(model: Path, tmp_path: Path) -> None:
    out = tuned(model, tmp_path, lora={"rank": 2})
    before, after = weights(model), weights(out)
    changed = {name for name in before if not torch.allclose(before[name].abs(), after[name].abs())}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    layer = "model.layers.0.self_attn.q_proj.weight"
    assert int(torch.linalg.matrix_rank(after[layer] - before[layer], rtol=1e-3)) <= 2


def test_block_by_block_alone(model: Path, tmp_path: Path) -> None:
    out = tuned(model, tmp_path, end_to_end=False, by_block={"steps": 20, "tokens": 64})
    before, after = weights(model), weights(out)
    assert all(torch.equal(before[name], after[name]) for name in before if ".mlp." not in name)
    changed = [name for name in before if ".mlp." in name and not torch.allclose(before[name].abs(), after[name].abs())]
    assert len(changed) == 6, "gate, up and down of both blocks"
    record = RecoveryRecord.load(out / RECOVERY)
    assert record.recovered.kl != record.swapped.kl and record.curve == []
    assert record.tokens_trained == 2 * 20 * 64 and record.cpu_seconds > 0


def test_predictors_trained_with_the_weights(model: Path, tmp_path: Path) -> None:
    out = tuned(model, tmp_path, predictors={"cost": 0.2, "density": 0.3})
    plan = read_plan(out)
    assert all(entry.edits and isinstance(entry.gate, Predictor) for entry in plan.values()) and len(plan) == 2
    record = RecoveryRecord.load(out / RECOVERY)
    predicted = record.recovered.predicted
    assert (
        record.exact is not None and record.exact.predicted is None and record.exact.density == record.recovered.density
    )
    assert record.exact.nll != record.recovered.nll
    assert predicted is not None and record.recovered.cost == pytest.approx(
        predicted + 28 * (64 + 176) / (3 * 64 * 176), abs=1e-6
    )
    assert [site.predicted for site in record.recovered.sites] == [
        pytest.approx(entry.gating.density, abs=0.2) for entry in plan.values()
    ]


def test_files_in_place_of_the_model_s_own_text(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "own.txt"
    text.write_text(TEXT * 4, encoding="utf-8")
    monkeypatch.setattr(training_text, "generated", lambda *_: pytest.fail("nothing is sampled"))
    found = tune(
        output=tmp_path / "out",
        recipe=recipe(model, tmp_path),
        data=[text],
        steps=2,
        density=0.5,
        lora=1,
        activation="relu",
    )
    settings = found.record.settings
    assert (
        not found.record.text.sampled
        and settings["data"]["mixture"][0]["files"] == [str(text)]
        and found.record.activation == "relu"
    )
    assert (
        settings["steps"] == 2
        and settings["penalty"]["density"] == 0.5
        and settings["lora"] == {"rank": 1, "alpha": 2.0}
    )


def test_refusals(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(model, tmp_path)
    (tmp_path / "there").mkdir()
    assert refused(lambda: tune(output=tmp_path / "there", recipe=path)).startswith("OUT must be a new folder, got")
    assert refused(lambda: tune(str(model), tmp_path / "a", recipe=path)).startswith(
        "MODEL must stand without a recipe that names its model"
    )
    monkeypatch.setattr(generated_module, "self_generated_streams", lambda *given: pytest.fail("nothing is sampled"))
    assert "exact zeros" in refused(lambda: tune(output=tmp_path / "a", recipe=path, activation="silu"))
    assert refused(lambda: tune(output=tmp_path / "a", recipe=path, steps=0)).startswith(
        "The training's steps must be valid, got 0"
    )
    assert refused(lambda: tune(output=tmp_path / "a", recipe=small_recipe(model, tmp_path))).startswith(
        "The recipe must have a stage with tune"
    )
    assert refused(lambda: tune(output=tmp_path / "a", recipe="turbo")).startswith(
        "The recipe must be a YAML file, got nothing at turbo"
    )
    assert not (tmp_path / "a").exists()


def test_the_command_prints_and_resumes_nothing_half(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(model, tmp_path)
    done = call_cli(capsys, "tune", "-o", tmp_path / "out", "--recipe", path)
    assert done.status == 0 and "recovered" in done.out and "layers.1.ffn" in done.out
    again = call_cli(capsys, "tune", "-o", tmp_path / "out", "--recipe", path)
    assert again.status == 2 and again.err.startswith("sparsegate: OUT must be a new folder")
    as_json = call_cli(capsys, "tune", "-o", tmp_path / "json", "--recipe", path, "--json")
    assert (
        json.loads(as_json.out)["recovered"]["density"]
        == RecoveryRecord.load(tmp_path / "out" / RECOVERY).recovered.density
    )

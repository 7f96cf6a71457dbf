"""Conversions whose first stage trains, and stages of training that follow one another."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_recipe import small_recipe
from transformers import AutoModelForCausalLM
from tuning_cases import TRAIN, recipe, refused, tuned

from sparsegate.converter.checkpoint.manifest import read_manifest
from sparsegate.converter.checkpoint.plan import Predictor, Swap
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.checkpoint.stage import (
    write_json,
)
from sparsegate.converter.evaluation.checks import read_plan
from sparsegate.converter.evaluation.records import RESULTS, Report
from sparsegate.converter.evaluation.recovery_record import RECOVERY, RecoveryRecord
from sparsegate.converter.pipeline import convert as conversion
from sparsegate.converter.pipeline import texts
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.recipe import Budget, read_recipe
from sparsegate.converter.pipeline.tune import tune
from sparsegate.converter.pipeline.verify import verify
from sparsegate.converter.report.tables import quality_cells
from sparsegate.converter.text import generated as generated_module
from sparsegate.converter.training import training_text
from sparsegate.runtime_onnx.untrusted import read_json

pytestmark = pytest.mark.usefixtures("no_speed")


@pytest.mark.parametrize(
    "last",
    [
        pytest.param({"method": "exact"}, marks=pytest.mark.slow),
        pytest.param({"method": "gate", "config": {"sparsity": 0.8}}, marks=pytest.mark.slow),
        None,
    ],
)
def test_convert_trains_first(last: dict[str, Any] | None, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more: dict[str, Any] = {"predictors": {"cost": 0.2, "density": 0.4}} if last is None else {}
    result = convert(output=out, recipe=recipe(model, tmp_path, last, **more))
    assert result.report is not None and all(check.passed for check in result.report.checks)
    assert {"body logits", "kernel logits", "kernel ops", "genai kernel greedy tokens"} <= {
        check.name for check in result.report.checks
    }
    record, report = RecoveryRecord.load(out / RECOVERY), Report.load(out / RESULTS)
    dense, row, *others = report.rows
    assert [other.method for other in others] == (["exact"] if last is None else []) and row.selected
    assert dense.nll == pytest.approx(record.dense.nll, abs=1e-6), (
        "dense is the source, not the recovered model ungated"
    )
    plan = read_plan(out)
    assert all(entry.edits == (Swap("drelu"),) for entry in plan.values())
    if last == {"method": "exact"}:
        assert row.nll == pytest.approx(record.recovered.nll, abs=1e-6) and row.density == pytest.approx(
            record.recovered.density, abs=1e-6
        )
    assert row.method == ("tuned" if last is None else last["method"])
    assert verify(out).passed
    with_source = verify(out, source=model, calibration=tmp_path / "text.txt")
    assert with_source.passed and with_source.quality.kl == pytest.approx(read_manifest(out).measured["kl"], abs=1e-6)


def test_stages_of_training_follow_one_another(model: Path, tmp_path: Path) -> None:
    last = {
        "method": "exact",
        "tune": TRAIN
        | {"steps": 12, "predictors": {"cost": 0.2, "density": 0.4}, "data": {"windows": 6, "length": 20}},
    }
    path = recipe(model, tmp_path, last, steps=11)
    found = tune(output=tmp_path / "out", recipe=path)
    record = RecoveryRecord.load(tmp_path / "out" / RECOVERY)
    assert (
        all(isinstance(entry.gate, Predictor) for entry in read_plan(tmp_path / "out").values())
        and found.record == record
    )
    alone = tune(output=tmp_path / "first", recipe=recipe(model, tmp_path / "alone", steps=11)).record
    assert record.swapped == alone.swapped and record.dense == alone.dense, "before all of it, beside the dense source"
    assert record.tokens_trained == 11 * 4 * 24 + 12 * 4 * 20 and record.text.tokens == 8 * 24 + 6 * 20
    assert [point.step for point in record.curve] == [10, 11, 21, 23] and [
        point.step for point in record.heldout
    ] == list(range(1, 24))
    assert record.heldout[:11] == alone.heldout and record.heldout[11].predicted is not None
    assert record.recovered.kl > 0.01, "the second stage's teacher is the dense source, not the first stage's result"
    assert [stage["steps"] for stage in record.settings["stages"]] == [11, 12]


def test_stages_share_a_text_that_both_read(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, plain = [], training_text.generated
    monkeypatch.setattr(
        training_text, "generated", lambda *given, **more: calls.append(given[4].name) or plain(*given, **more)
    )
    sampled: list[int] = []
    inner = generated_module.self_generated_streams
    monkeypatch.setattr(
        generated_module, "self_generated_streams", lambda *given: sampled.append(given[2]) or inner(*given)
    )
    path = recipe(model, tmp_path, {"method": "exact", "tune": TRAIN | {"predictors": {"density": 0.4}}})
    record = tune(output=tmp_path / "out", recipe=path).record
    assert sampled == [8] and set(calls) == {"stage_0", "stage_1"}
    assert record.text.tokens == 8 * 24 and record.tokens_trained == 2 * 4 * 4 * 24


def test_a_tuned_folder_is_converted_like_any_model(model: Path, tmp_path: Path) -> None:
    folder = tuned(model, tmp_path, "recovered")
    settings = {"steps": 2, "data": 8, "windows": 2, "precision": "fp32"}
    path = small_recipe(folder, tmp_path, stages=[{"method": "auto", "config": {"sparsity": 0.7, "tune": settings}}])
    result = convert(output=tmp_path / "out", recipe=path)
    assert result.report is not None
    assert {row.method for row in result.report.rows} == {
        "dense",
        "gate",
        "chess",
        "cett",
        "exact",
    }, "what loses nothing needs no training"
    exact = next(row for row in result.report.rows if row.method == "exact")
    assert quality_cells(result.report)[1][0][0] == "ungated", "no dense model is at hand"
    assert RecoveryRecord.load(tmp_path / "out" / RECOVERY) == RecoveryRecord.load(folder / RECOVERY)
    assert (
        exact.selected
        and exact.kl == pytest.approx(0, abs=1e-6)
        and read_json(tmp_path / "out" / "config.json", "c")["model_type"] == "sparsegate_llama"
    )


def test_back_to_the_model_s_own_activation(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """A model that has ReLU is loaded by transformers and opened by convert as what it is, by whatever way it got
    there.
    """
    model = tmp_path / "relu"
    shutil.copytree(tiny_model("llama"), model)
    write_json(model / "config.json", read_json(model / "config.json", "c") | {"hidden_act": "relu"})
    same = tuned(model, tmp_path, "same", activation="relu")
    swapped = tuned(model, tmp_path, "swapped")
    back = tune(
        output=tmp_path / "back",
        recipe=recipe(swapped, tmp_path, activation="relu", losses={"distill": 0.0, "lm": 1.0}),
    ).folder
    for folder in (same, back):
        raw = read_json(folder / "config.json", "c")
        assert (
            raw["model_type"] == "llama"
            and raw["hidden_act"] == "relu"
            and raw["architectures"] == ["LlamaForCausalLM"]
        )
        assert {site["score"] for site in raw["sparsity"]["sites"].values()} == {"exact"}
        assert (
            open_source(folder).swaps == {} and AutoModelForCausalLM.from_pretrained(folder).config.hidden_act == "relu"
        )
    assert open_source(swapped).swaps


def test_convert_trains_in_one_process_of_torchrun(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused(lambda: convert(output=tmp_path / "out", recipe=recipe(model, tmp_path)))
    assert line.startswith("convert must run in one process, got 2. Run sparsegate tune")


def test_what_is_searched_on_was_not_trained_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "SEARCH_WINDOWS", 16)
    asked = read_recipe(recipe(model, tmp_path, {"method": "gate"}))
    asked = asked.model_copy(
        update={
            "calibration": asked.calibration.model_copy(update={"generated": True, "length": 24}),
            "budget": Budget(max_kl=1.0),
        }
    )
    source, work = open_source(model), tmp_path / "work"
    trained, _ = training_text.training_text(source, asked.stages[0].tune, asked.seed, work / "recovery" / "stage_0")
    rows = {tuple(row) for row in trained.tokens.tolist()}
    found = conversion._texts(source, asked, 0, work)
    assert found.search is not None and not rows & {tuple(row) for row in found.search.tokens.tolist()}


def test_order_of_stages(model: Path, tmp_path: Path) -> None:
    def line(*stages: dict[str, Any]) -> str:
        path = tmp_path / "stages.yaml"
        path.write_text(yaml.safe_dump({"version": 1, "model": str(model), "stages": list(stages)}), encoding="utf-8")
        return refused(lambda: convert(output=tmp_path / "out", recipe=path))

    trained, plain = {"method": "exact", "config": {"activation": "drelu"}, "tune": TRAIN}, {"method": "gate"}
    assert line(plain, plain).startswith("Every stage but the last must train, got gate without tune")
    assert line(trained, trained).startswith(
        "A stage that trains must have method exact without a configuration after the first, got exact with "
        "['activation']"
    )
    assert line(plain | {"tune": TRAIN}).startswith("A stage that trains must have method exact")
    assert line(trained | {"tune": TRAIN | {"predictors": {}}}, plain).startswith(
        "A stage that trains predictors must be the last one"
    )

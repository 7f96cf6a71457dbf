"""The benchmark of budgets, on a tiny model: densities that cost the share, rows of each kind, resuming, the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import write_text

from benchmarks import budgets, budgets_plans, trainings
from benchmarks.budgets import run
from benchmarks.budgets_plans import load_made, place_of, with_weights
from benchmarks.budgets_study import MAIN, ROWS, Study
from benchmarks.model_study import WindowSizes
from pages.budgets_page import (
    LEVERS,
    best_table,
    cost_table,
    lever_table,
    loss_table,
    page,
    places,
    plot,
    rise_cell,
)
from pages.budgets_page import load as load_stored
from records.budgets_results import Budgets
from records.folders import DOCS
from sparsegate.converter.checkpoint.cost import block_cost, mlp_cost
from sparsegate.runtime_onnx.errors import InputError

SMALL = ["--calibration-windows", "8", "--windows", "8", "--length", "32", "--threads", "1", "--steps", "2"]
BYTES = ["--bytes", "0.8,0.5"]
KINDS = "gate,teal,trained_gate,teal block"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"), pieces=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path], text: Path) -> SimpleNamespace:
    """A run of a few rows on a tiny model, once."""
    folder = tmp_path_factory.mktemp("budgets")
    words = [str(tiny_model("llama")), "--text", f"{text},{text}", "--judge", f"same={text},again={text}", *BYTES]
    words += ["--work", str(folder / "work"), "-o", str(folder / "r.json"), *SMALL]
    return SimpleNamespace(folder=folder, words=words, result=run([*words, "--only", KINDS]))


def study_of(model: Path, text: Path, work: Path, **more: Any) -> Study:
    sizes = WindowSizes(32, 8, 8, 0, 60, 2)
    return Study(
        folder=model, texts=(text, text), judge_texts={"same": text}, work=work, sizes=sizes, shares=(0.8, 0.5), **more
    )


def test_every_row_has_all_that_the_page_needs(whole: SimpleNamespace) -> None:
    found = whole.result
    assert [(row.name, row.share) for row in found.rows] == [
        (name, share) for name in ("gate", "teal", "trained_gate", "teal block") for share in (0.8, 0.5)
    ]
    assert list(found.judges) == ["same", "again"] and len(found.training) == 2 and found.training[0].windows > 8
    for row in found.rows:
        assert set(row.losses) == {"same", "again"} and row.losses["same"] == row.losses["again"]
        assert row.losses["same"].windows == 8 and row.losses["same"].kl > 0 and row.losses["same"].nll_error > 0
        assert row.making.peak_bytes > 1 << 24 and row.making.seconds > 0 and row.making.calibration_seconds > 0
        assert (row.making.steps, row.making.tokens) == ((2, 2 * 2 * 32) if row.trained else (0, 0))
    left = {name for name in MAIN if name not in KINDS.split(",")}
    assert {word.rpartition(" ")[0] for word in found.missing} == left, "of others than MAIN nothing is missed"
    assert Budgets.model_validate_json((whole.folder / "r.json").read_text()) == found


def test_plans_cost_the_share_that_they_were_made_for(
    whole: SimpleNamespace, tiny_model: Callable[..., Path], text: Path
) -> None:
    study = study_of(tiny_model("llama"), text, whole.folder / "work")
    arch, config = study.source.arch, study.source.config
    for name in KINDS.split(","):
        for share in (0.8, 0.5):
            cost = mlp_cost if ROWS[name].of == "networks" else block_cost
            assert cost(load_made(study, name, share)[0], arch, config) == pytest.approx(share, abs=0.02)
    rank = study.config("predictor").rank or int(0.1 * 3 * 64 * 176 / (64 + 176))
    assert study.density("predictor", 0.5) == pytest.approx(0.5 - rank * (64 + 176) / (3 * 64 * 176), abs=1e-4)
    assert study.density("gate", 0.4) == pytest.approx(0.1) and study.density("gate", 0.35) is None


def test_a_trained_row_is_measured_with_its_weights(
    whole: SimpleNamespace, tiny_model: Callable[..., Path], text: Path
) -> None:
    study = study_of(tiny_model("llama"), text, whole.folder / "work")
    weights = load_made(study, "trained_gate", 0.5)[1]
    assert weights is not None and weights.parent == place_of(study, "trained_gate", 0.5)
    dense, model = study.model(), with_weights(study.model(), weights)
    changed = [
        not torch.equal(a, b) for a, b in zip(dense.state_dict().values(), model.state_dict().values(), strict=True)
    ]
    assert sum(changed) >= 2 * 7


def test_a_finished_run_is_not_run_again(whole: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(budgets, "measure_qualities", refuse)
    monkeypatch.setattr(trainings, "train_plan", refuse)
    for name in ("direct_plan", "collect", "step_seconds"):
        monkeypatch.setattr(budgets_plans, name, refuse)
    assert run([*whole.words, "--only", KINDS]).rows == whole.result.rows
    assert run([*whole.words, "--collate", "--descend", "--set", "tune.rank=3"]).rows == whole.result.rows
    with pytest.raises(AssertionError, match="made again"):
        run([*whole.words, "--only", "trained_gate", "--set", "tune.rank=3"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_every_row_can_be_made(whole: SimpleNamespace, tiny_model: Callable[..., Path], text: Path, name: str) -> None:
    for descend in (False, True):
        study = study_of(tiny_model("llama"), text, whole.folder / f"every{descend}", descend=descend)
        budgets_plans.make(study, name)
        shares = list(study.densities(name))
        assert shares and all(budgets_plans.is_made(study, name, share) for share in shares)


@pytest.mark.slow
def test_one_training_goes_through_all_shares(
    whole: SimpleNamespace, tiny_model: Callable[..., Path], text: Path
) -> None:
    study = study_of(tiny_model("llama"), text, whole.folder / "down", descend=True, tune={"updates": "none"})
    budgets_plans.make(study, "trained_input")
    made = [budgets_plans.making_of(study, "trained_input", share) for share in (0.8, 0.5)]
    assert [each.steps for each in made] == [2, 4] and all(each.descended for each in made)
    assert made[0].seconds == pytest.approx(made[1].seconds / 2)
    arch, config = study.source.arch, study.source.config
    costs = [mlp_cost(load_made(study, "trained_input", share)[0], arch, config) for share in (0.8, 0.5)]
    assert costs == pytest.approx([0.8, 0.5], abs=0.03)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "gates"], "--only"),
        (["--bytes", "0.8,x"], "--bytes"),
        (["--set", "rank=3"], "--set"),
        (["--set", "tune.steps=3"], "--set"),
        (["--judge", "file.txt"], "--judge"),
        (["--export", "gate:0.5:int3"], "--export"),
        (["--export", "gate:0.3:int4", "--bytes", "0.5,0.4"], "--export"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(
    tmp_path: Path, tiny_model: Callable[..., Path], text: Path, words: list[str], said: str
) -> None:
    given = [str(tiny_model("llama")), "--text", str(text), "--judge", f"same={text}", "--work", str(tmp_path / "work")]
    with pytest.raises(InputError, match=said):
        run([*given, *words])
    assert not (tmp_path / "work").exists()


def test_the_page_says_what_is_stored(whole: SimpleNamespace, tmp_path: Path) -> None:
    result = whole.result
    text = page(result)
    for row in result.rows:
        assert rise_cell(row.losses["same"]) in loss_table(result.rows, "same")
    best = min((row for row in result.rows if row.share == 0.5 and row.name in ("gate", "teal")), key=_loss)
    assert f"| {best.name} | {rise_cell(best.losses['same'])}" in best_table(result)
    assert best_table(result) in text and cost_table(result) in text and "## Whole blocks" in text
    assert "lever" not in text and "## As files" not in text
    plot(result, tmp_path / "a.png")
    plot(result, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def _loss(row: Any) -> float:
    return row.losses["same"].nll


def test_a_lever_is_what_its_row_has_below_the_one_without(whole: SimpleNamespace) -> None:
    rows = [row for row in whole.result.rows if row.share == 0.5]
    teal = next(row for row in rows if row.name == "teal")

    def with_kl(name: str, kl: float, steps: int) -> Any:
        losses = {judge: loss.model_copy(update={"kl": kl}) for judge, loss in teal.losses.items()}
        return teal.model_copy(
            update={"name": name, "losses": losses, "making": teal.making.model_copy(update={"steps": steps})}
        )

    made = [with_kl("teal", 0.5, 0), with_kl("teal rotated", 0.4, 0), with_kl("trained_input rotated", 0.125, 9)]
    made += [with_kl("trained_input without offsets", 0.375, 9), with_kl("trained_input low rank", 0.25, 8)]
    table = lever_table(whole.result.model_copy(update={"rows": made}))
    assert "| residual stream rotated | 0.5 | teal rotated | teal | -0.1000, +0.0 |" in table
    assert (
        "| offsets in a training | 0.5 | trained_input rotated | trained_input without offsets | -0.2500, +0.0 |"
        in table
    )
    assert "training of thresholds and weights | 0.5 | trained_input rotated | teal rotated | -0.2750" in table
    assert "whole weights" not in table, "other steps are another training"
    names = {name for _, name, without in LEVERS for name in (name, without)}
    assert names <= set(ROWS), "every lever's rows can be made"


@pytest.mark.slow
def test_a_row_can_be_shipped_in_its_own_precision(whole: SimpleNamespace, tmp_path: Path) -> None:
    words = ["--only", "trained_gate,teal rotated", "--export", "trained_gate:0.5:int4,teal rotated:0.8:fp32"]
    found = run([*whole.words, *words]).shipped
    assert [(file.name, file.share, file.precision) for file in found] == [
        ("teal rotated", 0.8, "fp32"),
        ("trained_gate", 0.5, "int4"),
    ]
    for file in found:
        assert file.checks and all(check.passed for check in file.checks) and file.kl > 0 and file.tokens > 0
    assert found[0].dense is None and found[1].dense is not None and found[1].dense.kl > 0
    again = run([*whole.words, "--collate", "--only", "teal"])
    assert again.shipped == found and "## As files" in page(again)


def test_every_page_is_that_of_its_stored_result() -> None:
    assert {path.stem for path in DOCS.glob("budgets*.md")} == {place.stem for place in places()}
    for place in places():
        assert (DOCS / f"{place.stem}.md").read_text(encoding="utf-8") == page(load_stored(place), place)

"""What a manifest may say and must list, and that NaN fails every comparison."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsegate.converter.checkpoint.listing import unlisted
from sparsegate.converter.checkpoint.manifest import Manifest, check_files, list_files, read_manifest, write_manifest
from sparsegate.converter.checkpoint.stage import CheckError, write_json
from sparsegate.converter.evaluation import paired
from sparsegate.converter.evaluation.checks import (
    ExecutorQuality,
    Quality,
    check_budget,
    check_record,
    largest,
    shipped_checks,
)
from sparsegate.converter.evaluation.op_agreement import Tally
from sparsegate.converter.pipeline import graphs
from sparsegate.converter.pipeline.recipe import Budget, Recipe
from sparsegate.converter.pipeline.search import Loss
from sparsegate.converter.pipeline.verify import contradictions
from sparsegate.converter.text.windows import Batches
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.untrusted import read_json

ROOT = Path(__file__).parents[3]
MEASURED = {
    "nll_dense": 1.0,
    "nll": 1.1,
    "kl": 0.1,
    "agreement": 0.9,
    "density": 0.5,
    "cost": 0.7,
    "nll_error": 0.01,
    "windows": 4,
}
FILES = {
    "config.json": json.dumps(
        {"sparsity": {"version": 1, "sites": {"layers.0.ffn": {"score": "gate", "activation": "silu", "density": 0.5}}}}
    ),
    "model.safetensors": "weights",
    "sparsity/sparsity.safetensors": "tau",
    "generation_config.json": "{}",
    "tokenizer.json": "{}",
    "README.md": "card",
    "onnx/model.onnx": "graph",
    "onnx/model.onnx.data": "data",
    "onnx/genai_config.json": "{}",
    "onnx/tokenizer.json": "{}",
    "report/report.json": "{}",
    "report/quality.png": "picture",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    recipe = Recipe(model="m", budget=Budget(max_kl=0.2), stages=({"method": "gate", "config": {"sparsity": 0.5}},))  # type: ignore[arg-type]
    write_manifest(
        tmp_path,
        Manifest(
            fingerprint="f",
            source={},
            calibration={},
            recipe=recipe.model_dump(mode="json"),
            seed=0,
            measured=MEASURED,
            versions={},
            budget={"max_ppl_increase": None, "max_kl": 0.2, "sparsity": 0.5, "searched": False},
            files=list_files(tmp_path),
            onnx={"precision": "fp32", "target": "cpu", "variants": []},
        ),
    )
    return tmp_path


def test_a_whole_folder_passes(folder: Path) -> None:
    manifest = read_manifest(folder)
    (folder / "notes.txt").write_text("what else lies there does not matter")
    assert check_files(folder, manifest) == [] and unlisted(folder, manifest) == [] and contradictions(manifest) == []


@pytest.mark.parametrize("name", [name for name in FILES if name != "report/quality.png"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_file_off_the_list(folder: Path, name: str, gone: bool) -> None:
    """What readers open must be listed as long as it is there, what a checkpoint consists of in any case."""
    manifest = read_manifest(folder)
    manifest = manifest.model_copy(
        update={"files": {other: file for other, file in manifest.files.items() if other != name}}
    )
    optional = name in ("generation_config.json", "tokenizer.json", "onnx/model.onnx.data", "onnx/tokenizer.json")
    if gone and name != "config.json":
        (folder / name).unlink()
    assert unlisted(folder, manifest) == ([] if gone and optional else [f"{name} is not listed"])


def test_no_files_and_shards(folder: Path) -> None:
    empty = read_manifest(folder).model_copy(update={"files": {}})
    assert {line.split()[0] for line in unlisted(folder, empty)} == set(FILES) - {"report/quality.png"}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    )
    missing = {line.split()[0] for line in unlisted(folder, read_manifest(folder))}
    assert missing == {"model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"}


def test_sizes_of_large_files_and_hashes_of_small_ones(folder: Path) -> None:
    manifest = read_manifest(folder)
    (folder / "onnx" / "model.onnx.data").write_text("atad")
    (folder / "onnx" / "model.onnx").write_text("garph")
    assert len(check_files(folder, manifest)) == 2
    assert check_files(folder, manifest, hashed=4) == ["onnx/model.onnx.data has other bytes than the manifest says"]
    (folder / "onnx" / "model.onnx").write_text("longer")
    assert len(check_files(folder, manifest, hashed=4)) == 2


@pytest.mark.parametrize(
    ("part", "value", "word"),
    [
        ("measured", MEASURED | {"kl": math.nan}, "NaN"),
        ("measured", MEASURED | {"nll": math.inf}, "Infinity"),
        ("measured", MEASURED | {"cost": -0.1}, "cost"),
        ("measured", MEASURED | {"kl": -1.0}, "kl"),
        ("measured", MEASURED | {"agreement": 1.5}, "agreement"),
        ("measured", MEASURED | {"windows": 0}, "windows"),
        ("measured", MEASURED | {"speed": 9.0}, "speed is none of"),
        ("budget", {"max_kl": 1e30}, "max_kl must be from 0 to 100"),
        ("budget", {"max_kl": -1.0}, "max_kl"),
        ("budget", {"max_kl": True}, "max_kl"),
        ("budget", {"max_kl_long": 101.0}, "max_kl_long must be from 0 to 100"),
        ("measured", MEASURED | {"kl_long": -1.0}, "kl_long"),
        ("budget", {"sparsity": 1.5}, "sparsity"),
        ("budget", {"searched": 1.0}, "searched"),
        ("budget", {"patience": 1.0}, "patience is none of"),
        ("files", {"config.json": {"sha256": "0", "size": 1}}, "sha256"),
        ("files", {"config.json": {"sha256": "0" * 64, "size": -1}}, "size"),
    ],
)
def test_numbers_that_no_conversion_writes(folder: Path, part: str, value: Any, word: str) -> None:
    raw = read_json(folder / "manifest.json", "manifest")
    (folder / "manifest.json").write_text(json.dumps(raw | {part: value}))
    with pytest.raises(InputError, match=word) as error:
        read_manifest(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda m: {"budget": m.budget | {"max_kl": 50.0}}, "budget.max_kl is 50.0, 0.2 in the recipe"),
        (lambda m: {"budget": {"sparsity": 0.5, "searched": False}}, "budget.max_kl is None, 0.2 in the recipe"),
        (lambda m: {"budget": m.budget | {"max_kl_long": 9.0}}, "budget.max_kl_long is 9.0, None in the recipe"),
        (lambda m: {"budget": m.budget | {"sparsity": None}}, "budget.sparsity is None, 0.5 in the recipe"),
        (lambda m: {"budget": m.budget | {"searched": True}}, "budget.searched is True, False in the recipe"),
        (lambda m: {"seed": 3}, "seed is 3, 0 in the recipe"),
        (lambda m: {"onnx": m.onnx | {"precision": "int4"}}, "onnx.precision is int4, fp32 in the recipe"),
        (
            lambda m: {"measured": {name: value for name, value in m.measured.items() if name != "kl"}},
            "measured lacks kl",
        ),
    ],
)
def test_a_manifest_is_judged_by_its_own_recipe(
    folder: Path, change: Callable[[Manifest], dict[str, Any]], line: str
) -> None:
    manifest = read_manifest(folder)
    assert contradictions(manifest.model_copy(update=change(manifest))) == [line]
    free = manifest.model_copy(update={"budget": manifest.budget | {"sparsity": None}})
    assert contradictions(free) and not contradictions(free, exact=True)


# JSON


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "[1, -1e400]"])
def test_what_is_no_number_is_no_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(f'{{"a": {text}}}')
    with pytest.raises(InputError, match="X must be JSON, got .* which is not finite"):
        read_json(tmp_path / "x.json", "X")
    (tmp_path / "x.json").write_text('{"a": [1.5, -2e30, 3]}')
    assert read_json(tmp_path / "x.json", "X") == {"a": [1.5, -2e30, 3]}


def test_nothing_writes_what_nothing_reads(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="x.json must hold finite numbers"):
        write_json(tmp_path / "x.json", {"a": math.nan})
    assert list(tmp_path.iterdir()) == []


# Comparisons


def quality(**changes: float | None) -> Quality:
    values = {name: MEASURED[name] for name in ("nll_dense", "nll", "kl", "agreement", "density", "cost")}
    return Quality(tokens=100, site_density={}, site_cost={}, **(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["nll", "kl", "agreement", "density", "cost"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 5.0])
def test_the_record_must_be_what_is_measured(name: str, value: float) -> None:
    assert all(check.passed for check in check_record(quality(), MEASURED))
    assert not all(check.passed for check in check_record(quality(**{name: value}), MEASURED))
    assert not all(check.passed for check in check_record(quality(), MEASURED | {name: value}))
    assert not all(
        check.passed for check in check_record(quality(), {other: v for other, v in MEASURED.items() if other != name})
    )


@pytest.mark.parametrize("name", ["nll_dense", "nll", "kl", "density"])
@pytest.mark.parametrize("budget", [{}, {"max_kl": 0.5, "max_ppl_increase": 0.5, "sparsity": 0.5}])
def test_a_loss_that_is_no_number_is_no_loss(name: str, budget: dict[str, Any]) -> None:
    assert all(check.passed for check in check_budget(quality(), budget))
    for value in (math.nan, math.inf):
        assert not all(check.passed for check in check_budget(quality(**{name: value}), budget))
    if name in ("nll", "kl"):
        values = {"nll": 1.1, "kl": 0.1, name: math.nan}
        shipped = ExecutorQuality(tokens=10, nll_torch=1.0, agreement=1.0, **values)
        assert not all(check.passed for check in shipped_checks(shipped, quality(), budget, "int4"))


def test_far_tokens_are_judged_by_their_own_bound_and_record() -> None:
    budget = {"max_kl_long": 0.2}
    for value, passed in ((0.19, True), (0.21, False), (math.nan, False), (None, False)):
        (check,) = check_budget(quality(kl_long=value), budget)
        assert check.name == "KL to dense, far tokens of long windows" and check.passed == passed
    (searched,) = check_budget(quality(kl_long=0.21), budget | {"searched": True})
    assert searched.passed and searched.bound == pytest.approx(0.2 * 1.15), "met on other text"
    shipped = ExecutorQuality(tokens=10, nll_torch=1.0, nll=1.1, kl=0.1, agreement=0.9)
    assert shipped_checks(shipped, quality(kl_long=0.21), budget, "int4") == [], "long windows are judged in torch"
    for value, passed in ((0.21, True), (0.22, False), (None, False)):
        checks = {check.name: check for check in check_record(quality(kl_long=value), MEASURED | {"kl_long": 0.2105})}
        assert checks["long quality as recorded"].passed == passed
    assert "long quality as recorded" not in {check.name for check in check_record(quality(), MEASURED)}


def test_largest_keeps_what_is_no_number() -> None:
    assert largest([1.0, 3.0, 2.0]) == 3.0
    assert all(math.isnan(largest(values)) for values in ([math.nan, 1.0], [1.0, math.nan]))


def test_a_search_takes_no_plan_without_a_loss() -> None:
    budget = Budget(max_kl=0.1, max_ppl_increase=0.1)
    assert Loss(0.01, 0.01, {}).share(budget) < 1
    for loss in (Loss(0.01, math.nan, {}), Loss(math.nan, 0.01, {})):
        assert not loss.share(budget) <= 1 and loss.is_decided(budget)


def test_a_dense_graph_without_a_loss_leaves_no_room() -> None:
    loss = ExecutorQuality(tokens=10, nll_torch=1.0, nll=math.nan, kl=0.01, agreement=1.0)
    recipe = Recipe(model="m", budget=Budget(max_kl=0.5, max_ppl_increase=0.5))
    for found in (loss, loss.model_copy(update={"nll": 1.0, "kl": math.nan})):
        with pytest.raises((InputError, CheckError), match="leave room"):
            graphs.room(recipe, graphs.Graphs(Path(), Path(), found))


@pytest.mark.parametrize(("error", "bound"), [(math.nan, 1.0), (1e-9, math.nan), (math.inf, 1.0), (1e-9, 0.0)])
def test_an_op_without_an_error_or_a_bound_fails(error: float, bound: float) -> None:
    tally = Tally()
    tally.add("first", np.array([0.5]), np.array([1.0]), np.array([True]))
    assert tally.check("ops").passed
    with np.errstate(divide="ignore"):
        tally.add("second", np.array([0.1, error]), np.array([1.0, bound]), np.array([True, True]))
    tally.add("third", np.array([0.5]), np.array([1.0]), np.array([True]))
    found = tally.check("ops")
    assert not found.passed and "worst at second" in found.note


def test_an_executor_whose_divergence_is_no_number_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, NLL of torch, NLL, KL, agreement by window, of torch under noise and of the executor."""
    batches = Batches(torch.zeros((2, 8), dtype=torch.int64), torch.ones((2, 8), dtype=torch.bool))
    for value, passed in ((0.1, True), (math.nan, False)):
        noisy = torch.tensor([[7.0, 7.0, 7.0, 0.1, 7.0]] * 2, dtype=torch.float64)
        own = torch.tensor([[7.0, 7.0, 7.0, 0.1, 7.0], [7.0, 7.0, 7.0, value, 7.0]], dtype=torch.float64)
        monkeypatch.setattr(paired, "_sums", lambda *_, found=(noisy, own): torch.stack(found))
        checks = paired.compare("kernel", None, None, batches, lambda x: x, rounded=True)  # type: ignore[arg-type]
        assert [check.passed for check in checks] == [True, passed]


def test_no_measured_number_stands_behind_a_constant() -> None:
    """Python's max(0.0, NaN) is 0.0 and max(NaN, 0.0) is NaN: a NaN must not become the best number there is."""
    judging = [
        *(f"evaluation/{name}" for name in ("checks", "agreement", "op_agreement", "paired", "quality")),
        *(f"pipeline/{name}" for name in ("candidates", "graphs", "references", "record", "verify")),
        "training/heldout",
        "training/stage",
    ]
    for path in (ROOT / "converter" / f"{name}.py" for name in judging):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("max", "min")
                and len(node.args) > 1
            ):
                first = node.args[0]
                assert not (isinstance(first, ast.Constant) and isinstance(first.value, float)), (
                    f"{path.name}:{node.lineno} {ast.unparse(node)}"
                )

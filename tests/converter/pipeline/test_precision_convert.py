"""`convert --precision` end to end on a tiny model: what is measured on the shipped file, the checks, the budget, the
card, and what is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conversions import SPEED
from small_recipe import call_cli, small_recipe

from sparsegate.converter.checkpoint.manifest import Manifest, read_manifest, write_manifest
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.evaluation import agreement as executors
from sparsegate.converter.evaluation.agreement import check_onnx
from sparsegate.converter.evaluation.checks import ExecutorQuality, read_plan
from sparsegate.converter.evaluation.records import RESULTS, Report
from sparsegate.converter.modeling.gated import load
from sparsegate.converter.onnx_export.precision import Export
from sparsegate.converter.pipeline import candidates
from sparsegate.converter.pipeline.configs import method_configs
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.estimate import estimate
from sparsegate.converter.pipeline.graphs import Graphs, room
from sparsegate.converter.pipeline.recipe import Flags, compile_recipe, make_recipe, read_recipe
from sparsegate.converter.pipeline.texts import make_heldout
from sparsegate.converter.pipeline.verify import verify
from sparsegate.converter.report.card import speed_sentence
from sparsegate.runtime_onnx.errors import InputError

Make = Callable[[str], Path]


def converted(precision: str, tiny_model: Make, tmp_path_factory: pytest.TempPathFactory, target: str = "cpu") -> Path:
    folder = tmp_path_factory.mktemp(precision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "_speed", lambda base, onnx, texts: SPEED)
        recipe = small_recipe(tiny_model("llama"), folder, export={"precision": precision, "target": target})
        return convert(recipe=recipe, output=folder / "out").folder


@pytest.fixture(scope="module")
def int4(tiny_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in int4; copy it before changing anything in it."""
    return converted("int4", tiny_model, tmp_path_factory)


@pytest.fixture(scope="module")
def fp16(tiny_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted("fp16", tiny_model, tmp_path_factory)


def test_shipped_losses_stand_beside_torchs(int4: Path) -> None:
    report, manifest = Report.load(int4 / RESULTS), read_manifest(int4)
    dense, sparse = report.onnx
    assert (dense.model, sparse.model, dense.precision, sparse.precision) == ("dense", "sparse", "int4", "int4")
    assert 0 < dense.kl < sparse.kl and sparse.tokens == report.evaluation.tokens and sparse.rise_error  # type: ignore[union-attr]
    assert sparse.nll != report.chosen.nll and sparse.bytes == sum(
        path.stat().st_size for path in (int4 / "onnx").glob("model.onnx*")
    )
    assert manifest.onnx["precision"] == "int4" and all("int4_g32" in name for name in manifest.onnx["variants"])
    assert manifest.measured["onnx_nll"] == sparse.nll
    card = (int4 / "README.md").read_text(encoding="utf-8")
    assert f"| gate ONNX | int4 | {sparse.executor} |" in card and f"{sparse.nll:.4f}" in card
    assert report.speed is not None and (report.speed.precision, report.speed.baseline) == ("int4", "int4")
    assert "1 threads, int4, CPUExecutionProvider" in speed_sentence(report)
    assert "As shipped" in (int4 / "report" / "index.html").read_text(encoding="utf-8")


def test_float_weights_are_equal_to_torch_and_compared_with_dense_fp32(fp16: Path, tmp_path: Path) -> None:
    report = Report.load(fp16 / RESULTS)
    (sparse,) = report.onnx
    assert abs(sparse.nll - report.chosen.nll) < 0.01
    assert "fp16 against dense fp32" in speed_sentence(report)
    names = {check.name for check in report.checks}
    assert {"body logits", "body ops", "kernel NLL", "genai kernel greedy tokens"} <= names and "kernel KL" not in names
    shutil.copytree(fp16, tmp_path / "out")
    assert verify(tmp_path / "out", calibration=fp16.parent / "text.txt").passed


def test_verify_judges_the_shipped_file(int4: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(int4, folder)
    found = verify(folder, calibration=int4.parent / "text.txt")
    assert found.passed, [check for check in found.checks if not check.passed]
    names = {check.name for check in found.checks}
    assert {
        "kernel ops",
        "kernel logits",
        "kernel NLL",
        "kernel KL",
        "genai kernel greedy tokens",
        "ONNX quality as recorded",
    } <= names
    assert found.shipped is not None and found.shipped.kl > 2 * found.quality.kl
    manifest = read_manifest(folder)
    between = (found.quality.kl + found.shipped.kl) / 2
    recipe = manifest.recipe | {"budget": manifest.recipe["budget"] | {"max_kl": between}}
    changes = {
        "budget": manifest.budget | {"max_kl": between, "searched": make_recipe(recipe).searches},
        "measured": manifest.measured | {"onnx_kl": 9.0},
    }
    write_manifest(folder, manifest.model_copy(update={"recipe": recipe, **changes}))
    failed = {check.name for check in verify(folder, calibration=int4.parent / "text.txt").checks if not check.passed}
    assert failed == {"KL to dense, ONNX int4", "ONNX quality as recorded"}, "torch alone keeps the budget"


def test_equality_is_with_the_rounded_weights_only(int4: Path) -> None:
    """The same ops fail against the weights as they were, and against those of another precision."""
    source, recipe = open_source(int4, sparse=True), make_recipe(read_manifest(int4).recipe)
    recipe = recipe.model_copy(
        update={"calibration": recipe.calibration.model_copy(update={"file": str(int4.parent / "text.txt")})}
    )
    heldout, plan = make_heldout(source, recipe), read_plan(int4)
    for precision, passed in (("fp32", False), ("int8", False), ("int4", True)):
        checks = check_onnx(int4 / "onnx", load(int4), plan, heldout, Export(precision=precision))  # type: ignore[arg-type]
        ops = [check.passed for check in checks if check.name in ("body ops", "kernel ops", "torch ops")]
        assert ops == [passed] * 3 or (not passed and not any(ops[:2])), (precision, ops)


def test_graph_for_cuda_claims_nothing_that_was_not_run(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (candidates, executors):
        monkeypatch.setattr(module, "has_cuda", lambda: False)
    recipe = small_recipe(tiny_model("llama"), tmp_path, export={"precision": "int4", "target": "cuda"})
    out = convert(recipe=recipe, output=tmp_path / "out").folder
    report = Report.load(out / RESULTS)
    assert (
        report.speed is None
        and speed_sentence(report) == "Speed was not measured (not run: no CUDA device was at hand)."
    )
    notes = {check.name: check.note for check in report.checks}
    assert notes["kernel"] == notes["genai"] == "not run: no CUDA device was at hand" and "body on CPU KL" in notes
    assert [row.executor for row in report.onnx] == ["ONNX Runtime on the CPU", "standard ONNX ops on the CPU"]
    decoder = json.loads((out / "onnx" / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["session_options"]["provider_options"] == [{"cuda": {"enable_cuda_graph": "1"}}]
    assert verify(out, calibration=tmp_path / "text.txt").passed


def test_bfloat16_for_cuda_is_said_to_be_unverified(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (candidates, executors):
        monkeypatch.setattr(module, "has_cuda", lambda: False)
    recipe = small_recipe(tiny_model("llama"), tmp_path, export={"precision": "bf16", "target": "cuda"})
    report = Report.load(convert(recipe=recipe, output=tmp_path / "out").folder / RESULTS)
    assert report.onnx == []
    assert all(
        check.note.startswith("not run: ")
        for check in report.checks
        if check.name in ("body on CPU", "kernel", "genai")
    )


def test_budget_that_quantisation_alone_breaks_is_refused_before_calibration(tiny_model: Make, tmp_path: Path) -> None:
    recipe = small_recipe(tiny_model("llama"), tmp_path, export={"precision": "int4"}, budget={"max_kl": 1e-6})
    with pytest.raises(
        InputError,
        match=r"must leave room for int4, in which the dense graph alone raises perplexity by .* got max_kl 1e-06\. "
        r"Loosen it",
    ):
        convert(recipe=recipe, output=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work" / "stats").exists()


def test_search_gets_what_quantisation_leaves_of_the_budget() -> None:
    recipe = make_recipe(
        {"model": "m", "budget": {"max_ppl_increase": 0.10, "max_kl": 0.05}, "export": {"precision": "int4"}}
    )
    loss = ExecutorQuality(
        tokens=10, nll_torch=2.0, nll=2.0 + 0.04879016417, kl=0.02, agreement=0.9
    )  # exp of the difference is 1.05
    left = room(recipe, Graphs(Path("b"), Path("d"), loss)).budget
    assert left.max_ppl_increase == pytest.approx(1.10 / 1.05 - 1) and left.max_kl == pytest.approx(0.03)
    assert room(recipe, Graphs(Path("b"), Path("d"), None)) == recipe


def test_flags_and_recipes(tmp_path: Path) -> None:
    asked = compile_recipe(Flags(method="gate", precision="int8"))
    (tmp_path / "r.yaml").write_text(asked.yaml(), encoding="utf-8")
    assert read_recipe(tmp_path / "r.yaml") == asked and asked.export == Export(precision="int8")
    assert compile_recipe(Flags(target="cuda")).export == Export(precision="fp16", target="cuda")
    values = yaml.safe_load((tmp_path / "r.yaml").read_text())
    with pytest.raises(InputError, match="precision must be fp16, bf16, int8 or int4 for the target cuda"):
        make_recipe(values | {"export": {"precision": "fp32", "target": "cuda"}})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--precision", "int2"],
            "precision must be one of fp32, fp16, bf16, int8, int4, got 'int2'. Choose one of these.",
        ),
        (["--target", "npu"], "target must be one of cpu, cuda, got 'npu'. Choose one of these."),
        (
            ["--target", "cuda", "--precision", "fp32"],
            "precision must be fp16, bf16, int8 or int4 for the target cuda, got fp32.",
        ),
    ],
)
def test_command_line_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], said: str) -> None:
    done = call_cli(capsys, "convert", "-o", tmp_path / "out", *flags)
    assert done.status == 2 and said in done.err and not (tmp_path / "out").exists()


def test_estimates_know_the_precision(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Make, int4: Path, fp16: Path
) -> None:
    source, recipe = open_source(tiny_model("llama")), make_recipe({"model": str(tiny_model("llama"))})
    sizes = estimate(source, recipe, method_configs(recipe)).onnx_bytes
    for precision, folder in (("int4", int4), ("fp16", fp16)):
        stored = sum(path.stat().st_size for path in (folder / "onnx").glob("model.onnx.data"))
        assert sizes[precision] < stored < 1.5 * sizes[precision], "pages and rotary tables come on top"
    assert sizes["fp32"] > sizes["fp16"] == sizes["bf16"] > sizes["int8"] > sizes["int4"]
    done = call_cli(capsys, "convert", tiny_model("llama"), "-o", tmp_path / "out", "--precision", "int4", "--dry-run")
    assert "ONNX model " in done.out and " in int4\n" in done.out and "in fp32" not in done.out
    costs = {
        p: estimate(source, r, method_configs(r)).expected_cost["predictor"]
        for p in ("fp16", "int8", "int4")
        if (r := compile_recipe(Flags(str(tiny_model("llama")), "predictor", 0.5, precision=p)))
    }
    assert costs["fp16"] == costs["int8"] < costs["int4"], "a predictor in 8 bits beside weights in 4"


def test_older_manifests_have_no_onnx_part(int4: Path) -> None:
    values = read_manifest(int4).model_dump()
    del values["onnx"]
    assert Manifest.model_validate(values).onnx == {}

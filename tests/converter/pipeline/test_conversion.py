"""convert end to end: every architecture, resume, refusal, full disks, interruption. Nothing half-written
is ever left.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import MODEL_TYPES
from safetensors.torch import load_file, save_file
from small_recipe import small_recipe as write_recipe

from sparsegate.converter.checkpoint import writer
from sparsegate.converter.checkpoint.manifest import read_manifest, write_manifest
from sparsegate.converter.checkpoint.plan import load_plan
from sparsegate.converter.evaluation import checks as verification
from sparsegate.converter.evaluation.checks import Check, read_plan
from sparsegate.converter.evaluation.records import RESULTS, Report
from sparsegate.converter.methods import NEURON_METHODS
from sparsegate.converter.modeling.gated import load, load_dense
from sparsegate.converter.pipeline import candidates, graphs, schedule
from sparsegate.converter.pipeline import convert as conversion
from sparsegate.converter.pipeline import verify as verify_module
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.recipe import compile_recipe
from sparsegate.converter.pipeline.verify import verify
from sparsegate.converter.sources.predictors import export_predictors
from sparsegate.converter.text.windows import Batches
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.library import library_path

SPEED = {
    "settings": {"threads": 1, "prompt_tokens": 4, "new_tokens": 4},
    "command": "c",
    "quiet": True,
    "decode": {"ratio": 2.0},
    "baseline": {"prefill_tokens_per_s": 1.0, "decode_tokens_per_s": 3.0, "provider": "CPUExecutionProvider"},
    "candidate": {
        "prefill_tokens_per_s": 2.0,
        "decode_tokens_per_s": 6.0,
        "provider": "CPUExecutionProvider",
        "executor": "kernel",
    },
}
LIKE_LLAMA = ("mistral", "qwen2", "qwen3", "smollm3", "granite")
"""Their parts have tests of their own, and their whole chain is that of a Llama."""
TUNE = {"steps": 3, "data": 16, "windows": 2, "precision": "fp32"}


def small_recipe(model: Path, folder: Path, **changes: object) -> Path:
    """A recipe of every method, as small as can be."""
    stages = [{"method": "auto", "config": {"sparsity": 0.4, "tune": TUNE}}]
    return write_recipe(model, folder, **({"stages": stages} | changes))


@pytest.fixture(autouse=True)
def _no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_speed", lambda base, onnx, texts: {})


@pytest.fixture(scope="module")
def converted(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted tiny Llama; copy it before changing anything in it."""
    folder = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "_speed", lambda base, onnx, texts: SPEED)
        result = convert(recipe=small_recipe(tiny_model("llama"), folder), output=folder / "out", keep_stages=True)
    assert result.report is not None and not result.up_to_date
    return result.folder


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_LLAMA else []) for name in MODEL_TYPES]
)
def test_every_architecture_goes_through_the_whole_chain(
    model_type: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = convert(recipe=small_recipe(tiny_model(model_type), tmp_path), output=out)
    assert result.report is not None
    assert [row.method for row in result.report.rows] == ["dense", *NEURON_METHODS]
    assert not (tmp_path / "out.work").exists()
    found = verify(out, calibration=tmp_path / "text.txt")
    assert found.passed, [check for check in found.checks if not check.passed]
    names = {check.name for check in found.checks}
    assert {
        "files",
        "body logits",
        "body ops",
        "kernel ops",
        "torch ops",
        "kernel logits",
        "kernel NLL",
        "genai kernel greedy tokens",
        "density off target",
        "quality as recorded",
    } <= names
    assert abs(found.quality.density - 0.6) < 0.05
    assert found.quality.nll != found.quality.nll_dense


def test_every_method_is_measured_and_the_chosen_one_alone_exported_and_timed(converted: Path) -> None:
    work, report = converted.with_name("out.work"), Report.load(converted / RESULTS)
    (chosen,) = (row.method for row in report.rows if row.selected)
    least = min((row for row in report.rows if row.method != "dense"), key=lambda row: row.kl)
    assert least.method == chosen, "without a budget the least divergence decides"
    for folder, names in (
        ("plan", NEURON_METHODS),
        ("quality", NEURON_METHODS),
        ("checkpoint", [chosen]),
        ("onnx", [chosen]),
        ("measured", [chosen]),
    ):
        assert {path.name for path in (work / folder).iterdir()} == set(names), folder
    assert {path.name.partition("-")[0] for path in (work / "trained").iterdir()} == {"trained_gate", "predictor"}
    assert {row.method: row.decode_tokens_per_second for row in report.rows if row.decode_tokens_per_second} == {
        "dense": 3.0,
        chosen: 6.0,
    }
    assert all(
        abs(row.density - 0.6) < 0.05 and row.kl > 0 and row.block_cost for row in report.rows if row.method != "dense"
    )


def test_the_result_is_what_the_manifest_says(converted: Path) -> None:
    manifest = read_manifest(converted)
    assert {
        "config.json",
        "model.safetensors",
        "sparsity/sparsity.safetensors",
        "onnx/model.onnx",
        "onnx/genai_config.json",
        "README.md",
    } <= set(manifest.files)
    assert "header.json" not in manifest.files and "onnx/header.json" not in manifest.files
    assert manifest.budget["sparsity"] == 0.4
    assert str(converted.parent) not in manifest.recipe["model"]


def test_verify_fails_loudly_on_a_changed_threshold_and_a_broken_budget(converted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(converted, folder)
    path = folder / "sparsity" / "sparsity.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("tau"))
    tensors[name] = tensors[name] + 10.0
    save_file(tensors, path)
    failed = {
        check.name for check in verify(folder, calibration=converted.parent / "text.txt").checks if not check.passed
    }
    assert {"files", "body ops", "kernel ops", "quality as recorded"} <= failed
    with pytest.raises(InputError, match="must be the text that the checkpoint was made with"):
        verify(folder, calibration=converted / "config.json")

    shutil.rmtree(folder)
    shutil.copytree(converted, folder)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["budget"]["max_kl"] = 1e-9
    (folder / "manifest.json").write_text(json.dumps(raw))
    failed = {
        check.name for check in verify(folder, calibration=converted.parent / "text.txt").checks if not check.passed
    }
    assert failed == {"KL to dense", "manifest"}
    assert any(check.name == "budget" and check.note.startswith("not judged") for check in verify(folder).checks)


def test_verify_fails_on_files_off_the_list_and_on_costs_that_were_not_measured(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "check_onnx", lambda *_: [])
    folder = shutil.copytree(converted, tmp_path / "out")
    manifest = read_manifest(folder)
    listed = {name: file for name, file in manifest.files.items() if name != "onnx/model.onnx"}
    for change, names in (
        ({}, set()),
        ({"files": {}}, {"files"}),
        ({"files": listed}, {"files"}),
        ({"measured": manifest.measured | {"cost": 0.0}}, {"shares as recorded"}),
        ({"budget": manifest.budget | {"max_kl": 90.0}}, {"manifest"}),
    ):
        write_manifest(folder, manifest.model_copy(update=change))
        assert {
            check.name for check in verify(folder, calibration=converted.parent / "text.txt").checks if not check.passed
        } == names, change


def test_verify_compares_with_the_source(converted: Path, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    from models import make_model

    assert next(c for c in verify(converted, tiny_model("llama")).checks if c.name == "dense weights").passed
    other = make_model("llama", tmp_path / "other", seed=9)
    assert not next(c for c in verify(converted, other).checks if c.name == "dense weights").passed


def test_stock_transformers_loads_the_dense_model(converted: Path, tiny_model: Callable[[str], Path]) -> None:
    tokens = torch.arange(12)[None] + 5
    assert torch.equal(
        load_dense(converted)(input_ids=tokens).logits, load_dense(tiny_model("llama"))(input_ids=tokens).logits
    )
    assert not torch.equal(load(converted)(input_ids=tokens).logits, load_dense(converted)(input_ids=tokens).logits)


def test_the_same_again_is_up_to_date_and_another_is_refused(converted: Path) -> None:
    recipe = converted.parent / "recipe.yaml"
    stamp = (converted / "manifest.json").stat().st_mtime_ns
    assert convert(recipe=recipe, output=converted).up_to_date
    values = yaml.safe_load(recipe.read_text())
    other = converted.parent / "other.yaml"
    other.write_text(yaml.safe_dump(values | {"seed": 4}))
    with pytest.raises(InputError, match="OUT must be a new folder"):
        convert(recipe=other, output=converted)
    assert (converted / "manifest.json").stat().st_mtime_ns == stamp


def test_up_to_date_is_only_what_is_whole(converted: Path, tmp_path: Path) -> None:
    """A small file by its hash, weights by their size; and what was taken off the list, and a manifest of no files, are
    not up to date either.
    """
    recipe, out = converted.parent / "recipe.yaml", shutil.copytree(converted, tmp_path / "out")
    assert convert(recipe=recipe, output=out).up_to_date
    for name, spoil, reason in (
        (
            "onnx/model.onnx",
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
            "onnx/model.onnx has other bytes",
        ),
        ("model.safetensors", lambda path: path.unlink(), "model.safetensors is missing"),
        (
            "manifest.json",
            lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {}})),
            "is not listed",
        ),
    ):
        spoil(out / name)
        with pytest.raises(
            InputError,
            match=f"OUT must be as its manifest.json says, got .*{reason}.* Remove the folder and run the same command "
            "again",
        ):
            convert(recipe=recipe, output=out)
        shutil.copyfile(converted / name, out / name)
    (out / "README.md").write_text("edited by hand")
    assert convert(recipe=recipe, output=out).up_to_date


def test_an_output_that_is_something_else_is_refused_and_kept(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        convert(recipe=small_recipe(tiny_model("llama"), tmp_path), output=out)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]


def test_two_conversions_with_one_seed_give_the_same_weights(converted: Path, tmp_path: Path) -> None:
    result = convert(recipe=converted.parent / "recipe.yaml", output=tmp_path / "again")
    first, second = read_manifest(converted).files, read_manifest(result.folder).files
    for name in ("config.json", "model.safetensors", "sparsity/sparsity.safetensors", "onnx/model.onnx.data"):
        assert first[name] == second[name], name


def test_executors_that_disagreed_are_judged_again(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, judged = write_recipe(tiny_model("llama"), tmp_path), candidates.check_onnx
    timed: list[Path] = []
    monkeypatch.setattr(candidates, "_speed", lambda base, onnx, texts: timed.append(onnx) or {})
    monkeypatch.setattr(
        candidates, "check_onnx", lambda *_: [Check(name="kernel ops", value=2.0, bound=1.0, passed=False)]
    )
    with pytest.raises(InputError, match="executors must agree, got gate: kernel ops 2 against 1"):
        convert(recipe=recipe, output=tmp_path / "out")
    assert not timed, "what is refused is not timed"
    measured = tmp_path / "out.work" / "measured" / "gate"
    assert not measured.exists()
    monkeypatch.setattr(candidates, "check_onnx", judged)
    convert(recipe=recipe, output=tmp_path / "out", keep_stages=True)
    stored = json.loads((measured / "measured.json").read_text(encoding="utf-8"))
    (measured / "measured.json").write_text(
        json.dumps(stored | {"checks": [row | {"passed": False} for row in stored["checks"]]}), encoding="utf-8"
    )
    shutil.rmtree(tmp_path / "out")  # as an older version stored a disagreement
    report = convert(recipe=recipe, output=tmp_path / "out").report
    assert report is not None and all(check.passed for check in report.checks) and len(timed) == 2


def test_a_budget_that_cannot_be_met_writes_nothing(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = small_recipe(tiny_model("llama"), tmp_path, budget={"max_kl": 1e-9})
    with pytest.raises(InputError, match="KL to dense"):
        convert(recipe=recipe, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def one_method(method: str, **config: object) -> list[dict[str, object]]:
    return [{"method": method, "config": config}]


@pytest.mark.parametrize("method", ["chess", "chess+wina"])
def test_a_budget_is_searched(
    method: str, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The divergence comes near the budget on the search windows; on others, of a text this short, it lands somewhere
    near.
    """
    met: list[float] = []
    real = schedule.sparsest

    def recorded(*arguments: Any) -> Any:
        found = real(*arguments)
        met.append(found[2].kl)
        return found

    monkeypatch.setattr(schedule, "sparsest", recorded)
    monkeypatch.setattr(verification, "UNSEEN_KL", 9.0)
    recipe = small_recipe(tiny_model("llama"), tmp_path, stages=one_method(method), budget={"max_kl": 0.2})
    result = convert(recipe=recipe, output=tmp_path / "out")
    assert len(met) == 1 and 0.2 * 0.9 < met[0] <= 0.2
    manifest = read_manifest(result.folder)
    assert manifest.budget == {"max_ppl_increase": None, "max_kl": 0.2, "sparsity": None, "searched": True}
    assert (
        result.report is not None
        and result.report.chosen.block_cost is not None
        and 0.05 < result.report.chosen.block_cost < 1
    )
    assert {site.kind.partition(":")[0] for site in read_plan(result.folder)} == (
        {"ffn"} if method == "chess" else {"ffn", "linear"}
    )
    assert all(layer.density_target is None for layer in result.report.layers)
    found = {check.name: check for check in verify(result.folder, calibration=tmp_path / "text.txt").checks}
    assert (
        found["KL to dense"].note.startswith("asked for 0.2 and met by search")
        and found["kernel logits"].passed
        and "density off target" not in found
    )


def test_a_trained_method_goes_down_to_its_budget(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "LEVELS", (0.75, 0.5, 0.25))
    monkeypatch.setattr(verification, "UNSEEN_KL", 9.0)
    recipe = small_recipe(
        tiny_model("llama"), tmp_path, stages=one_method("predictor", tune=TUNE), budget={"max_kl": 0.3}
    )
    result = convert(recipe=recipe, output=tmp_path / "out", keep_stages=True)
    levels = sorted(path.name for path in (tmp_path / "out.work" / "trained").iterdir())
    assert levels[-1] == "predictor-budget-0.750" and set(levels) <= {
        f"predictor-budget-{level:.3f}" for level in schedule.LEVELS
    }
    (row,) = (row for row in result.report.rows if row.selected) if result.report else ()
    assert 0 < row.kl and 0.05 < row.density < 0.98 and read_manifest(result.folder).budget["searched"] is True


def test_a_searched_budget_that_no_method_meets(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = small_recipe(tiny_model("llama"), tmp_path, stages=one_method("gate"), budget={"max_kl": 0.0})
    with pytest.raises(InputError, match="The budget must be one that a method can meet, got none of gate"):
        convert(recipe=recipe, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_calibration_on_text_of_the_model_itself(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """What is measured on is the bundled text; a user's own text stays unknown to it, and the same again samples
    nothing.
    """
    recipe = small_recipe(
        tiny_model("llama"),
        tmp_path,
        stages=one_method("gate"),
        calibration={"generated": True, "windows": 4, "length": 40},
    )
    result = convert(recipe=recipe, output=tmp_path / "out", keep_stages=True)
    assert (
        result.report is not None
        and result.report.calibration.name == "text sampled from the dense model"
        and result.report.calibration.tokens == 160
    )
    assert (
        result.report.evaluation is not None
        and result.report.evaluation.name == "Python standard library modules, held out"
    )
    tokens = load_file(tmp_path / "out.work" / "generated" / "tokens.safetensors")["tokens"]
    assert (
        tokens.shape == (4, 40)
        and Batches(tokens, torch.ones_like(tokens, dtype=torch.bool)).sha256 == result.report.calibration.hash
    )
    assert read_manifest(result.folder).calibration["file"] is None and verify(result.folder).passed
    shutil.rmtree(tmp_path / "out.work")
    assert convert(recipe=recipe, output=tmp_path / "out").up_to_date and not (tmp_path / "out.work").exists()


def test_imported_predictors_decide_as_in_their_own_system(
    converted: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Trained predictors go out and come in again: the same density, no wish for any."""
    plan = load_plan(converted.with_name("out.work") / "plan" / "predictor")
    folder = export_predictors(plan, tmp_path / "predictors", bias=True)
    recipe = small_recipe(tiny_model("llama"), tmp_path, stages=one_method("imported", folder=str(folder)))
    result = convert(recipe=recipe, output=tmp_path / "out")
    assert result.report is not None and result.report.chosen.method == "imported"
    assert read_manifest(result.folder).budget["sparsity"] is None and str(tmp_path) not in str(result.report.recipe)
    (before,) = (row for row in Report.load(converted / RESULTS).rows if row.method == "predictor")
    assert result.report.chosen.density == pytest.approx(
        before.density, abs=1e-3
    ) and result.report.chosen.kl == pytest.approx(before.kl, rel=0.02)
    assert all(layer.recall is not None and layer.density_target is None for layer in result.report.layers)


def test_labels_of_an_oracle(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    stages = one_method("predictor", sparsity=0.4, loss="cross_entropy", score="corrected_gxo", steps=40, batch=64)
    result = convert(
        recipe=small_recipe(tiny_model("llama"), tmp_path, stages=stages), output=tmp_path / "out", keep_stages=True
    )
    assert result.report is not None and all(
        layer.recall is not None and layer.recall > 0.6 for layer in result.report.layers
    )
    assert (tmp_path / "out.work" / "stats_labels" / "layers.1.ffn" / "header.json").is_file()
    assert (
        not list((tmp_path / "out.work").rglob("samples.*.safetensors"))
        and not (tmp_path / "out.work" / "trained").exists()
    )


def test_a_neuron_whose_up_is_always_zero(tmp_path: Path) -> None:
    """As in models padded to a round width: CHESS never keeps it, and training from there stays finite."""
    from models import make_model

    model = make_model("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"][5] = 0.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = convert(
        recipe=small_recipe(model, tmp_path, stages=one_method("trained_gate", sparsity=0.4, tune=TUNE)),
        output=tmp_path / "out",
    )
    for (entry,) in read_plan(result.folder).values():
        assert bool(entry.tau.isfinite().all()) and float(entry.tau[5]) > 1e3 > float(entry.tau[:5].max())


def test_dry_run_writes_nothing(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    result = convert(str(tiny_model("llama")), output=tmp_path / "out", dry_run=True)
    assert result.estimate is not None and result.estimate.disk_bytes > 0 and result.report is None
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(InputError, match="sparsity must lie strictly between 0 and 1"):
        compile_recipe(None, None, sparsity, None, None, None, None, None, None, None)


def test_a_recipe_excludes_the_flags_that_it_covers(converted: Path) -> None:
    with pytest.raises(InputError, match="--recipe must stand without the flags"):
        convert(recipe=converted.parent / "recipe.yaml", sparsity=0.5)


@pytest.mark.parametrize("text, reason", [("", "empty"), ("x = 1\n", "at least 512 tokens")])
def test_empty_or_short_calibration_text_is_refused(
    text: str, reason: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(text)
    with pytest.raises(InputError, match=reason):
        convert(str(tiny_model("llama")), output=tmp_path / "out", calibration=tmp_path / "text.txt")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_half_written_and_the_next_run_goes_on(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(tiny_model("llama"), tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(writer.shutil, "copyfile", full)
        with pytest.raises(InputError, match="Disk space must suffice"):
            convert(recipe=recipe, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.partial-*"))
    plans = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.work" / "plan").rglob("header.json")}
    assert len(plans) == len(NEURON_METHODS)
    convert(recipe=recipe, output=tmp_path / "out", keep_stages=True)
    assert {path: path.stat().st_mtime_ns for path in plans} == plans


def test_an_interruption_of_the_last_step_costs_nothing(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(tiny_model("llama"), tmp_path)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(recipe=recipe, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = convert(recipe=recipe, output=tmp_path / "out").folder
    assert verify(out, calibration=tmp_path / "text.txt").passed
    assert all((out / name).stat().st_nlink == 1 for name in ("model.safetensors", "onnx/model.onnx.data"))
    (tmp_path / "out.work").mkdir()
    os.link(out / "config.json", tmp_path / "out.work" / "config.json")
    assert convert(recipe=recipe, output=out).up_to_date and (tmp_path / "out.work" / "config.json").exists(), (
        "no folder of ours"
    )


def run_cli(arguments: list[str], preamble: str = "") -> subprocess.Popen[str]:
    code = f"{preamble}\nimport sys\nfrom sparsegate.converter.cli import main\nmain(sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_file_size_limit_ends_in_one_line(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = small_recipe(tiny_model("llama"), tmp_path)
    limit = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, "
        "signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))"
    )
    child = run_cli(["convert", "--recipe", str(recipe), "-o", str(tmp_path / "out")], limit)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 2
    assert "Traceback" not in errors
    assert "Disk space must suffice" in errors.splitlines()[-1]
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.partial-*"))


def test_ctrl_c_leaves_nothing_half_written_and_the_next_run_goes_on(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = small_recipe(
        tiny_model("llama"), tmp_path, stages=one_method("predictor", sparsity=0.4, tune=TUNE | {"steps": 100000})
    )
    terminal = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"  # whatever the caller ignores
    child = run_cli(["convert", "--recipe", str(recipe), "-o", str(tmp_path / "out")], terminal)
    finished = tmp_path / "out.work" / "stats" / "layers.1.ffn" / "header.json"
    deadline = time.time() + 90
    while not finished.exists() and child.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "Traceback" not in errors and "Interrupted" in errors
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.partial-*"))
    stamp = finished.stat().st_mtime_ns
    small = small_recipe(tiny_model("llama"), tmp_path, stages=one_method("predictor", sparsity=0.4, tune=TUNE))
    convert(recipe=small, output=tmp_path / "out", keep_stages=True)
    assert finished.stat().st_mtime_ns == stamp


def test_a_wrong_base_graph_stops_the_conversion(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models import make_model

    other = make_model("llama", tmp_path / "other", seed=5)
    built = graphs.build_base
    monkeypatch.setattr(graphs, "build_base", lambda folder, out: built(other, out))
    with pytest.raises(InputError):
        convert(recipe=small_recipe(tiny_model("llama"), tmp_path), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_native_library_is_installed() -> None:
    assert library_path().is_file()

"""convert end to end: every architecture, resume, refusal, full disks, interruption. Nothing half-written is ever left."""

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

import pytest
import yaml
from models import MODEL_TYPES
from small_recipe import small_recipe as write_recipe

from sparsegate.converter import candidates, conversion, writer
from sparsegate.converter.artifact import InputError
from sparsegate.converter.conversion import convert, verify
from sparsegate.converter.manifest import read_manifest
from sparsegate.converter.planning import compile_recipe
from sparsegate.converter.reference import load, load_dense
from sparsegate.runtime_onnx import library_path


def small_recipe(model: Path, folder: Path, **changes: object) -> Path:
    """A recipe of every method, as small as can be."""
    stages = [{"method": "auto", "config": {"sparsity": 0.4, "steps": 40, "batch": 128}}]
    return write_recipe(model, folder, **({"stages": stages} | changes))


@pytest.fixture(autouse=True)
def _no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_speed", lambda base, onnx, texts: {})


@pytest.fixture(scope="module")
def converted(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted tiny Llama; copy it before changing anything in it."""
    folder = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "_speed", lambda base, onnx, texts: {})
        result = convert(recipe=small_recipe(tiny_model("llama"), folder), output=folder / "out", keep_stages=True)
    assert result.report is not None and not result.up_to_date
    return result.folder


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_architecture_goes_through_the_whole_chain(model_type: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = convert(recipe=small_recipe(tiny_model(model_type), tmp_path), output=out)
    assert result.report is not None
    assert [row.method for row in result.report.rows] == ["dense", "gate", "predictor"]
    assert not (tmp_path / "out.work").exists()
    found = verify(out, calibration=tmp_path / "text.txt")
    assert found.passed, [check for check in found.checks if not check.passed]
    names = {check.name for check in found.checks}
    assert {
        "files",
        "body logits",
        "genai body greedy tokens",
        "body NLL",
        "kernel logits",
        "kernel NLL",
        "genai kernel greedy tokens",
        "density off target",
        "quality as recorded",
    } <= names
    assert abs(found.quality.density - 0.6) < 0.05
    assert found.quality.nll != found.quality.nll_dense


def test_the_result_is_what_the_manifest_says(converted: Path) -> None:
    manifest = read_manifest(converted)
    assert {"config.json", "model.safetensors", "sparsity/sparsity.safetensors", "onnx/model.onnx", "onnx/genai_config.json", "README.md"} <= set(
        manifest.files
    )
    assert "header.json" not in manifest.files and "onnx/header.json" not in manifest.files
    assert manifest.budget["sparsity"] == 0.4
    assert str(converted.parent) not in manifest.recipe["model"]


def test_verify_fails_loudly_on_a_changed_threshold_and_a_broken_budget(converted: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "out"
    shutil.copytree(converted, folder)
    path = folder / "sparsity" / "sparsity.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("tau"))
    tensors[name] = tensors[name] + 10.0
    save_file(tensors, path)
    failed = {check.name for check in verify(folder, calibration=converted.parent / "text.txt").checks if not check.passed}
    assert {"files", "body logits", "kernel logits", "quality as recorded"} <= failed
    with pytest.raises(InputError, match="must be the text that the checkpoint was made with"):
        verify(folder, calibration=converted / "config.json")

    shutil.rmtree(folder)
    shutil.copytree(converted, folder)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["budget"]["max_kl"] = 1e-9
    (folder / "manifest.json").write_text(json.dumps(raw))
    failed = {check.name for check in verify(folder, calibration=converted.parent / "text.txt").checks if not check.passed}
    assert failed == {"KL to dense"}
    assert any(check.name == "budget" and check.note.startswith("not judged") for check in verify(folder).checks)


def test_verify_compares_with_the_source(converted: Path, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    from models import make_model

    assert next(c for c in verify(converted, tiny_model("llama")).checks if c.name == "dense weights").passed
    other = make_model("llama", tmp_path / "other", seed=9)
    assert not next(c for c in verify(converted, other).checks if c.name == "dense weights").passed


def test_stock_transformers_loads_the_dense_model(converted: Path, tiny_model: Callable[[str], Path]) -> None:
    import torch

    tokens = torch.arange(12)[None] + 5
    assert torch.equal(load_dense(converted)(input_ids=tokens).logits, load_dense(tiny_model("llama"))(input_ids=tokens).logits)
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


def test_an_output_that_is_something_else_is_refused_and_kept(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
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


def test_a_budget_that_cannot_be_met_writes_nothing(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = small_recipe(tiny_model("llama"), tmp_path, budget={"max_kl": 1e-9})
    with pytest.raises(InputError, match="KL to dense"):
        convert(recipe=recipe, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
def test_empty_or_short_calibration_text_is_refused(text: str, reason: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
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
    assert len(plans) == 2
    convert(recipe=recipe, output=tmp_path / "out", keep_stages=True)
    assert {path: path.stat().st_mtime_ns for path in plans} == plans


def test_an_interruption_of_the_last_step_costs_nothing(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert convert(recipe=recipe, output=out).up_to_date and (tmp_path / "out.work").exists()
    os.link(out / "config.json", tmp_path / "out.work" / "config.json")
    assert convert(recipe=recipe, output=out).up_to_date and not (tmp_path / "out.work").exists()


def run_cli(arguments: list[str], preamble: str = "") -> subprocess.Popen[str]:
    code = f"{preamble}\nimport sys\nfrom sparsegate.converter.cli import main\nmain(sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_file_size_limit_ends_in_one_line(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = small_recipe(tiny_model("llama"), tmp_path)
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))"
    child = run_cli(["convert", "--recipe", str(recipe), "-o", str(tmp_path / "out")], limit)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 1
    assert "Traceback" not in errors
    assert "Disk space must suffice" in errors.splitlines()[-1]
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.partial-*"))


def test_ctrl_c_leaves_nothing_half_written_and_the_next_run_goes_on(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = small_recipe(tiny_model("llama"), tmp_path, stages=[{"method": "predictor", "config": {"sparsity": 0.4, "steps": 100000, "batch": 64}}])
    child = run_cli(["convert", "--recipe", str(recipe), "-o", str(tmp_path / "out")])
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
    small = small_recipe(tiny_model("llama"), tmp_path, stages=[{"method": "predictor", "config": {"sparsity": 0.4, "steps": 40, "batch": 64}}])
    convert(recipe=small, output=tmp_path / "out", keep_stages=True)
    assert finished.stat().st_mtime_ns == stamp


def test_a_wrong_base_graph_stops_the_conversion(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from models import make_model

    other = make_model("llama", tmp_path / "other", seed=5)
    built = candidates.build_base
    monkeypatch.setattr(candidates, "build_base", lambda folder, out: built(other, out))
    with pytest.raises(InputError):
        convert(recipe=small_recipe(tiny_model("llama"), tmp_path), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_native_library_is_installed() -> None:
    assert library_path().is_file()

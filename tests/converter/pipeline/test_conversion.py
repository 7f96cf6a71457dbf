"""convert end to end: every architecture, what is written and verified, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conversions import SPEED, TUNE, one_method, small_recipe
from models import MODEL_TYPES
from safetensors.torch import load_file, save_file
from small_recipe import small_recipe as write_recipe

from sparsegate.converter.checkpoint.manifest import read_manifest, write_manifest
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.evaluation.checks import Check
from sparsegate.converter.evaluation.records import RESULTS, Report
from sparsegate.converter.methods import AUTO
from sparsegate.converter.modeling.gated import load, load_dense
from sparsegate.converter.pipeline import candidates
from sparsegate.converter.pipeline import verify as verify_module
from sparsegate.converter.pipeline.configs import method_configs
from sparsegate.converter.pipeline.conversion import Conversion
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.recipe import Flags, compile_recipe, read_recipe
from sparsegate.converter.pipeline.schedule import once
from sparsegate.converter.pipeline.texts import make_texts
from sparsegate.converter.pipeline.verify import verify
from sparsegate.converter.sources.predictor_folder import export_predictors
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.library import library_path

pytestmark = pytest.mark.usefixtures("no_speed")
LIKE_LLAMA = ("mistral", "qwen2", "qwen3", "smollm3", "granite")
"""Their parts have tests of their own, and their whole chain is that of a Llama."""


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
    assert [row.method for row in result.report.rows] == ["dense", *AUTO[False]]
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
        ("plan", AUTO[False]),
        ("quality", AUTO[False]),
        ("checkpoint", [chosen]),
        ("onnx", [chosen]),
        ("measured", [chosen]),
    ):
        assert {path.name for path in (work / folder).iterdir()} == set(names), folder
    assert {path.name.partition("-")[0] for path in (work / "trained").iterdir()} == {"trained_gate"}
    expected = {stage.name for stage in report.stages if stage.expected_seconds is not None}
    assert expected >= {"calibrate", "quality", "train trained_gate", "quality trained", "export"}
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


def test_imported_predictors_decide_as_in_their_own_system(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Trained predictors go out and come in again: the same density, no wish for any."""
    source, stages = open_source(tiny_model("llama")), one_method("predictor", sparsity=0.4, tune=TUNE)
    trained = read_recipe(small_recipe(source.folder, tmp_path, stages=stages))
    conversion = Conversion(source, make_texts(source, trained, TUNE["data"]), trained, tmp_path / "work")
    (before,) = candidates.measure(conversion, once(conversion, method_configs(trained)), {})
    folder = export_predictors(before.plan, tmp_path / "predictors", bias=True)
    recipe = small_recipe(tiny_model("llama"), tmp_path, stages=one_method("imported", folder=str(folder)))
    result = convert(recipe=recipe, output=tmp_path / "out")
    assert result.report is not None and result.report.chosen.method == "imported"
    assert read_manifest(result.folder).budget["sparsity"] is None and str(tmp_path) not in str(result.report.recipe)
    chosen, quality = result.report.chosen, before.quality
    assert (chosen.density, chosen.kl) == (
        pytest.approx(quality.density, abs=1e-3),
        pytest.approx(quality.kl, rel=0.02),
    )
    assert all(layer.recall is not None and layer.density_target is None for layer in result.report.layers)


def test_dry_run_writes_nothing(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    result = convert(str(tiny_model("llama")), output=tmp_path / "out", dry_run=True)
    assert result.estimate is not None and result.estimate.disk_bytes > 0 and result.report is None
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(InputError, match="sparsity must lie strictly between 0 and 1"):
        compile_recipe(Flags(sparsity=sparsity))


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


def test_the_native_library_is_installed() -> None:
    assert library_path().is_file()

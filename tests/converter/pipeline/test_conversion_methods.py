"""convert by a budget, on other texts and labels, and on odd weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import TUNE, one_method, small_recipe
from plan_checks import gates
from safetensors.torch import load_file, save_file

from sparsegate.converter.checkpoint.manifest import read_manifest
from sparsegate.converter.evaluation import checks as verification
from sparsegate.converter.evaluation.checks import read_plan
from sparsegate.converter.pipeline import schedule
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.verify import verify
from sparsegate.converter.text.windows import Batches
from sparsegate.runtime_onnx.errors import InputError

pytestmark = pytest.mark.usefixtures("no_speed")


def test_a_budget_that_cannot_be_met_writes_nothing(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = small_recipe(tiny_model("llama"), tmp_path, budget={"max_kl": 1e-9})
    with pytest.raises(InputError, match="KL to dense"):
        convert(recipe=recipe, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["chess", pytest.param("chess+wina", marks=pytest.mark.slow)])
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
    for entry in gates(read_plan(result.folder)).values():
        assert bool(entry.tau.isfinite().all()) and float(entry.tau[5]) > 1e3 > float(entry.tau[:5].max())

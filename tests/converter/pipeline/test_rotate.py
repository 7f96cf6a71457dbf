"""A rotated model is an ordinary model folder, and a conversion of it is checked as any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import one_method, small_recipe
from models import make_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsegate.converter.checkpoint.plan import Exact, SitePlan, Swap
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.checkpoint.stage import CheckError
from sparsegate.converter.checkpoint.writer import write_checkpoint
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.modeling.rotation import error_bound, logit_error
from sparsegate.converter.pipeline import rotate
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.recipe import Flags, compile_recipe
from sparsegate.converter.pipeline.rotate import rotated
from sparsegate.converter.pipeline.verify import verify
from sparsegate.converter.text.windows import Batches
from sparsegate.runtime_onnx.errors import InputError

TOKENS = torch.randint(290, (8, 24), generator=torch.Generator().manual_seed(0))
BATCHES = Batches(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))


@torch.no_grad()
def test_a_tied_model_in_shards_becomes_an_ordinary_folder_with_its_own_head(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "tied", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    source = rotated(open_source(folder), BATCHES, tmp_path / "rotated")
    assert json.loads((source.folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert "sparsity" not in json.loads((source.folder / "config.json").read_text())
    read: Any = AutoModelForCausalLM.from_pretrained(source.folder, output_loading_info=True)
    turned, loading = read
    assert not any(loading.values())
    expected = model(input_ids=TOKENS).logits
    assert float((turned(input_ids=TOKENS).logits - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert torch.equal(turned.model.norm.weight, torch.ones(64))
    assert not torch.allclose(turned.lm_head.weight, turned.model.embed_tokens.weight, atol=0.1)
    assert source.name == "tied"


@pytest.mark.slow
@torch.no_grad()
def test_a_model_in_half_precision_stays_so_and_is_as_near_as_its_rounding(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen2"), dtype=torch.bfloat16).eval()
    shutil.copytree(tiny_model("qwen2"), tmp_path / "half")
    model.save_pretrained(tmp_path / "half")
    source = rotated(open_source(tmp_path / "half"), BATCHES, tmp_path / "rotated")
    assert {info.dtype for info in source.tensors.values()} == {"BF16"}
    turned = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    error = logit_error(turned(input_ids=TOKENS).logits, model.float()(input_ids=TOKENS).logits)
    assert 1e-7 < error < error_bound(source) == 2e-2


@torch.no_grad()
def test_swapped_activations_stay_under_a_rotation(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    stock = open_source(tiny_model("llama"))
    (tmp_path / "swapped").mkdir()
    write_checkpoint(
        stock,
        {site: SitePlan((Swap("drelu"),), Exact()) for site in stock.arch.sites(stock.config)},
        tmp_path / "swapped",
    )
    source = rotated(open_source(tmp_path / "swapped"), BATCHES, tmp_path / "rotated")
    assert source.swaps.keys() == set(stock.arch.sites(stock.config))
    logits = [
        load_dense(folder)(input_ids=TOKENS).logits for folder in (source.folder, tmp_path / "swapped", stock.folder)
    ]
    assert logit_error(logits[0], logits[1]) < 1e-8 < 1e-3 < logit_error(logits[0], logits[2])


def test_a_model_that_is_not_the_same_is_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = rotate.rotated_weights
    monkeypatch.setattr(
        rotate, "rotated_weights", lambda *a: {k: w for k, w in real(*a) if "layers.1.mlp.down_proj" not in k}
    )
    with pytest.raises(CheckError, match="The rotated model must have the model's logits within 1e-05"):
        rotated(open_source(tiny_model("llama")), BATCHES, tmp_path / "rotated")
    assert not (tmp_path / "rotated").exists()


def test_a_type_that_cannot_be_rotated_is_refused_before_anything(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    for dry_run in (True, False):
        with pytest.raises(InputError, match="RMS norms right before .* got gemma2. Leave rotate out"):
            recipe = small_recipe(tiny_model("gemma2"), tmp_path, stages=one_method("teal"), rotate=True)
            convert(recipe=recipe, output=tmp_path / "out", dry_run=dry_run)
    assert not (tmp_path / "out").exists()


def test_the_flag_is_the_recipes_rotation(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    assert compile_recipe(Flags("m", "teal", 0.5, rotate=True)) == compile_recipe(Flags("m", "teal", 0.5)).model_copy(
        update={"rotate": True}
    )
    with pytest.raises(InputError, match="covers, got rotate as well"):
        compile_recipe(Flags(recipe="rotated", rotate=True))
    with pytest.raises(InputError, match="got gemma2. Leave rotate out"):
        convert(str(tiny_model("gemma2")), output=tmp_path / "out", method="teal", rotate=True)


@pytest.mark.slow
@pytest.mark.usefixtures("no_speed")
def test_a_rotated_conversion_is_exported_and_verified_against_the_model(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """qwen2: the head is tied in the source."""
    model = tmp_path / "named"
    shutil.copytree(tiny_model("qwen2"), model)
    recipe = small_recipe(model, tmp_path, stages=one_method("wina", sparsity=0.3, greedy=False), rotate=True)
    result = convert(recipe=recipe, output=tmp_path / "out", keep_stages=True)
    assert result.report is not None and all(check.passed for check in result.report.checks)
    assert result.report.recipe["rotate"] is True and result.report.model == "named"
    assert "after a rotation of the residual stream" in (result.folder / "README.md").read_text(encoding="utf-8")
    weights, original = load_file(result.folder / "model.safetensors"), load_file(model / "model.safetensors")
    assert set(weights) - set(original) == {"lm_head.weight"}
    assert convert(recipe=recipe, output=tmp_path / "out").up_to_date
    checked = verify(result.folder, source=model, calibration=tmp_path / "text.txt")
    assert checked.passed
    assert {check.name for check in checked.checks} >= {"dense weights", "kernel logits"}

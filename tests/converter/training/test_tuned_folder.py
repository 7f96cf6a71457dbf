"""tune: folder in, folder out, the record's numbers are the folder's, resume to the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM
from tuning_cases import recipe, tuned, weights

from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.evaluation.recovery_record import RECOVERY, RecoveryRecord
from sparsegate.converter.modeling.gated import load, load_dense
from sparsegate.converter.pipeline import tune as tune_module
from sparsegate.converter.pipeline.tune import tune
from sparsegate.converter.training import end_to_end, recovery
from sparsegate.runtime_onnx.untrusted import read_json

pytestmark = pytest.mark.usefixtures("no_speed")


def test_a_tuned_folder(model: Path, tmp_path: Path) -> None:
    out = tuned(model, tmp_path, steps=12)
    assert not (tmp_path / "out.work").exists()
    config = read_json(out / "config.json", "config")
    assert config["model_type"] == "sparsegate_llama" and config["sparsity"]["base_activation"] == "silu"
    assert {site["activation"] for site in config["sparsity"]["sites"].values()} == {"drelu"}
    before, after = weights(model), weights(out)
    assert before.keys() == after.keys() and all(before[name].dtype == after[name].dtype for name in before)
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight")), (
        "all weights are trained"
    )
    record = RecoveryRecord.load(out / RECOVERY)
    assert (
        record.activation == "drelu"
        and record.text.sampled
        and record.text.tokens == 8 * 24
        and record.tokens_trained == 12 * 4 * 24
    )
    assert [point.step for point in record.curve] == [10, 12] and [point.step for point in record.heldout] == list(
        range(1, 13)
    )
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokens = torch.randint(3, 290, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(load(out)(input_ids=tokens).logits, found(input_ids=tokens).logits), "exact zeros lose nothing"
    assert record.recovered.kl < record.swapped.kl and record.recovered.density < record.swapped.density


def test_the_record_s_quality_is_the_folder_s(model: Path, tmp_path: Path) -> None:
    out = tuned(model, tmp_path)
    record = RecoveryRecord.load(out / RECOVERY)
    student, teacher = load_dense(out), load_dense(model)
    asked = tune_module.read_recipe(tmp_path / "recipe.yaml")
    heldout = tune_module.make_heldout(open_source(model), asked)
    nll, kl, count, open_units = 0.0, 0.0, 0, []
    hooks = [
        b.mlp.down_proj.register_forward_pre_hook(lambda m, x: open_units.append((x[0] != 0).float().mean(-1)))
        for b in student.model.layers
    ]
    with torch.no_grad():
        for row, mask in zip(heldout.tokens, heldout.mask, strict=True):
            if int(mask.sum()) > 1:
                tokens = row[mask][None]
                p, q = (m(input_ids=tokens).logits[0, :-1].double().log_softmax(-1) for m in (teacher, student))
                nll -= float(q.gather(1, tokens[0, 1:, None]).sum())
                kl += float((p.exp() * (p - q)).sum())
                count += len(q)
    for hook in hooks:
        hook.remove()
    assert record.recovered.nll == pytest.approx(nll / count, abs=1e-5) and record.recovered.kl == pytest.approx(
        kl / count, abs=1e-5
    )
    assert record.recovered.density == pytest.approx(
        float(torch.cat([part.flatten() for part in open_units]).mean()), abs=1e-6
    )


def test_an_interrupted_run_goes_on_to_the_same_bits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"steps": 8, "optimizer": "muon", "accumulate": 2, "windows": 2}
    whole = tuned(model, tmp_path, "whole", **changes)
    plain, steps = recovery.RecoveryObjective.loss, []

    def cut(self: Any, tokens: Tensor, mask: Tensor, step: int) -> Tensor:
        steps.append(step)
        if step == 5 and len(steps) < 20:
            raise KeyboardInterrupt
        return plain(self, tokens, mask, step)

    monkeypatch.setattr(recovery.RecoveryObjective, "loss", cut)
    settings = end_to_end.settings_of
    monkeypatch.setattr(end_to_end, "settings_of", lambda asked, seed: replace(settings(asked, seed), save_every=3))
    with pytest.raises(KeyboardInterrupt):
        tuned(model, tmp_path, "cut", **changes)
    assert not (tmp_path / "cut").exists() and (tmp_path / "cut.work").exists()
    steps.extend([-1] * 20)
    resumed = tuned(model, tmp_path, "cut", **changes)
    assert steps[steps.index(-1) + 20] == 3, "it goes on from the last stored step"
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())
    one, other = (RecoveryRecord.load(folder / RECOVERY) for folder in (whole, resumed))
    assert one.recovered == other.recovered and one.heldout == other.heldout


def test_the_seed_decides(model: Path, tmp_path: Path) -> None:
    path = recipe(model, tmp_path)
    first, again, other = (
        weights(tune(output=tmp_path / f"{name}", recipe=path, seed=seed).folder)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"seed": 1}))
    from_recipe = weights(tune(output=tmp_path / "d", recipe=path).folder)
    assert all(torch.equal(tensor, from_recipe[name]) for name, tensor in other.items())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])

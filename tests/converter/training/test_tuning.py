"""tune: folder in, folder out; resume to the same bits, two processes, LoRA, blocks, predictors, texts, and conversions
whose first stage trains.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
import yaml
from models import TEXT
from safetensors.torch import load_file, save_file
from small_recipe import call_cli, small_recipe
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsegate.converter.arch import load_arch
from sparsegate.converter.checkpoint.manifest import read_manifest
from sparsegate.converter.checkpoint.plan import Predictor, Swap
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.checkpoint.stage import (
    Header,
    hash_json,
    read_header,
    write_header,
    write_json,
    write_tensors,
)
from sparsegate.converter.evaluation.checks import read_plan
from sparsegate.converter.evaluation.records import RESULTS, Report
from sparsegate.converter.evaluation.recovery_record import RECOVERY, RecoveryRecord
from sparsegate.converter.modeling.blocks import swap
from sparsegate.converter.modeling.distributed import mean_gradients, processes, share_of, world
from sparsegate.converter.modeling.gated import load, load_dense
from sparsegate.converter.modeling.predictor import fresh_predictor
from sparsegate.converter.pipeline import candidates, texts
from sparsegate.converter.pipeline import convert as conversion
from sparsegate.converter.pipeline import tune as tune_module
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.recipe import Budget, read_recipe
from sparsegate.converter.pipeline.tune import tune
from sparsegate.converter.pipeline.verify import verify
from sparsegate.converter.report.tables import quality_cells
from sparsegate.converter.text import generated as generated_module
from sparsegate.converter.text.windows import Batches
from sparsegate.converter.training import recovery
from sparsegate.converter.training import stage as recovery_stage
from sparsegate.converter.training.settings import ByBlock, Recovery, settings_of
from sparsegate.converter.training.unit import make_unit
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.untrusted import read_json

TRAIN = {
    "steps": 4,
    "windows": 4,
    "precision": "fp32",
    "data": {"windows": 8, "length": 24},
    "penalty": {"density": 0.2},
}


@pytest.fixture(autouse=True)
def _no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_speed", lambda base, onnx, texts: {})


@pytest.fixture(name="model")
def _model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


def recipe(
    model: Path, folder: Path, last: dict[str, Any] | None = None, activation: str | None = "drelu", **changes: Any
) -> Path:
    """A recipe whose first stage trains for a moment."""
    folder.mkdir(exist_ok=True)
    config = {} if activation is None else {"activation": activation}
    stages = [{"method": "exact", "config": config, "tune": TRAIN | changes}, *([last] if last else [])]
    return small_recipe(model, folder, stages=stages)


def tuned(model: Path, folder: Path, name: str = "out", **changes: Any) -> Path:
    return tune(output=folder / name, recipe=recipe(model, folder, **changes)).folder


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        action()
    return str(error.value)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


# Folder in, folder out


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
    settings = recovery_stage.settings_of
    monkeypatch.setattr(
        recovery_stage, "settings_of", lambda asked, seed: recovery_stage.replace(settings(asked, seed), save_every=3)
    )
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


PADDED = torch.arange(12)[None] < torch.tensor([12, 5, 9, 2])[:, None]


def gradients(model: Path) -> dict[str, Tensor]:
    """The gradient of the whole objective on four padded windows, shared out over the processes as the loop does it."""
    tokens = torch.randint(3, 290, (4, 12), generator=torch.Generator().manual_seed(1))
    student, teacher, arch = load_dense(model), load_dense(model), load_arch("llama")
    for block in student.model.layers:
        swap(block.mlp, arch, "drelu")
    parts = {
        "losses": {"distill": 1.0, "lm": 0.5, "hidden": 0.5},
        "penalty": {"weight": 0.7, "ramp": 0.01},
        "predictors": {"density": 0.2},
    }
    asked = Recovery.model_validate({"steps": 20, "precision": "fp32", **parts})
    generator, sites = torch.Generator().manual_seed(0), arch.sites(student.config)
    units = {site: make_unit(fresh_predictor(64, 176, 8, generator), torch.device("cpu"), 1.0) for site in sites}
    objective = recovery.RecoveryObjective(
        student, teacher, arch, "silu", sites, asked, settings_of(asked, 0), dict(student.named_parameters()), units
    )
    found: dict[str, Tensor] = {}
    for step in (18, 19):  # the second one knows the scales of the first
        own = share_of(4, "windows")
        for each in objective.parameters().values():
            each.tensor.grad = None
        loss = objective.loss(tokens[own], PADDED[own], step)
        (loss * (PADDED[own].sum() / PADDED.sum() * world().size)).backward()
        tensors = {name: each.tensor for name, each in objective.parameters().items()}
        mean_gradients(tensors.values())
        found |= {f"{name} {step}": tensor.grad.clone() for name, tensor in tensors.items() if tensor.grad is not None}
    return found


def _process(rank: int, port: int, path: Path, model: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with processes("cpu"):
        found = gradients(model)
    if rank == 0:
        save_file(found, out.with_name("gradients.safetensors"))
    os.environ.update(MASTER_PORT=str(port + 1))
    tune(output=out, recipe=path)
    os.environ.update(MASTER_PORT=str(port + 2))
    tune(output=out.with_name("shared out"), recipe=path.with_name("shared.yaml"))


@pytest.mark.slow  # test_distributed.py has the same of the training alone
def test_two_processes_are_one_with_the_joint_batch(model: Path, tmp_path: Path) -> None:
    path = recipe(model, tmp_path, predictors={"density": 0.3}, losses={"hidden": 0.1, "lm": 0.1}, parallel="data")
    path.with_name("shared.yaml").write_text(path.read_text().replace("parallel: data", "parallel: fsdp"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, path, model, tmp_path / "two"), nprocs=2)
    joint, shared = gradients(model), load_file(tmp_path / "gradients.safetensors")
    assert joint.keys() == shared.keys() and {"layers.0.ffn.fc1 18", "lm_head.weight 19"} <= joint.keys()
    assert max(float((tensor - shared[name]).norm() / tensor.norm()) for name, tensor in joint.items()) < 1e-5
    alone, before = weights(tune(output=tmp_path / "one", recipe=path).folder), weights(model)
    # Adam's first steps are of full length even where a gradient is nothing but rounding: single entries differ
    for name, tensor in (
        (name, tensor)
        for both in (weights(tmp_path / "two"), weights(tmp_path / "shared out"))
        for name, tensor in both.items()
    ):
        assert float((tensor - alone[name]).abs().mean()) < 0.02 * float(
            (tensor - before[name].where(before[name] * tensor >= 0, -before[name])).abs().mean()
        )


OWN = {"penalty": {"weight": 0.1}, "data": {"windows": 600, "length": 24}}


def like(one: Path, other: Path, before: dict[str, Tensor]) -> bool:
    """Whether trained weights are alike up to what rounding does to Adam's first steps, which are of full length."""
    found = weights(other)
    moved = {
        name: float((tensor - before[name].where(before[name] * tensor >= 0, -before[name])).abs().mean())
        for name, tensor in weights(one).items()
    }
    return all(float((tensor - found[name]).abs().mean()) < 0.02 * moved[name] for name, tensor in weights(one).items())


@pytest.mark.slow
def test_processes_of_its_own(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by tune itself: text and weights are those of one process, and so is the held-out curve."""
    started: list[tuple[int, str]] = []
    for module in (generated_module, recovery_stage):
        plain = module.run_in_processes
        monkeypatch.setattr(
            module,
            "run_in_processes",
            lambda *given, plain=plain: started.append((given[0], given[1].__name__)) or plain(*given),
        )
    alone = tuned(model, tmp_path, "1", processes=1, **OWN)
    assert not started
    two = tuned(model, tmp_path, "2", processes=2, **OWN)
    assert started == [(2, "sample_groups"), (2, "in_process")]
    one, other = (RecoveryRecord.load(folder / RECOVERY) for folder in (alone, two))
    assert one.text.hash == other.text.hash and one.text.windows == 2397, "groups of 512 windows, sampled by whoever"
    assert [point.step for point in other.heldout] == [1, 2, 3, 4] == [point.step for point in one.heldout]
    assert all(a.nll == pytest.approx(b.nll, rel=1e-4) for a, b in zip(one.heldout, other.heldout, strict=True))
    assert like(alone, two, weights(model)) and other.cpu_seconds > 0 and not list(tmp_path.glob("*.work"))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_in_several_processes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the groups of text and the steps that are there, and the seconds that they took."""
    whole = tuned(model, tmp_path, "whole", processes=1, **OWN)
    plain, text = recovery.RecoveryObjective.loss, tmp_path / "cut.work" / "stage_0"

    def cut(self: Any, tokens: Tensor, mask: Tensor, step: int) -> Tensor:
        if step == 3:
            raise KeyboardInterrupt
        return plain(self, tokens, mask, step)

    settings = recovery_stage.settings_of
    with monkeypatch.context() as patch:
        patch.setattr(recovery.RecoveryObjective, "loss", cut)
        patch.setattr(
            recovery_stage,
            "settings_of",
            lambda asked, seed: recovery_stage.replace(settings(asked, seed), save_every=2),
        )
        with pytest.raises(KeyboardInterrupt):
            tuned(model, tmp_path, "cut", processes=1, **OWN)
    state = read_json(text / "state" / "training.json", "state")
    assert state["step"] == 2 and state["objective"]["cpu_seconds"] > 0
    state["objective"]["cpu_seconds"] = 1e6
    write_json(text / "state" / "training.json", state)
    sealed = read_header(text / "state")
    assert sealed is not None
    write_header(text / "state", sealed)
    tokens = load_file(text / "generated" / "tokens.safetensors")["tokens"]
    header = read_header(text / "generated")
    assert header is not None
    groups = text / f"generated.{hash_json(header.model_dump(mode='json'))[:16]}"
    shutil.rmtree(text / "generated")
    group = groups / "000000"
    group.mkdir(parents=True)
    marked = tokens[:512].roll(1, 0)  # another text than would be sampled: it must be taken as it is
    write_tensors(group / "tokens.safetensors", {"tokens": marked})
    asked = {
        "model": str(open_source(model).folder),
        **header.config,
        "seed": header.seed,
        "temperature": 1.0,
        "group": 0,
    }
    write_header(
        group, Header(format="group", config={name: value for name, value in asked.items() if name != "streams"})
    )
    write_json(groups / "seconds.json", {"seconds": 1000.0})
    resumed = tuned(model, tmp_path, "cut", processes=2, **OWN)
    record = RecoveryRecord.load(resumed / RECOVERY)
    assert 1000 < record.text.seconds < 2000 and record.cpu_seconds > 1e6 and not like(whole, resumed, weights(model))
    assert record.text.hash == recovery_stage.shifted(Batches(torch.cat([marked, tokens[512:]]), torch.ones(1))).sha256


@pytest.mark.slow
def test_a_process_s_refusal_is_the_caller_s(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(model, tmp_path, processes=2, rate=1e30, steps=20)
    assert "Lower the rate." in refused(lambda: tune(output=tmp_path / "b", recipe=path))
    monkeypatch.setattr(generated_module, "run_in_processes", lambda *given: pytest.fail("nothing is sampled"))
    path = recipe(model, tmp_path, processes=3)
    assert (
        refused(lambda: tune(output=tmp_path / "a", recipe=path))
        == "windows must divide by processes, got 4 for 3. Change one of them."
    )
    path = recipe(model, tmp_path, processes=3, windows=6, by_block={"tokens": 2048})
    said = "tokens of by_block must be 32 times what divides by processes, got 2048 for 3. Change one of them."
    assert refused(lambda: tune(output=tmp_path / "a", recipe=path)) == said
    monkeypatch.setattr(generated_module, "self_generated_streams", lambda *given: pytest.fail("nothing is sampled"))
    assert "torchrun" in refused(lambda: tune(output=tmp_path / "a", recipe=recipe(model, tmp_path, parallel="fsdp")))
    weightless = recipe(model, tmp_path, penalty={"weight": 0.0})
    assert "weight must be above 0" in refused(lambda: tune(output=tmp_path / "a", recipe=weightless, density=0.1))
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_as_many_processes_as_suit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery_stage, "cores", lambda: 4)
    source, asked = open_source(model), Recovery(steps=1000, windows=4)

    def count(device: str = "cpu", **changes: Any) -> int:
        return recovery_stage.processes_for(source, asked.model_copy(update=changes), device)

    assert count() == 4 and count(windows=6) == 3 and count(processes=2) == 2
    assert count(by_block=ByBlock()) == 1 and count(by_block=ByBlock(), processes=2) == 2, (
        "its micro-batches may not divide by them"
    )
    assert count("cuda") == 1 and count(parallel="fsdp") == 1 and count(end_to_end=False) == 1 and count(steps=4) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert count() == 1


# What is trained, and on what


def test_lora_changes_the_linear_maps_alone(model: Path, tmp_path: Path) -> None:
    out = tuned(model, tmp_path, lora={"rank": 2})
    before, after = weights(model), weights(out)
    changed = {name for name in before if not torch.allclose(before[name].abs(), after[name].abs())}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    layer = "model.layers.0.self_attn.q_proj.weight"
    assert int(torch.linalg.matrix_rank(after[layer] - before[layer], rtol=1e-3)) <= 2


def test_block_by_block_alone(model: Path, tmp_path: Path) -> None:
    out = tuned(model, tmp_path, end_to_end=False, by_block={"steps": 20, "tokens": 64})
    before, after = weights(model), weights(out)
    assert all(torch.equal(before[name], after[name]) for name in before if ".mlp." not in name)
    changed = [name for name in before if ".mlp." in name and not torch.allclose(before[name].abs(), after[name].abs())]
    assert len(changed) == 6, "gate, up and down of both blocks"
    record = RecoveryRecord.load(out / RECOVERY)
    assert record.recovered.kl != record.swapped.kl and record.curve == []
    assert record.tokens_trained == 2 * 20 * 64 and record.cpu_seconds > 0


def test_predictors_trained_with_the_weights(model: Path, tmp_path: Path) -> None:
    out = tuned(model, tmp_path, predictors={"cost": 0.2, "density": 0.3})
    plan = read_plan(out)
    assert (
        all(isinstance(entries[0], Swap) and isinstance(entries[1], Predictor) for entries in plan.values())
        and len(plan) == 2
    )
    record = RecoveryRecord.load(out / RECOVERY)
    predicted = record.recovered.predicted
    assert (
        record.exact is not None and record.exact.predicted is None and record.exact.density == record.recovered.density
    )
    assert record.exact.nll != record.recovered.nll
    assert predicted is not None and record.recovered.cost == pytest.approx(
        predicted + 28 * (64 + 176) / (3 * 64 * 176), abs=1e-6
    )
    assert [site.predicted for site in record.recovered.sites] == [
        pytest.approx(entries[1].density, abs=0.2) for entries in plan.values()
    ]


def test_files_in_place_of_the_model_s_own_text(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "own.txt"
    text.write_text(TEXT * 4, encoding="utf-8")
    monkeypatch.setattr(recovery_stage, "generated", lambda *_: pytest.fail("nothing is sampled"))
    found = tune(
        output=tmp_path / "out",
        recipe=recipe(model, tmp_path),
        data=[text],
        steps=2,
        density=0.5,
        lora=1,
        activation="relu",
    )
    settings = found.record.settings
    assert (
        not found.record.text.sampled
        and settings["data"]["mixture"][0]["files"] == [str(text)]
        and found.record.activation == "relu"
    )
    assert (
        settings["steps"] == 2
        and settings["penalty"]["density"] == 0.5
        and settings["lora"] == {"rank": 1, "alpha": 2.0}
    )


def test_refusals(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(model, tmp_path)
    (tmp_path / "there").mkdir()
    assert refused(lambda: tune(output=tmp_path / "there", recipe=path)).startswith("OUT must be a new folder, got")
    assert refused(lambda: tune(str(model), tmp_path / "a", recipe=path)).startswith(
        "MODEL must stand without a recipe that names its model"
    )
    monkeypatch.setattr(generated_module, "self_generated_streams", lambda *given: pytest.fail("nothing is sampled"))
    assert "exact zeros" in refused(lambda: tune(output=tmp_path / "a", recipe=path, activation="silu"))
    assert refused(lambda: tune(output=tmp_path / "a", recipe=path, steps=0)).startswith(
        "The training's steps must be valid, got 0"
    )
    assert refused(lambda: tune(output=tmp_path / "a", recipe=small_recipe(model, tmp_path))).startswith(
        "The recipe must have a stage with tune"
    )
    assert refused(lambda: tune(output=tmp_path / "a", recipe="turbo")).startswith(
        "The recipe must be a YAML file, got nothing at turbo"
    )
    assert not (tmp_path / "a").exists()


def test_the_command_prints_and_resumes_nothing_half(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(model, tmp_path)
    done = call_cli(capsys, "tune", "-o", tmp_path / "out", "--recipe", path)
    assert done.status == 0 and "recovered" in done.out and "layers.1.ffn" in done.out
    again = call_cli(capsys, "tune", "-o", tmp_path / "out", "--recipe", path)
    assert again.status == 2 and again.err.startswith("sparsegate: OUT must be a new folder")
    as_json = call_cli(capsys, "tune", "-o", tmp_path / "json", "--recipe", path, "--json")
    assert (
        json.loads(as_json.out)["recovered"]["density"]
        == RecoveryRecord.load(tmp_path / "out" / RECOVERY).recovered.density
    )


# Conversions whose first stage trains


@pytest.mark.parametrize(
    "last",
    [{"method": "exact"}, pytest.param({"method": "gate", "config": {"sparsity": 0.8}}, marks=pytest.mark.slow), None],
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
    assert all(isinstance(entries[0], Swap) and entries[0].activation == "drelu" for entries in plan.values())
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
        all(isinstance(entries[-1], Predictor) for entries in read_plan(tmp_path / "out").values())
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
    calls, plain = [], recovery_stage.generated
    monkeypatch.setattr(
        recovery_stage, "generated", lambda *given, **more: calls.append(given[4].name) or plain(*given, **more)
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
        "trained_gate",
        "predictor",
        "exact",
    }
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
    trained, _ = recovery_stage.training_text(source, asked.stages[0].tune, asked.seed, work / "recovery" / "stage_0")
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

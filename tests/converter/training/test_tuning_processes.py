"""tune in several processes: torchrun's, and those that it starts itself."""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor
from tuning_cases import recipe, refused, tuned, weights

from sparsegate.converter.arch import load_arch
from sparsegate.converter.checkpoint.plan import SitePlan
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.checkpoint.stage import (
    Header,
    hash_json,
    read_header,
    write_header,
    write_json,
    write_tensors,
)
from sparsegate.converter.evaluation.recovery_record import RECOVERY, RecoveryRecord
from sparsegate.converter.modeling.blocks import swap
from sparsegate.converter.modeling.distributed import mean_gradients, processes, share_of, world
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.modeling.predictor import fresh_predictor
from sparsegate.converter.pipeline.tune import tune
from sparsegate.converter.text import generated as generated_module
from sparsegate.converter.text.windows import Batches
from sparsegate.converter.training import end_to_end, recovery, training_text
from sparsegate.converter.training import stage as recovery_stage
from sparsegate.converter.training.inputs import Models
from sparsegate.converter.training.settings import ByBlock, Recovery, settings_of
from sparsegate.converter.training.unit import make_unit
from sparsegate.runtime_onnx.untrusted import read_json

pytestmark = pytest.mark.usefixtures("no_speed")


OWN = {"penalty": {"weight": 0.1}, "data": {"windows": 600, "length": 24}}


def like(one: Path, other: Path, before: dict[str, Tensor]) -> bool:
    """Whether trained weights are alike up to what rounding does to Adam's first steps, which are of full length."""
    found = weights(other)
    moved = {
        name: float((tensor - before[name].where(before[name] * tensor >= 0, -before[name])).abs().mean())
        for name, tensor in weights(one).items()
    }
    return all(float((tensor - found[name]).abs().mean()) < 0.02 * moved[name] for name, tensor in weights(one).items())


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
    units = {
        site: make_unit(SitePlan(gate=fresh_predictor(64, 176, 8, generator)), torch.device("cpu"), 1.0)
        for site in sites
    }
    models, leaves = Models(student, teacher, arch, "silu"), dict(student.named_parameters())
    objective = recovery.RecoveryObjective(models, asked, settings_of(asked, 0), leaves, units)
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

    settings = end_to_end.settings_of
    with monkeypatch.context() as patch:
        patch.setattr(recovery.RecoveryObjective, "loss", cut)
        patch.setattr(
            end_to_end,
            "settings_of",
            lambda asked, seed: replace(settings(asked, seed), save_every=2),
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
    assert record.text.hash == training_text.shifted(Batches(torch.cat([marked, tokens[512:]]), torch.ones(1))).sha256


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

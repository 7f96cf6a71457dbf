"""A training stage: the networks of a model get another activation and its weights are recovered by training. Folder
in, folder out.

The dense source is the teacher and, without a mixture of texts, writes the text itself. Neurons are turned first so
that the new activation drops the weaker sign, then blocks are fitted one by one where that is asked for, then
everything is trained end to end, on a CPU in several processes where that pays.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ...runtime_onnx.ops.activation import cuts_up
from ...runtime_onnx.untrusted import read_json
from .. import progress
from ..checkpoint.fields import make_part
from ..checkpoint.manifest import installed_versions
from ..checkpoint.plan import VERSION as PLAN_VERSION
from ..checkpoint.plan import Exact, Plan, SitePlan, Swap, load_plan, save_plan
from ..checkpoint.source import Source, open_source
from ..checkpoint.sparsity import write_stock
from ..checkpoint.stage import Header, atomic_folder, is_finished, write_header, write_json, write_tensors
from ..checkpoint.writer import write_checkpoint
from ..evaluation.checks import Quality
from ..evaluation.density import with_shares
from ..evaluation.records import Text, this_machine
from ..evaluation.recovery_record import DenseQuality, RecoveryRecord, TrainingText
from ..modeling.blocks import swap
from ..modeling.distributed import gathered, same_error, shard, world
from ..modeling.gated import load_dense
from ..modeling.lora import merge_lora, plain_state
from ..modeling.processes import cores, run_in_processes
from ..text.mixture import files_hash
from ..text.windows import Batches
from .adapters import trainable
from .by_block import recover_by_block
from .end_to_end import PROBE, Training, train_end_to_end
from .heldout import compared, swapped_quality
from .inputs import Heldout, Models, RecoveryTask, TrainingRun, present
from .settings import Recovery, count_for
from .signs import orient
from .training_text import training_text

EVALUATED = 64
"""Held-out windows that a recovery is measured on, before and after."""
_STAGE, _WINDOWS = "stage.json", "evaluation.safetensors"
_ZEROS = "zeros"
"""The folder of the plan that keeps exact zeros alone, beside one with predictors."""


@dataclass(frozen=True)
class Tuned:
    """A recovered checkpoint: its folder (swapped weights, score exact), the plan that training ended with (predictors
    where they were trained), the one that keeps exact zeros alone, its record; `rank` is the number of the process that
    returns it.
    """

    folder: Path
    plan: Plan
    exact: Plan
    record: RecoveryRecord
    header: Header
    rank: int = 0

    @property
    def source(self) -> Source:
        """The checkpoint as a model to convert."""
        return open_source(self.folder)


def tuned(task: RecoveryTask) -> Tuned:
    """Do the task and store all below its work folder. What is finished there under the same settings is not made
    again, and an interrupted training goes on to the same weights.

    Raises InputError for activations and settings that do not fit the model, and where training fails.
    """
    header, folder = _header(task), task.work / "tuned"
    if is_finished(folder, header):
        progress.resumed()
    elif (count := _with_text(task)) > 1:
        _write_down(task, header)
        run_in_processes(count, in_process, task.work)
    else:
        _recover(task, header)
    record = RecoveryRecord.load(folder / "recovery.json")
    plan = load_plan(folder / "plan")
    exact = load_plan(folder / _ZEROS) if (folder / _ZEROS).is_dir() else plan
    return Tuned(folder / "checkpoint", plan, exact, record, header)


def _header(task: RecoveryTask) -> Header:
    """What decides the result."""
    config: dict[str, Any] = {
        "activation": task.activation,
        "tune": task.recovery.model_dump(mode="json", exclude={"processes"}),
        "evaluation": task.heldout.batches.sha256,
    }
    if task.recovery.data.mixture:
        config["text"] = files_hash(task.recovery.data)
    parents = {"model": task.source.fingerprint}
    parents |= {} if task.teacher_source is task.source else {"teacher": task.teacher_source.fingerprint}
    return Header(format="tuned", version=PLAN_VERSION, parents=parents, config=config, seed=task.seed)


def _with_text(task: RecoveryTask) -> int:
    """Make the text, which the other processes find finished; returns how many processes are to train."""
    recovery, count = task.recovery, processes_for(task.source, task.recovery, task.device)
    with same_error():
        if world().rank == 0:
            batches, _ = training_text(task.teacher_source, recovery, task.seed, task.work, count)
            if recovery.processes == "auto" and len(batches.tokens) < recovery.accumulate * recovery.windows:
                count = 1  # a batch is all windows, whatever they divide by
    return count


def processes_for(source: Source, recovery: Recovery, device: str) -> int:
    """How many processes of this machine sample and train: more than one only on a CPU, for training end to end, where
    torchrun has not started some.
    """
    if device != "cpu" or "WORLD_SIZE" in os.environ:
        return 1
    return count_for(recovery, sum(prod(info.shape) for info in source.tensors.values()), cores())


def _write_down(task: RecoveryTask, header: Header) -> None:
    """The task for `in_process`."""
    task.work.mkdir(parents=True, exist_ok=True)
    stage = {
        "source": str(task.source.folder),
        "teacher": str(task.teacher_source.folder),
        "activation": task.activation,
        "seed": task.seed,
        "name": task.heldout.name,
        "tune": task.recovery.model_dump(mode="json"),
        "header": header.model_dump(mode="json"),
    }
    write_json(task.work / _STAGE, stage)
    write_tensors(task.work / _WINDOWS, {"tokens": task.heldout.batches.tokens, "mask": task.heldout.batches.mask})


def in_process(work: str) -> None:
    """The stage that is written down in `work`, in one of several processes."""
    folder = Path(work)
    stage, windows = read_json(folder / _STAGE, "The training stage"), load_file(folder / _WINDOWS)
    source = open_source(stage["source"])
    task = RecoveryTask(
        source,
        source if stage["teacher"] == stage["source"] else open_source(stage["teacher"]),
        stage["activation"],
        make_part(Recovery, stage["tune"], "The training"),
        stage["seed"],
        folder,
        "cpu",
        Heldout(Batches(windows["tokens"], windows["mask"]), stage["name"]),
    )
    _recover(task, Header.model_validate(stage["header"]))


def _recover(task: RecoveryTask, header: Header) -> None:
    """Text, swap, blocks one by one, training end to end, measures, checkpoint."""
    recovery, windows = task.recovery, task.heldout.batches
    batches, text = training_text(task.teacher_source, recovery, task.seed, task.work)
    models = _swapped(task, batches)
    exact: Plan = {site: SitePlan((Swap(name),), Exact()) for site, name in task.wished().items()}
    before, fitted = None, Training()
    if recovery.by_block is not None:
        before = compared(models, exact, windows)
        fitted = _fitted(task, models, TrainingRun(batches, task.seed, task.work / "by_block", header))
    leaves = trainable(models.student, task.arch, recovery, task.seed)
    _place(task, models)
    before = before or compared(models, exact, windows)
    trained = train_end_to_end(task, models, batches, leaves, header) if recovery.end_to_end else Training()
    if recovery.lora is not None:
        merge_lora(models.student)
    exact = with_shares(models.student, exact, task.arch, task.base_activation, batches)
    after, predicted, plans = compared(models, exact, windows), None, {"plan": exact}
    if trained.units:
        plan: Plan = {site: trained.units[site].site_plan(1.0, entry.edits) for site, entry in exact.items()}
        plan = with_shares(models.student, plan, task.arch, task.base_activation, batches)
        predicted, plans = compared(models, plan, windows), {"plan": plan, _ZEROS: exact}
    record = _record(task, text, (fitted, trained), before, after, predicted)
    _store(task, models, plans, record, header)


def _swapped(task: RecoveryTask, batches: Batches) -> Models:
    """Teacher and student, the student's networks turned and swapped."""
    source, arch, wished = task.source, task.arch, task.wished()
    teacher, student = load_dense(task.teacher_source.folder), load_dense(source.folder)
    teacher.requires_grad_(False)
    turned = [site for site, name in wished.items() if cuts_up(name) and not cuts_up(present(source, site))]
    if turned:
        orient(student, arch, task.base_activation, batches.tokens[:PROBE], turned)
    for site, name in wished.items():
        swap(student.get_submodule(arch.ffn_module(site.layer)), arch, name)
    return Models(student, teacher, arch, task.base_activation)


def _fitted(task: RecoveryTask, models: Models, run: TrainingRun) -> Training:
    """The student's blocks fitted one by one."""
    blocks = task.recovery.by_block
    assert blocks is not None
    rows = recover_by_block(models, blocks, run, precision=task.recovery.precision, device=task.device)
    seconds, cpu_seconds = (sum(float(row[name]) for row in rows) for name in ("seconds", "cpu_seconds"))
    return Training(len(rows) * blocks.steps * blocks.tokens, seconds, cpu_seconds)


def _place(task: RecoveryTask, models: Models) -> None:
    """Put both models on the device, or share them out: such a model never stands whole on a device."""
    model: Any
    for model in (models.teacher, models.student):
        if task.recovery.parallel == "fsdp":
            shard(model, model.get_submodule(task.arch.block.rpartition(".")[0]))
        else:
            model.to(task.device)


def _record(
    task: RecoveryTask,
    text: TrainingText,
    trainings: tuple[Training, Training],
    before: Quality,
    after: Quality,
    predicted: Quality | None,
) -> RecoveryRecord:
    """What was done, block by block and then end to end, and measured: with exact zeros before and after it, and with
    what predictors keep.
    """
    last = trainings[-1]
    return RecoveryRecord(
        activation=", ".join(sorted(set(task.wished().values()))),
        text=text,
        settings=task.recovery.model_dump(mode="json"),
        tokens_trained=sum(training.tokens for training in trainings),
        seconds=sum(training.seconds for training in trainings),
        cpu_seconds=sum(training.cpu_seconds for training in trainings),
        machine=this_machine(),
        versions=installed_versions(),
        curve=last.curve,
        heldout=last.heldout,
        dense=DenseQuality(nll=before.nll_dense, tokens=before.tokens),
        swapped=swapped_quality(before),
        recovered=swapped_quality(after, predicted),
        exact=swapped_quality(after) if predicted else None,
        evaluation=Text(hash=task.heldout.batches.sha256, tokens=before.tokens, name=task.heldout.name),
    )


def _store(task: RecoveryTask, models: Models, plans: dict[str, Plan], record: RecoveryRecord, header: Header) -> None:
    """Write checkpoint, plans by folder and record; the first process gathers the weights and writes."""
    weights = {name: gathered(tensor) for name, tensor in plain_state(models.student).items()}
    with same_error():
        if world().rank == 0:
            with atomic_folder(task.work / "tuned") as partial:
                checkpoint = partial / "checkpoint"
                checkpoint.mkdir()
                whole = {name: tensor for name, tensor in weights.items() if tensor is not None}
                write_checkpoint(task.source, plans.get(_ZEROS, plans["plan"]), checkpoint, whole)
                if task.source.swaps and set(task.wished().values()) == {task.base_activation}:
                    write_stock(checkpoint)
                for name, plan in plans.items():
                    (partial / name).mkdir()
                    save_plan(partial / name, plan, header)
                write_json(partial / "recovery.json", record.model_dump(mode="json"))
                write_header(partial, header)

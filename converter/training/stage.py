"""A training stage: the networks of a model get another activation and its weights are recovered by training. Folder
in, folder out.

The dense source is the teacher and, without a mixture of texts, writes the text itself. Neurons are turned first so
that the new activation drops the weaker sign, then blocks are fitted one by one where that is asked for, then
everything is trained end to end, on a CPU in several processes where that pays.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.ops.activation import cuts_up
from ...runtime_onnx.untrusted import read_json
from .. import progress
from ..arch.site import Site
from ..checkpoint.fields import make_part
from ..checkpoint.manifest import installed_versions
from ..checkpoint.plan import Plan, Swap, load_plan, save_plan
from ..checkpoint.source import Source, open_source
from ..checkpoint.sparsity import write_stock
from ..checkpoint.stage import Header, atomic_folder, is_finished, read_header, write_header, write_json, write_tensors
from ..checkpoint.writer import write_checkpoint
from ..evaluation.checks import Quality
from ..evaluation.density import with_shares
from ..evaluation.quality import measure_quality
from ..evaluation.records import Text, this_machine
from ..evaluation.recovery_record import (
    CurvePoint,
    DenseQuality,
    HeldoutPoint,
    RecoveryRecord,
    SiteDensity,
    SwappedQuality,
    TrainingText,
)
from ..modeling.blocks import swap
from ..modeling.distributed import gathered, same_error, shard, sum_over_processes, world
from ..modeling.gated import apply_plan, load_dense, remove_plan
from ..modeling.lora import add_lora, linear_names, lora_tensors, merge_lora, plain_state
from ..modeling.predictor import fresh_predictor, rank_for
from ..modeling.processes import cores, run_in_processes
from ..text.generated import GENERATED, SECONDS, generated
from ..text.mixture import FOLDER as MIXTURE
from ..text.mixture import files_hash, mixture_batches
from ..text.windows import Batches
from .by_block import recover_by_block
from .loop import STATE, train
from .recompute import checkpointed
from .recovery import RecoveryObjective
from .sensitivity import input_rms
from .settings import Recovery, count_for, settings_of
from .signs import orient
from .unit import Unit, make_unit

EVALUATED = 64
"""Held-out windows that a recovery is measured on, before and after."""
WATCHED, WATCHES = 16, 12
"""The first held-out windows that are looked at while training, and how often."""
CUTS = 4
"""Offsets at which sampled text is cut into windows."""
_STAGE, _WINDOWS, _ROWS = "stage.json", "evaluation.safetensors", "heldout.json"
_PROBE = 16  # windows that signs, input scales and shares are taken from


@dataclass(frozen=True)
class Tuned:
    """A recovered checkpoint: its folder (swapped weights, score exact), the plan that training ended with (predictors
    where they were trained), its record; `rank` is the number of the process that returns it.
    """

    folder: Path
    plan: Plan
    record: RecoveryRecord
    header: Header
    rank: int = 0

    @property
    def source(self) -> Source:
        """The checkpoint as a model to convert."""
        return open_source(self.folder)


@dataclass(frozen=True)
class Training:
    """A training end to end: tokens seen, wall and processor seconds, curves, and the predictors trained with the
    weights.
    """

    tokens: int
    seconds: float
    cpu_seconds: float
    curve: list[CurvePoint]
    heldout: list[HeldoutPoint]
    units: dict[Site, Unit]


@dataclass(frozen=True)
class Evaluation:
    """Held-out windows and what they are called."""

    batches: Batches
    name: str


def tuned(
    source: Source,
    activation: str | None,
    asked: Recovery,
    seed: int,
    work: Path,
    device: str,
    evaluation: Evaluation,
    teacher_source: Source | None = None,
) -> Tuned:
    """Swap the activation of every feed-forward network of `source` for `activation` (None: as it is), recover, and
    store all below `work`; what is finished there under the same settings is not made again, and an interrupted
    training goes on to the same weights. `teacher_source` (None: `source`) is the dense model that teaches and writes
    the text.

    Raises InputError for activations and settings that do not fit the model, and where training fails.
    """
    config: dict[str, Any] = {
        "activation": activation,
        "tune": asked.model_dump(mode="json", exclude={"processes"}),
        "evaluation": evaluation.batches.sha256,
    }
    if asked.data.mixture:
        config["text"] = files_hash(asked.data)
    teacher_source = teacher_source or source
    parents = {"model": source.fingerprint}
    parents |= {} if teacher_source is source else {"teacher": teacher_source.fingerprint}
    header = Header(format="tuned", parents=parents, config=config, seed=seed)
    folder = work / "tuned"
    if not is_finished(folder, header):
        count = processes_for(source, asked, device)
        with same_error():
            if world().rank == 0:
                # the other processes find it finished
                batches, _ = training_text(teacher_source, asked, seed, work, count)
                if asked.processes == "auto" and len(batches.tokens) < asked.accumulate * asked.windows:
                    count = 1  # a batch is all windows, whatever they divide by
        if count > 1:
            stage = {
                "source": str(source.folder),
                "teacher": str(teacher_source.folder),
                "activation": activation,
                "seed": seed,
                "name": evaluation.name,
            }
            work.mkdir(parents=True, exist_ok=True)
            write_json(
                work / _STAGE, stage | {"tune": asked.model_dump(mode="json"), "header": header.model_dump(mode="json")}
            )
            write_tensors(work / _WINDOWS, {"tokens": evaluation.batches.tokens, "mask": evaluation.batches.mask})
            run_in_processes(count, in_process, work)
        else:
            _tune(source, teacher_source, activation, asked, seed, work, device, evaluation, header)
    else:
        progress.resumed()
    record = RecoveryRecord.load(folder / "recovery.json")
    return Tuned(folder / "checkpoint", load_plan(folder / "plan"), record, header)


def processes_for(source: Source, asked: Recovery, device: str) -> int:
    """How many processes of this machine sample and train: more than one only on a CPU, for training end to end, where
    torchrun has not started some.
    """
    if device != "cpu" or "WORLD_SIZE" in os.environ:
        return 1
    return count_for(asked, sum(prod(info.shape) for info in source.tensors.values()), cores())


def in_process(work: str) -> None:
    """The stage that is written down in `work`, in one of several processes."""
    folder = Path(work)
    stage, windows = read_json(folder / _STAGE, "The training stage"), load_file(folder / _WINDOWS)
    asked, header = make_part(Recovery, stage["tune"], "The training"), Header.model_validate(stage["header"])
    evaluation = Evaluation(Batches(windows["tokens"], windows["mask"]), stage["name"])
    source = open_source(stage["source"])
    teacher_source = source if stage["teacher"] == stage["source"] else open_source(stage["teacher"])
    _tune(source, teacher_source, stage["activation"], asked, stage["seed"], folder, "cpu", evaluation, header)


def _tune(
    source: Source,
    teacher_source: Source,
    activation: str | None,
    asked: Recovery,
    seed: int,
    work: Path,
    device: str,
    evaluation: Evaluation,
    header: Header,
) -> None:
    batches, text = training_text(teacher_source, asked, seed, work)
    teacher, student = load_dense(teacher_source.folder), load_dense(source.folder)
    teacher.requires_grad_(False)
    arch, own, sites = source.arch, source.arch.activation(source.config), source.arch.sites(source.config)
    wished = {site: activation or present(source, site) for site in sites}
    turned = [site for site in sites if cuts_up(wished[site]) and not cuts_up(present(source, site))]
    if turned:
        orient(student, arch, own, batches.tokens[:_PROBE], turned)
    for site, name in wished.items():
        swap(student.get_submodule(arch.ffn_module(site.layer)), arch, name)
    exact: Plan = {site: [Swap(name)] for site, name in wished.items()}
    swapped, fitted = None, Training(0, 0.0, 0.0, [], [], {})
    if asked.by_block is not None:
        swapped = _compared(student, exact, evaluation.batches, teacher, source)
        blocks = asked.by_block
        rows = recover_by_block(
            student,
            teacher,
            arch,
            batches,
            blocks,
            seed,
            work / "by_block",
            header,
            l1=blocks.l1,
            precision=asked.precision,
            device=device,
        )
        spent, cpu = (sum(float(row[name]) for row in rows) for name in ("seconds", "cpu_seconds"))
        fitted = replace(fitted, tokens=len(rows) * blocks.steps * blocks.tokens, seconds=spent, cpu_seconds=cpu)
    leaves = _leaves(student, source, asked, seed)
    for model in (teacher, student):  # what is shared out never stands whole on a device
        if asked.parallel == "fsdp":
            shard(model, model.get_submodule(arch.block.rpartition(".")[0]))
        else:
            model.to(device)
    swapped = swapped or _compared(student, exact, evaluation.batches, teacher, source)
    trained = Training(0, 0.0, 0.0, [], [], {})
    if asked.end_to_end:
        trained = _trained(student, teacher, source, asked, seed, batches, leaves, work, evaluation, header)
    if asked.lora is not None:
        merge_lora(student)
    whole: Plan = {
        site: [*entries, *([trained.units[site].entry(1.0)] if trained.units else [])]
        for site, entries in exact.items()
    }
    whole = with_shares(student, whole, arch, own, batches)
    exact = {site: entries[:1] for site, entries in whole.items()}
    recovered = _compared(student, exact, evaluation.batches, teacher, source)
    quality = _quality(
        recovered, _compared(student, whole, evaluation.batches, teacher, source) if trained.units else None
    )
    record = RecoveryRecord(
        activation=", ".join(sorted(set(wished.values()))),
        text=text,
        settings=asked.model_dump(mode="json"),
        tokens_trained=fitted.tokens + trained.tokens,
        seconds=fitted.seconds + trained.seconds,
        cpu_seconds=fitted.cpu_seconds + trained.cpu_seconds,
        machine=this_machine(),
        versions=installed_versions(),
        curve=trained.curve,
        heldout=trained.heldout,
        dense=DenseQuality(nll=swapped.nll_dense, tokens=swapped.tokens),
        swapped=_quality(swapped),
        recovered=quality,
        exact=_quality(recovered) if trained.units else None,
        evaluation=Text(hash=evaluation.batches.sha256, tokens=swapped.tokens, name=evaluation.name),
    )
    weights = {name: gathered(tensor) for name, tensor in plain_state(student).items()}
    with same_error():
        if world().rank == 0:
            with atomic_folder(work / "tuned") as partial:
                (partial / "checkpoint").mkdir()
                (partial / "plan").mkdir()
                write_checkpoint(
                    source,
                    exact,
                    partial / "checkpoint",
                    {name: tensor for name, tensor in weights.items() if tensor is not None},
                )
                if source.swaps and set(wished.values()) == {own}:
                    write_stock(partial / "checkpoint")
                save_plan(partial / "plan", whole, header)
                write_json(partial / "recovery.json", record.model_dump(mode="json"))
                write_header(partial, header)


@progress.stage("text", apart=True)
def training_text(
    source: Source, asked: Recovery, seed: int, work: Path, processes: int = 1
) -> tuple[Batches, TrainingText]:
    """The windows to train on and their record: of the recipe's mixture, or text that the dense source writes itself,
    in `processes` of this machine.
    """
    data = asked.data
    if data.mixture:
        batches = mixture_batches(source.tokenizer(), data, seed, work)
        name, made = ", ".join(f"{part.name} {part.share:g}" for part in data.mixture), MIXTURE
    else:
        batches = shifted(generated(source, data.windows, data.length, seed, work, data.temperature, True, processes))
        name, made = f"text sampled from the dense model at temperature {data.temperature:g}", GENERATED
    seconds = float(read_json(work / made / SECONDS, "The time that the text took")["seconds"])
    sampled = not data.mixture
    count = (
        data.windows * data.length if sampled else batches.count
    )  # a token of sampled text stands in several windows
    return batches, TrainingText(
        name=name, windows=len(batches.tokens), tokens=count, sampled=sampled, seconds=seconds, hash=batches.sha256
    )


def shifted(batches: Batches) -> Batches:
    """Sampled windows [N, S], neighbours in their texts, joined and cut at CUTS offsets: [CUTS N - CUTS + 1, S], so
    that passes differ.
    """
    count, length = batches.tokens.shape
    stream = batches.tokens.flatten()
    cuts = [
        stream[start : start + (count - bool(start)) * length].view(-1, length)
        for start in range(0, length, -(-length // CUTS))
    ]
    tokens = torch.cat(cuts)
    return Batches(tokens, torch.ones_like(tokens, dtype=torch.bool))


def present(source: Source, site: Site) -> str:
    """The activation of a site as it is."""
    return source.swaps[site].activation if site in source.swaps else source.arch.activation(source.config)


def _units(student: Any, source: Source, asked: Recovery, seed: int, probe: Tensor) -> dict[Site, Unit]:
    """Fresh predictors by site, where they are asked for."""
    if asked.predictors is None:
        return {}
    arch, config = source.arch, source.config
    hidden, units, matrices = (
        arch.size(config, "hidden"),
        arch.size(config, "units"),
        2 if arch.ffn.kind == "plain" else 3,
    )
    rank = rank_for(hidden, units, matrices, asked.predictors.cost)
    scales = input_rms(student, arch, arch.sites(config), probe)
    generator = torch.Generator().manual_seed(seed * 7919)
    return {
        site: make_unit(fresh_predictor(hidden, units, rank, generator), student.device, scale)
        for site, scale in scales.items()
    }


def _leaves(student: Any, source: Source, asked: Recovery, seed: int) -> Callable[[], dict[str, Tensor]]:
    """Makes ready what is trained, and returns how to ask for it by name when the model is in its place: low-rank
    updates of the blocks' linear maps, or every weight.
    """
    if asked.lora is None:
        return lambda: dict(student.named_parameters())
    student.requires_grad_(False)
    add_lora(
        student,
        linear_names(student, source.arch.block.partition("{layer}")[0]),
        asked.lora.rank,
        asked.lora.alpha,
        seed,
    )
    return lambda: lora_tensors(student)


def _trained(
    student: Any,
    teacher: Any,
    source: Source,
    asked: Recovery,
    seed: int,
    batches: Batches,
    ready: Callable[[], dict[str, Tensor]],
    work: Path,
    evaluation: Evaluation,
    header: Header,
) -> Training:
    """Train end to end; the student's weights are the recovered ones afterwards."""
    arch, sites = source.arch, source.arch.sites(source.config)
    units = _units(student, source, asked, seed, batches.tokens[:_PROBE])
    leaves = ready()
    linear = {f"{name}.weight" for name in linear_names(student, arch.block.partition("{layer}")[0])}
    store = _Rows(work / "heldout", header)
    if world().rank == 0 and not store.belongs(work / "state", max(1, asked.steps // WATCHES)):
        for folder in (store.folder, work / "state"):
            shutil.rmtree(folder, ignore_errors=True)
    tokens = min(asked.accumulate * asked.windows, len(batches.tokens)) * batches.tokens.shape[1]
    objective = RecoveryObjective(
        student,
        teacher if asked.losses.distill or asked.losses.hidden else None,
        arch,
        arch.activation(source.config),
        sites,
        asked,
        settings_of(asked, seed),
        leaves,
        units,
        {name for name in leaves if name in linear or asked.lora is not None},
        _watch(student, teacher, source, units, asked, evaluation, store, tokens),
    )
    with checkpointed(student) if asked.checkpointing else nullcontext():
        curve = train(objective, batches, settings_of(asked, seed), work / "state", header, lambda _: None)
    rows = store.read()
    seconds = float(curve[-1]["seconds"]) if curve else 0.0
    cpu = objective.cpu_seconds
    points = [
        CurvePoint.model_validate({name: row[name] for name in CurvePoint.model_fields if name in row} | _whole(row))
        for row in curve
    ]
    return Training(
        asked.steps * tokens, seconds, cpu, points, [HeldoutPoint.model_validate(row) for row in rows], units
    )


def _whole(row: dict[str, float]) -> dict[str, int]:
    return {name: int(row[name]) for name in ("step", "tokens")}


@dataclass(frozen=True)
class _Rows:
    """The held-out curve so far, a stage of its own: looks are taken between states."""

    folder: Path
    header: Header

    def read(self) -> list[dict[str, Any]]:
        """What was seen."""
        return (
            read_json(self.folder / _ROWS, "The held-out curve")["rows"]
            if read_header(self.folder) == self.header
            else []
        )

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Store it."""
        with atomic_folder(self.folder) as partial:
            write_json(partial / _ROWS, {"rows": rows})
            write_header(partial, self.header)

    def belongs(self, state: Path, every: int) -> bool:
        """Whether it is whole up to a training state that is, which looked every so many steps."""
        if not is_finished(state, self.header) or (self.folder.exists() and not is_finished(self.folder, self.header)):
            return False
        done = int(read_json(state / STATE, "The training state").get("step", 0))
        return sum(row["step"] <= done for row in self.read()) == done // every


def _watch(
    student: Any,
    teacher: Any,
    source: Source,
    units: dict[Site, Unit],
    asked: Recovery,
    evaluation: Evaluation,
    store: _Rows,
    tokens: int,
) -> Callable[[int], dict[str, float]]:
    """Looks at held-out text WATCHES times, and keeps what it saw in `store`, so that a resumed run has the whole
    curve. `tokens` are those of a step.
    """
    few = Batches(evaluation.batches.tokens[:WATCHED], evaluation.batches.mask[:WATCHED])
    every = max(1, asked.steps // WATCHES)
    modules = {
        site: student.get_submodule(source.arch.ffn_module(site.layer)) for site in source.arch.sites(source.config)
    }

    def look(step: int) -> list[float]:
        plan: Plan = {
            site: [Swap(module.swapped), *([units[site].entry(1.0)] if units else [])]
            for site, module in modules.items()
        }
        found = _compared(student, plan, few, teacher, source)
        seen = [found.nll, found.kl]
        if world().rank == 0 and all(map(math.isfinite, seen)):
            rows = store.read()
            row = HeldoutPoint(
                step=step + 1,
                tokens=(step + 1) * tokens,
                nll=found.nll,
                nll_dense=found.nll_dense,
                kl=max(found.kl, 0.0),
                agreement=found.agreement,
                density=None if units else found.density,
                predicted=found.density if units else None,
            )
            store.write([old for old in rows if old["step"] < step + 1] + [row.model_dump()])
        return seen

    def watch(step: int) -> dict[str, float]:
        if (step + 1) % every:
            return {}
        all_look = asked.parallel == "fsdp"  # at weights that none has whole
        seen = look(step) if all_look or world().rank == 0 else [0.0, 0.0]
        both = (sum_over_processes(torch.tensor(seen)) / (world().size if all_look else 1)).tolist()
        if not all(map(math.isfinite, both)):
            raise InputError(
                f"The loss on held-out text must be a finite number, got {both[0]} after {step + 1} steps. Lower the "
                "rate."
            )
        return {"heldout": both[0]}

    return watch


@torch.no_grad()
def _compared(student: Any, plan: Plan, batches: Batches, teacher: Any, source: Source) -> Quality:
    """The student under its plan beside the dense source on held-out windows."""
    apply_plan(student, plan, source.arch, source.arch.activation(source.config))
    try:
        return measure_quality(student, plan, batches, reference_model=teacher, error=0.0, most=batches.count)
    finally:
        remove_plan(student)


def _quality(exact: Quality, predicted: Quality | None = None) -> SwappedQuality:
    """What is reported of a model with exact zeros: its loss, with predictors theirs, and the shares by site."""
    shown = predicted or exact
    sites = [
        SiteDensity(
            site=key,
            density=share,
            opened=exact.site_opened[key],
            predicted=predicted.site_density[key] if predicted else None,
        )
        for key, share in exact.site_density.items()
    ]
    return SwappedQuality(
        nll=shown.nll,
        kl=max(shown.kl, 0.0),
        agreement=shown.agreement,
        density=exact.density,
        opened=sum(site.opened for site in sites) / len(sites),
        predicted=predicted.density if predicted else None,
        cost=shown.cost,
        sites=sites,
    )

"""tune: a checkpoint becomes another one, its networks with another activation and its weights recovered by training. No new type: folder in, folder out.

The dense source is the teacher and, without a mixture of texts, writes the text itself. Neurons are turned first so that the new activation drops the weaker
sign, then blocks are fitted one by one where that is asked for, then everything is trained end to end.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .activation_checkpointing import checkpointed
from .arch import Site
from .artifact import Header, InputError, atomic_folder, is_finished, read_header, read_json, write_header, write_json
from .blocks import swap
from .by_block import recover_by_block
from .data import Batches
from .distributed import gathered, processes, same_error, shard, share_of, sum_over_processes, world
from .end_to_end import Unit, input_rms, make_unit
from .lora import add_lora, linear_names, lora_tensors, merge_lora, plain_state
from .manifest import installed_versions
from .methods.predictor import fresh_predictor, rank_for
from .mixtures import FOLDER as MIXTURE
from .mixtures import files_hash, mixture_batches
from .opening import resolve
from .orientation import orient
from .planning import BUNDLED_MODEL, BUNDLED_NAME, SELF, named_recipe, training_stages
from .plans import Plan, Swap, check_exact, load_plan, save_plan
from .recipe import Recovery, Stage, make_part, read_recipe
from .recovery import RecoveryObjective
from .reference import apply_plan, load_dense, remove_plan
from .report import Text, this_machine
from .report.recovery import RECOVERY, CurvePoint, DenseQuality, HeldoutPoint, RecoveryRecord, SiteDensity, SwappedQuality, TrainingText
from .shares import with_shares
from .source import Source, open_source
from .texts import GENERATED, SECONDS, generated, heldout_name, make_heldout
from .training import settings_of, train
from .verification import Quality, measure_quality
from .writer import write_checkpoint

DEFAULT = "turbosparse"
"""The recipe of `tune` where none is named."""
WATCHED, WATCHES = 4, 12
"""Every how many of the held-out windows is looked at while training, and how often."""
CUTS = 4
"""Offsets at which sampled text is cut into windows."""
_PROBE = 16  # windows that signs, input scales and shares are taken from


@dataclass(frozen=True)
class Tuned:
    """A recovered checkpoint: its folder (swapped weights, score exact), the plan that training ended with (predictors where they were trained), its record;
    `rank` is the number of the process that returns it.
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
    """A training end to end: tokens seen, wall and processor seconds, curves, and the predictors trained with the weights."""

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


def tune(
    model: str | None = None,
    output: str | Path | None = None,
    activation: str | None = None,
    recipe: str | Path | None = None,
    data: Sequence[str | Path] | None = None,
    steps: int | None = None,
    density: float | None = None,
    lora: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Tuned:
    """Write OUT, the recovered checkpoint of a dense model, with its record in report/recovery.json; `model` None is the one that comes with sparsegate.

    `recipe` is a file or the name of one that comes along, of which the training stages are run; the other arguments replace parts of them. Under torchrun all
    processes call this. Raises InputError for every user's mistake; OUT then does not appear, and the same call goes on with an interrupted training.
    """
    asked = read_recipe(named_recipe(recipe or DEFAULT), None if model is None else str(model), BUNDLED_MODEL)
    stages = training_stages(asked)
    if not stages:
        raise InputError(f"The recipe must have a stage with tune, got none in {recipe}. Add it, or take {DEFAULT}.")
    stages = tuple(_changed(stage, data, steps, density, lora) for stage in stages)
    if activation:
        stages = (stages[0].model_copy(update={"config": {"activation": activation}}), *stages[1:])
    out = Path(output) if output else Path(f"{BUNDLED_NAME if asked.model == BUNDLED_MODEL else Path(asked.model).absolute().name}-tuned")
    if out.exists():
        raise InputError(f"OUT must be a new folder, got {out}, which exists. Choose another -o, or remove the folder.")
    work = out.absolute().with_name(out.absolute().name + ".work")
    with processes(device) as own:
        with same_error():
            if world().rank == 0:
                resolve(asked.model, work / "source")
        source = resolve(asked.model, work / "source")
        evaluation = Evaluation(make_heldout(source, asked), heldout_name(asked))
        found = train_stages(source, stages, seed, work, str(own), evaluation)
        with same_error():
            if world().rank == 0:
                with atomic_folder(out) as partial:
                    write_checkpoint(found.source, found.plan, partial)
                    (partial / RECOVERY).parent.mkdir()
                    write_json(partial / RECOVERY, found.record.model_dump(mode="json"))
                shutil.rmtree(work)
        return replace(found, folder=out, rank=world().rank)


def _changed(stage: Stage, data: Sequence[str | Path] | None, steps: int | None, density: float | None, lora: int | None) -> Stage:
    """A stage with what a person gave in place of its training's."""
    assert stage.tune is not None
    values = stage.tune.model_dump()
    if data:
        mixture = [] if [str(path) for path in data] == [SELF] else [{"name": Path(data[0]).name, "share": 1.0, "files": [str(path) for path in data]}]
        values["data"] |= {"mixture": mixture}
    values |= {} if steps is None else {"steps": steps}
    values["penalty"] |= {} if density is None else {"density": density}
    values |= {} if lora is None else {"lora": {"rank": lora, "alpha": 2.0 * lora}}
    return stage.model_copy(update={"tune": make_part(Recovery, values, "The training")})


def stage_folder(work: Path, number: int) -> Path:
    """Where a training stage keeps its text, state and result."""
    return work / f"stage_{number}"


def train_stages(source: Source, stages: Sequence[Stage], seed: int, work: Path, device: str, evaluation: Evaluation) -> Tuned:
    """Run training stages one after another, each on the checkpoint of the one before and all towards the dense `source`; the record is that of all.

    Raises InputError as `tuned` does.
    """
    _check(source, stages)
    found, records = None, []
    for number, stage in enumerate(stages):
        assert stage.tune is not None
        given = source if found is None else found.source
        with same_error():
            if number and stage.tune.data == stages[number - 1].tune.data and world().rank == 0:  # type: ignore[union-attr]
                _share_text(stage_folder(work, number - 1), stage_folder(work, number))
        found = tuned(given, stage.config.get("activation"), stage.tune, seed, stage_folder(work, number), device, evaluation, source)
        records.append(found.record)
    assert found is not None
    return replace(found, record=joined(records))


def _check(source: Source, stages: Sequence[Stage]) -> None:
    """Raise InputError, before anything is sampled, for an activation or a number of windows that training would meet later."""
    for site in source.arch.sites(source.config):
        name = stages[0].config.get("activation") or _present(source, site)
        check_exact(name)
        if name == "drelu" and source.arch.ffn.kind == "plain":
            raise InputError(f"The activation of a plain network must be one of a single product, got drelu in {source.arch.model_type}. Use relu.")
    for stage in stages:
        assert stage.tune is not None
        share_of(stage.tune.windows, "The windows of a micro-batch")


def _share_text(before: Path, after: Path) -> None:
    """Let a stage read the text that the one before it had made, with no seconds of its own."""
    for name in (GENERATED, MIXTURE):
        if (before / name).is_dir() and read_header(before / name) != read_header(after / name):
            with atomic_folder(after / name) as partial:
                shutil.copytree(before / name, partial, dirs_exist_ok=True)
                write_json(partial / SECONDS, {"seconds": 0.0})


def tuned(
    source: Source, activation: str | None, asked: Recovery, seed: int, work: Path, device: str, evaluation: Evaluation, original: Source | None = None
) -> Tuned:
    """Swap the activation of every feed-forward network of `source` for `activation` (None: as it is), recover, and store all below `work`; what is finished
    there under the same settings is not made again, and an interrupted training goes on to the same weights. `original` (None: `source`) is the dense model
    that teaches and writes the text.

    Raises InputError for activations and settings that do not fit the model, and where training fails.
    """
    config: dict[str, Any] = {"activation": activation, "tune": asked.model_dump(mode="json"), "evaluation": evaluation.batches.sha256}
    if asked.data.mixture:
        config["text"] = files_hash(asked.data)
    original = original or source
    parents = {"model": source.fingerprint} | ({} if original is source else {"original": original.fingerprint})
    header = Header(format="tuned", parents=parents, config=config, seed=seed)
    folder = work / "tuned"
    if not is_finished(folder, header):
        _tune(source, original, activation, asked, seed, work, device, evaluation, header)
    record = RecoveryRecord.load(folder / "recovery.json")
    return Tuned(folder / "checkpoint", load_plan(folder / "plan"), record, header)


def _tune(
    source: Source,
    original: Source,
    activation: str | None,
    asked: Recovery,
    seed: int,
    work: Path,
    device: str,
    evaluation: Evaluation,
    header: Header,
) -> None:
    with same_error():
        if world().rank == 0:
            training_text(original, asked, seed, work)  # the other processes find it finished
    batches, text = training_text(original, asked, seed, work)
    teacher, student = load_dense(original.folder), load_dense(source.folder)
    teacher.requires_grad_(False)
    arch, own, sites = source.arch, source.arch.activation(source.config), source.arch.sites(source.config)
    wished = {site: activation or _present(source, site) for site in sites}
    turned = [site for site in sites if wished[site] == "drelu" != _present(source, site)]
    if turned:
        orient(student, arch, own, batches.tokens[:_PROBE], turned)
    for site, name in wished.items():
        swap(student.get_submodule(arch.ffn_module(site.layer)), arch, name)
    exact: Plan = {site: [Swap(name)] for site, name in wished.items()}
    swapped, fitted = None, Training(0, 0.0, 0.0, [], [], {})
    if asked.by_block is not None:
        swapped = _compared(student, exact, evaluation.batches, teacher, source)
        blocks, began = asked.by_block, time.monotonic()
        rows = recover_by_block(
            student, teacher, arch, batches, blocks, seed, work / "by_block", header, l1=blocks.l1, precision=asked.precision, device=device
        )
        tokens, cpu = len(rows) * blocks.steps * blocks.tokens, sum(float(row["cpu_seconds"]) for row in rows)
        fitted = replace(fitted, tokens=tokens, seconds=time.monotonic() - began, cpu_seconds=cpu)
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
    whole: Plan = {site: [*entries, *([trained.units[site].entry(1.0)] if trained.units else [])] for site, entries in exact.items()}
    whole = with_shares(student, whole, arch, own, batches)
    exact = {site: entries[:1] for site, entries in whole.items()}
    recovered = _compared(student, exact, evaluation.batches, teacher, source)
    quality = _quality(recovered, _compared(student, whole, evaluation.batches, teacher, source) if trained.units else None)
    record = RecoveryRecord(
        activation=", ".join(sorted(set(wished.values()))), text=text, settings=asked.model_dump(mode="json"),
        tokens_trained=fitted.tokens + trained.tokens, seconds=fitted.seconds + trained.seconds, cpu_seconds=fitted.cpu_seconds + trained.cpu_seconds,
        machine=this_machine(), versions=installed_versions(), curve=trained.curve, heldout=trained.heldout,
        dense=DenseQuality(nll=swapped.nll_dense, tokens=swapped.tokens), swapped=_quality(swapped), recovered=quality,
        exact=_quality(recovered) if trained.units else None,
        evaluation=Text(hash=evaluation.batches.sha256, tokens=swapped.tokens, name=evaluation.name),
    )  # fmt: skip
    weights = {name: gathered(tensor) for name, tensor in plain_state(student).items()}
    with same_error():
        if world().rank == 0:
            with atomic_folder(work / "tuned") as partial:
                (partial / "checkpoint").mkdir()
                (partial / "plan").mkdir()
                write_checkpoint(source, exact, partial / "checkpoint", {name: tensor for name, tensor in weights.items() if tensor is not None})
                save_plan(partial / "plan", whole, header)
                write_json(partial / "recovery.json", record.model_dump(mode="json"))
                write_header(partial, header)


def joined(records: Sequence[RecoveryRecord]) -> RecoveryRecord:
    """The record of stages that followed one another: before the first, after the last, and the sums and curves of all."""
    if len(records) == 1:
        return records[0]
    first, last = records[0], records[-1]
    curve, heldout, steps, tokens, seconds = [], [], 0, 0, 0.0
    for record in records:
        curve += [p.model_copy(update={"step": p.step + steps, "tokens": p.tokens + tokens, "seconds": p.seconds + seconds}) for p in record.curve]
        heldout += [p.model_copy(update={"step": p.step + steps, "tokens": p.tokens + tokens}) for p in record.heldout]
        steps, tokens, seconds = steps + int(record.settings["steps"]), tokens + record.tokens_trained, seconds + record.seconds
    texts = list({record.text.hash: record.text for record in reversed(records)}.values())[::-1]  # of equal ones the first, which took the seconds
    text = first.text if len(texts) == 1 else first.text.model_copy(update={
        "name": "; ".join(dict.fromkeys(text.name for text in texts)), "windows": sum(text.windows for text in texts),
        "tokens": sum(text.tokens for text in texts), "seconds": sum(text.seconds for text in texts),
        "sampled": all(text.sampled for text in texts), "hash": None,
    })  # fmt: skip
    return last.model_copy(update={
        "text": text, "settings": {"stages": [record.settings for record in records]}, "tokens_trained": tokens, "seconds": seconds,
        "cpu_seconds": sum(record.cpu_seconds for record in records), "curve": curve, "heldout": heldout, "swapped": first.swapped, "dense": first.dense,
    })  # fmt: skip


def training_text(source: Source, asked: Recovery, seed: int, work: Path) -> tuple[Batches, TrainingText]:
    """The windows to train on and their record: of the recipe's mixture, or text that the dense source writes itself."""
    data, began = asked.data, time.monotonic()
    if data.mixture:
        batches = mixture_batches(source.tokenizer(), data, seed, work)
        name, seconds = ", ".join(f"{part.name} {part.share:g}" for part in data.mixture), time.monotonic() - began
    else:
        batches, name = (
            shifted(generated(source, data.windows, data.length, seed, work, data.temperature, streams=True)),
            f"text sampled from the dense model at temperature {data.temperature:g}",
        )
        seconds = float(read_json(work / "generated" / SECONDS, "The sampling time")["seconds"])
    sampled = not data.mixture
    count = data.windows * data.length if sampled else batches.count  # a token of sampled text stands in several windows
    return batches, TrainingText(name=name, windows=len(batches.tokens), tokens=count, sampled=sampled, seconds=seconds, hash=batches.sha256)


def shifted(batches: Batches) -> Batches:
    """Sampled windows [N, S], neighbours in their texts, joined and cut at CUTS offsets: [CUTS N - CUTS + 1, S], so that passes differ."""
    count, length = batches.tokens.shape
    stream = batches.tokens.flatten()
    cuts = [stream[start : start + (count - bool(start)) * length].view(-1, length) for start in range(0, length, -(-length // CUTS))]
    tokens = torch.cat(cuts)
    return Batches(tokens, torch.ones_like(tokens, dtype=torch.bool))


def _present(source: Source, site: Site) -> str:
    return source.swaps[site].activation if site in source.swaps else source.arch.activation(source.config)


def _units(student: Any, source: Source, asked: Recovery, seed: int, probe: Tensor) -> dict[Site, Unit]:
    """Fresh predictors by site, where they are asked for."""
    if asked.predictors is None:
        return {}
    arch, config = source.arch, source.config
    hidden, units, matrices = arch.size(config, "hidden"), arch.size(config, "units"), 2 if arch.ffn.kind == "plain" else 3
    rank = rank_for(hidden, units, matrices, asked.predictors.cost)
    scales = input_rms(student, arch, arch.sites(config), probe)
    generator = torch.Generator().manual_seed(seed * 7919)
    return {site: make_unit(fresh_predictor(hidden, units, rank, generator), student.device, scale) for site, scale in scales.items()}


def _leaves(student: Any, source: Source, asked: Recovery, seed: int) -> Callable[[], dict[str, Tensor]]:
    """Makes ready what is trained, and returns how to ask for it by name when the model is in its place: low-rank updates of the blocks' linear maps, or every
    weight.
    """
    if asked.lora is None:
        return lambda: dict(student.named_parameters())
    student.requires_grad_(False)
    add_lora(student, linear_names(student, source.arch.block.partition("{layer}")[0]), asked.lora.rank, asked.lora.alpha, seed)
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
    store = work / "heldout.json"
    if not is_finished(work / "state", header):
        store.unlink(missing_ok=True)
    tokens = min(asked.accumulate * asked.windows, len(batches.tokens)) * batches.tokens.shape[1]
    objective = RecoveryObjective(
        student, teacher if asked.losses.distill or asked.losses.hidden else None, arch, arch.activation(source.config), sites, asked,
        settings_of(asked, seed), leaves, units, {name for name in leaves if name in linear or asked.lora is not None},
        _watch(student, teacher, source, units, asked, evaluation, store, tokens),
    )  # fmt: skip
    with checkpointed(student) if asked.checkpointing else nullcontext():
        curve = train(objective, batches, settings_of(asked, seed), work / "state", header, lambda _: None, "recover")
    rows = read_json(store, "The held-out curve")["rows"] if store.is_file() else []
    seconds = float(curve[-1]["seconds"]) if curve else 0.0
    cpu = float(sum_over_processes(torch.tensor(objective.cpu_seconds)))
    points = [CurvePoint.model_validate({name: row[name] for name in CurvePoint.model_fields if name in row} | _whole(row)) for row in curve]
    return Training(asked.steps * tokens, seconds, cpu, points, [HeldoutPoint.model_validate(row) for row in rows], units)


def _whole(row: dict[str, float]) -> dict[str, int]:
    return {name: int(row[name]) for name in ("step", "tokens")}


def _watch(
    student: Any, teacher: Any, source: Source, units: dict[Site, Unit], asked: Recovery, evaluation: Evaluation, store: Path, tokens: int
) -> Callable[[int], dict[str, float]]:
    """Looks at held-out text WATCHES times, and keeps what it saw in `store`, so that a resumed run has the whole curve. `tokens` are those of a step."""
    few = Batches(evaluation.batches.tokens[::WATCHED], evaluation.batches.mask[::WATCHED])
    every = max(1, asked.steps // WATCHES)
    modules = {site: student.get_submodule(source.arch.ffn_module(site.layer)) for site in source.arch.sites(source.config)}

    def watch(step: int) -> dict[str, float]:
        if (step + 1) % every or world().size > 1:
            return {}
        plan: Plan = {site: [Swap(module.swapped), *([units[site].entry(1.0)] if units else [])] for site, module in modules.items()}
        found = _compared(student, plan, few, teacher, source)
        rows = read_json(store, "The held-out curve")["rows"] if store.is_file() else []
        row = HeldoutPoint(
            step=step + 1, tokens=(step + 1) * tokens, nll=found.nll, nll_dense=found.nll_dense, kl=max(0.0, found.kl), agreement=found.agreement,
            density=None if units else found.density, predicted=found.density if units else None,
        )  # fmt: skip
        write_json(store, {"rows": [old for old in rows if old["step"] < step + 1] + [row.model_dump()]})
        return {"heldout": found.nll}

    return watch


@torch.no_grad()
def _compared(student: Any, plan: Plan, batches: Batches, teacher: Any, source: Source) -> Quality:
    """The student under its plan beside the dense source on held-out windows."""
    apply_plan(student, plan, source.arch, source.arch.activation(source.config))
    try:
        return measure_quality(student, plan, batches, original=teacher)
    finally:
        remove_plan(student)


def _quality(exact: Quality, predicted: Quality | None = None) -> SwappedQuality:
    """What is reported of a model with exact zeros: its loss, with predictors theirs, and the shares by site."""
    shown = predicted or exact
    sites = [
        SiteDensity(site=key, density=share, opened=exact.site_opened[key], predicted=predicted.site_density[key] if predicted else None)
        for key, share in exact.site_density.items()
    ]
    return SwappedQuality(
        nll=shown.nll, kl=max(0.0, shown.kl), agreement=shown.agreement, density=exact.density,
        opened=sum(site.opened for site in sites) / len(sites), predicted=predicted.density if predicted else None, cost=shown.cost, sites=sites,
    )  # fmt: skip

"""convert: schedule, ONNX, verification and report, then one rename. Everything before lives in OUT.work and is resumed
from there.
"""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.library import variants
from ..arch import load_arch
from ..bundled import BUNDLED_MODEL, BUNDLED_NAME
from ..checkpoint.config_bounds import check_graph
from ..checkpoint.listing import SMALL, unlisted
from ..checkpoint.manifest import (
    MANIFEST,
    Manifest,
    check_files,
    installed_versions,
    list_files,
    read_manifest,
    write_manifest,
)
from ..checkpoint.source import Source, backed_config, check_config, has_own_head
from ..checkpoint.stage import atomic_folder, hash_file, hash_json, known_hash, listed_files, write_json
from ..checkpoint.work_folder import check_out, check_work, claimed, remove, remove_leftover, work_of
from ..evaluation.checks import ExecutorQuality
from ..evaluation.records import RESULTS, Report, StageTime
from ..evaluation.recovery_record import RECOVERY, RecoveryRecord
from ..methods import EXACT, TUNED
from ..modeling.blocks import unused_tensors
from ..modeling.distributed import check_device
from ..onnx_export.precision import PRECISIONS
from ..progress import Job, job, stage
from ..report.card import read_base_card
from ..report.html import write_report
from ..sources.hub import Remote, check_disk, is_hub_id, remote_inspect
from ..sources.named import resolve
from ..sources.predictors import Config as ImportedConfig
from ..sources.published import is_published, normal_config
from ..training.stage import EVALUATED, Evaluation, Tuned
from ..training.stages import stage_folder, train_stages, training_inputs
from .candidates import Candidate, choose, measure
from .configs import Configs, has_zeros, method_configs, training_windows
from .estimate import Estimate, estimate, estimate_shapes
from .fingerprint import conversion_fingerprint, fetched_fingerprint
from .graphs import make_graphs, room
from .push import check_push, push
from .recipe import Recipe, compile_recipe, training_stages
from .record import build_report
from .references import measure_references
from .schedule import keep_plan, once
from .texts import Texts, heldout_name, make_heldout, make_texts
from .time_budget import Decision, decide, decided, header, keep, stored, within

log = logging.getLogger("sparsegate")
MEASURED = ("nll_dense", "nll", "kl", "agreement", "density", "cost", "nll_error", "windows")
"""What the manifest records of the quality."""
RECOVERING = "recovery"
"""The training stage's own work folder below OUT.work."""


@dataclass(frozen=True)
class Result:
    """What `convert` returns: the folder, whether it was there already, its report, the URL it was pushed to, and the
    ONNX model's precision.
    """

    folder: Path
    up_to_date: bool
    report: Report | None
    estimate: Estimate | None = None
    url: str | None = None
    precision: str = "fp32"


def convert(
    model: str | None = None,
    output: str | Path | None = None,
    method: str | None = None,
    sparsity: float | None = None,
    max_ppl_increase: float | None = None,
    max_kl: float | None = None,
    recipe: str | Path | None = None,
    calibration: str | Path | None = None,
    precision: str | None = None,
    target: str | None = None,
    seed: int | None = None,
    time_budget: str | None = None,
    device: str = "cpu",
    push_to: str | None = None,
    public: bool = False,
    dry_run: bool = False,
    keep_stages: bool = False,
    command: str = "sparsegate convert",
) -> Result:
    """Turn a model folder or Hub id into the sparse checkpoint OUT. `model` None is the small model that comes with
    sparsegate.

    Raises InputError for every user's mistake, and when the result breaks its budget or its executors disagree; OUT
    then does not appear.
    """
    asked = compile_recipe(
        model, method, sparsity, max_ppl_increase, max_kl, recipe, calibration, precision, target, seed
    )
    asked = within(asked, time_budget, recipe is not None)
    out = (
        Path(output)
        if output
        else Path(f"{BUNDLED_NAME if asked.model == BUNDLED_MODEL else Path(asked.model).absolute().name}-sparse")
    )
    check_device(device)
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise InputError(
            f"convert must run in one process, got {os.environ['WORLD_SIZE']}. Run sparsegate tune under torchrun and "
            "convert what it writes."
        )
    if push_to:
        push_to = check_push(push_to).id
    check_out(out)
    if out.exists() and not (out / MANIFEST).is_file():
        raise _occupied(out, "something else")
    inputs = _inputs(asked, recipe)
    with job() as running:
        if not dry_run and not out.exists():
            with claimed(out, inputs) as work:
                if not out.exists():  # else a conversion that ended in this moment
                    return _run(
                        _Order(asked, out, device, push_to, public, dry_run, keep_stages, command, inputs, work),
                        running,
                    )
        elif not out.exists():
            check_work(out, inputs)
        with TemporaryDirectory() as scratch:  # what only looks writes nothing
            return _run(
                _Order(asked, out, device, push_to, public, dry_run, keep_stages, command, inputs, Path(scratch)),
                running,
            )


def _run(order: _Order, running: Job) -> Result:
    with nullcontext() if order.dry_run else stage("open"):
        opened = _opened(order)
    if isinstance(opened, Result):
        return opened
    running.expect(opened.needed.seconds)
    for note in opened.needed.notes:
        log.warning("%s", note)
    return _converted(order, opened, running)


def _inputs(asked: Recipe, recipe: str | Path | None) -> list[tuple[str, Path]]:
    """Files and folders of the user's that a conversion reads, and what they are."""
    found = [] if asked.model == BUNDLED_MODEL or is_hub_id(asked.model) else [("MODEL", Path(asked.model))]
    found += [("The recipe", Path(recipe))] if recipe and Path(recipe).exists() else []
    found += [("The calibration text", Path(asked.calibration.file))] if asked.calibration.file else []
    imported = [
        config
        for parts in method_configs(asked).values()
        for config in parts.values()
        if isinstance(config, ImportedConfig)
    ]
    found += [("The folder of predictors", Path(config.folder)) for config in imported if config.folder]
    return found + training_inputs(training_stages(asked))


@dataclass(frozen=True)
class _Order:
    """What a person wants of a conversion, and the folder of its stages."""

    recipe: Recipe
    out: Path
    device: str
    push_to: str | None
    public: bool
    dry_run: bool
    keep_stages: bool
    command: str
    inputs: list[tuple[str, Path]]
    work: Path


@dataclass(frozen=True)
class _Opened:
    """A model that can be converted, the record of the training that its weights come from (None: of none), what its
    conversion is and needs (`recipe` has the steps that fit into its time), and the tensors in its files that it does
    not compute with.
    """

    source: Source
    record: RecoveryRecord | None
    recipe: Recipe
    configs: Configs
    needed: Estimate
    fingerprint: str
    unused: list[str]


def _opened(order: _Order) -> _Opened | Result:
    """The model, fetched where it lies on the Hub; the result where nothing is to be made: of a dry run, or where OUT
    is there already.
    """
    asked, out, work = order.recipe, order.out, order.work
    configs = method_configs(asked)
    if asked.model != BUNDLED_MODEL and is_hub_id(asked.model):
        if out.exists() and not order.dry_run:
            return _existing(order, fetched_fingerprint(out, asked, configs))
        if order.dry_run or not (work / "source").exists():  # what was fetched before also serves without a network
            remote_needs = _remote_estimate(remote_inspect(asked.model), order, configs)
            if order.dry_run:
                return Result(out, False, None, remote_needs, precision=asked.export.precision)
            check_disk(out, remote_needs.disk_bytes)
    source = resolve(asked.model, work / "source")
    check_graph(source.arch, source.config)
    record = RecoveryRecord.load(source.folder / RECOVERY) if (source.folder / RECOVERY).is_file() else None
    exact = bool(training_stages(asked)) or has_zeros(source)
    fingerprint = ""
    if not order.dry_run:
        fingerprint = conversion_fingerprint(_taken_over(source), asked, method_configs(asked, exact))
        if out.exists():
            return _existing(order, fingerprint)
    decision = _decision(order, source, method_configs(asked, exact))
    recipe = decided(asked, decision)
    configs = method_configs(recipe, exact)
    needed = estimate(source, recipe, configs).model_copy(update=decision.shown())
    if order.dry_run:
        return Result(out, False, None, needed, precision=asked.export.precision)
    check_disk(out, needed.disk_bytes)
    unused = unused_tensors(source)
    if unused:
        names = ", ".join(unused[:3]) + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
        log.warning(
            "Not computed with, because %s has no such tensors: %s. The report lists them.",
            source.arch.model_type,
            names,
        )
    if has_own_head(source):
        log.warning(
            "config.json ties the head to the embedding, but the weights hold another head: that one is converted, as "
            "transformers uses it."
        )
    keep(work, header(source.fingerprint, asked), decision)
    return _Opened(source, record, recipe, configs, needed, fingerprint, unused)


def _decision(order: _Order, source: Source, configs: Configs) -> Decision:
    """The methods and steps that fit: those of an earlier run, else by what this machine takes now."""
    shapes, size = (
        {name: info.shape for name, info in source.tensors.items()},
        sum(info.bytes for info in source.tensors.values()),
    )
    found = stored(work_of(order.out), lambda: header(source.fingerprint, order.recipe))
    return found or decide(source.arch, source.config, shapes, size, order.recipe, configs, order.device)


def _converted(order: _Order, opened: _Opened, running: Job) -> Result:
    """The stages from the opened model to OUT."""
    asked, work, device, source, configs = opened.recipe, order.work, order.device, opened.source, opened.configs
    recovered = _recovered(source, asked, work / RECOVERING, device)
    with stage("text"):
        texts = _texts(source, asked, training_windows(configs), work)
    original, source, record = (
        (source, recovered.source, recovered.record) if recovered else (None, source, opened.record)
    )
    graphs = make_graphs(
        source, texts, asked, work, original
    )  # first: a graph that is not the model ends it before minutes of calibration
    searched = asked
    if asked.budget.bounded and PRECISIONS[asked.export.precision].bits is not None:
        searched = room(asked, graphs)
    if recovered and TUNED in configs:
        plans = {TUNED: keep_plan(recovered.plan, recovered.header, work)}
        if any(
            len(entries) > 1 for entries in recovered.plan.values()
        ):  # predictors: what the zeros alone would give stands beside
            plans[EXACT] = keep_plan(
                {site: entries[:1] for site, entries in recovered.plan.items()}, recovered.header, work, EXACT
            )
    else:
        plans = once(source, texts, searched, configs, work, device, original)
    with stage("quality"):
        measured = measure(source, plans, _sparsities(configs, asked), texts, asked, work, original)
    chosen, candidates = choose(measured, source, texts, graphs, asked, work, original)
    references = measure_references(source, texts, graphs, asked, work, bool(chosen.speed), original)
    with stage("report"):
        report = build_report(original or source, asked, texts, candidates, chosen, graphs, order.command, references)
        told = {"stages": _times(running), "unused_tensors": opened.unused, "time_notes": opened.needed.notes}
        report = report.model_copy(update=told)
        _finish(order, opened.fingerprint, original or source, texts, chosen, report, record)
        if not order.keep_stages:
            remove(work)
    return Result(order.out, False, report, opened.needed, _pushed(order), asked.export.precision)


def _times(running: Job) -> list[StageTime]:
    found = running.resumed | running.partly
    return [
        StageTime(name=name, expected_seconds=expected, seconds=seconds, resumed=name in found)
        for name, expected, seconds in running.rows()
    ]


def _pushed(order: _Order) -> str | None:
    """The URL that OUT was pushed to, None where it was not to be pushed."""
    if not order.push_to:
        return None
    return push(order.out, order.push_to, private=not order.public)


def _recovered(source: Source, recipe: Recipe, work: Path, device: str) -> Tuned | None:
    """The checkpoint that the recipe's training stages make of `source`, None without one."""
    stages = training_stages(recipe)
    if not stages:
        return None
    if any(stage.tune is not None and stage.tune.parallel == "fsdp" for stage in stages):
        raise InputError(
            "convert must train in one process, got parallel fsdp. Run sparsegate tune under torchrun and convert what "
            "it writes."
        )
    return train_stages(
        source,
        stages,
        recipe.seed,
        work,
        device,
        Evaluation(make_heldout(source, recipe, EVALUATED), heldout_name(recipe)),
    )


def _texts(source: Source, recipe: Recipe, training: int, work: Path) -> Texts:
    """The windows of the conversion; those that the dense model writes are the ones that it wrote for the first
    training stage, where it did and where none is searched on, which must be text that nothing was trained on.
    """
    first = next((stage.tune for stage in training_stages(recipe)), None)
    if first is None or first.data.mixture or recipe.searches:
        return make_texts(source, recipe, training, work)
    return make_texts(
        source, recipe, training, stage_folder(work / RECOVERING, 0), first.data.temperature, streams=True
    )


def _sparsities(configs: Configs, recipe: Recipe) -> dict[str, float | None]:
    """The share to skip that each method was asked for; None where a budget, files, zeros or a training decide."""
    return {
        name: None if recipe.searches else getattr(next(iter(parts.values()), None), "sparsity", None)
        for name, parts in configs.items()
    } | {EXACT: None}


def _existing(order: _Order, fingerprint: str) -> Result:
    out, manifest = order.out, read_manifest(order.out)
    if manifest.fingerprint == fingerprint:
        wrong = check_files(out, manifest, hashed=SMALL) + unlisted(out, manifest)
        if wrong:
            raise InputError(
                f"OUT must be as its {MANIFEST} says, got {out}, where {wrong[0]}. Remove the folder and run the same "
                "command again."
            )
        if not order.keep_stages:
            remove_leftover(out, order.inputs, shared=(out / "config.json").stat().st_nlink > 1)
        return Result(out, True, Report.load(out / RESULTS), url=_pushed(order))
    raise _occupied(out, "another conversion")


def _occupied(out: Path, what: str) -> InputError:
    return InputError(
        f"OUT must be a new folder, got {out}, which holds {what}. Choose another -o, or remove the folder."
    )


def _taken_over(source: Source) -> str:
    """The fingerprint of the model, with the record of the training that made it, where there is one: it goes into OUT
    as well.
    """
    record = source.folder / RECOVERY
    return (
        hash_json({"model": source.fingerprint, "record": known_hash(record)})
        if record.is_file()
        else source.fingerprint
    )


def _remote_estimate(remote: Remote, order: _Order, configs: Configs) -> Estimate:
    """What a Hub model will need, from its configuration and headers; no weight is fetched. Bytes include the download,
    the times of a dry run do not.
    """
    recipe = order.recipe
    raw = normal_config(remote.config) if is_published(remote.config) else remote.config
    check_config(raw)
    arch = load_arch(str(raw.get("model_type")))
    config = backed_config(arch, raw, remote.tensors)
    check_graph(arch, config)
    shapes = {name: shape for name, (shape, _) in remote.tensors.items()}
    times: dict[str, Any] = {}
    if order.dry_run:
        decision = decide(arch, config, shapes, remote.total_bytes, recipe, configs, order.device)
        times, configs = decision.shown(), method_configs(decided(recipe, decision))
    needed = estimate_shapes(arch, config, shapes, remote.total_bytes, recipe, configs)
    return needed.model_copy(
        update={
            "disk_bytes": needed.disk_bytes + remote.download_bytes,
            "download_bytes": remote.download_bytes,
            **times,
        }
    )


def _finish(
    order: _Order,
    fingerprint: str,
    source: Source,
    texts: Texts,
    chosen: Candidate,
    report: Report,
    record: RecoveryRecord | None,
) -> None:
    """Assemble OUT from the chosen candidate's stages, report and card; the manifest is written last and one rename
    makes OUT appear. `record` is that of the training that the weights come from, here or before.
    """
    out, recipe, keep_stages = order.out, order.recipe, order.keep_stages
    quality = chosen.quality
    with atomic_folder(out, new=True) as partial:
        assert chosen.checkpoint is not None and chosen.onnx is not None
        _place(chosen.checkpoint, partial, keep_stages)
        (partial / "onnx").mkdir()
        _place(chosen.onnx, partial / "onnx", keep_stages)
        if record is not None:
            (partial / RECOVERY).parent.mkdir(exist_ok=True)
            write_json(partial / RECOVERY, record.model_dump(mode="json"))
        write_report(partial, report, read_base_card(source.folder, source.id, source.revision), order.push_to)
        manifest = Manifest(
            fingerprint=fingerprint,
            source={"id": source.id, "revision": source.revision, "fingerprint": source.fingerprint},
            calibration={
                "sha256": texts.calibration.sha256,
                "tokens": texts.calibration.count,
                "file": None if recipe.calibration.file is None else hash_file(Path(recipe.calibration.file)),
            },
            recipe=report.recipe,
            seed=recipe.seed,
            budget=recipe.budget.model_dump() | {"sparsity": chosen.sparsity, "searched": recipe.searches},
            measured={name: getattr(quality, name) for name in MEASURED} | _onnx_measured(chosen.shipped),
            onnx={**recipe.export.model_dump(mode="json"), "variants": variants(chosen.onnx)},
            versions=installed_versions(),
            files=list_files(partial),
        )
        write_manifest(partial, manifest)


def _onnx_measured(shipped: ExecutorQuality | None) -> dict[str, float]:
    return {} if shipped is None else {f"onnx_{name}": getattr(shipped, name) for name in ("nll", "kl", "agreement")}


def _place(stage: Path, folder: Path, keep: bool) -> None:
    """Put a stage's files into `folder`. The stage stays whole, so that an interruption costs nothing; without `keep`
    it goes soon and hard links do.
    """
    for name in listed_files(stage) or {}:  # and nothing that came there since
        path, target = stage / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            (shutil.copyfile if keep else os.link)(path, target)
        except OSError:
            if keep:
                raise
            shutil.copyfile(path, target)  # a file system without hard links

"""convert: from a model to OUT. Every step is a stage below OUT.work, from where an interrupted conversion goes on; OUT
appears by one rename at the end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...runtime_onnx.errors import InputError
from ..bundled import BUNDLED_MODEL, BUNDLED_NAME
from ..checkpoint.manifest import MANIFEST
from ..checkpoint.source import Source
from ..checkpoint.work_folder import check_out, check_work, claimed, remove
from ..evaluation.records import StageTime
from ..methods import EXACT, TUNED
from ..modeling.distributed import check_device
from ..onnx_export.precision import PRECISIONS
from ..progress import Job, job, stage
from ..sources.hub import is_hub_id
from ..sources.predictors import Config as ImportedConfig
from ..training.inputs import Heldout
from ..training.stage import EVALUATED, Tuned
from ..training.stages import stage_folder, train_stages, training_inputs
from .auto import Rounds, Tried
from .candidates import choose, measure
from .configs import AUTO, Configs, method_configs, training_windows
from .conversion import Conversion
from .finish import pushed, write_out
from .graphs import Graphs, make_graphs, room
from .opening import occupied, open_model
from .order import Opened, Order, Result
from .push import check_push
from .recipe import CHAT, Flags, Recipe, compile_recipe, training_stages
from .record import build_report
from .references import measure_references
from .rotate import ROTATED, rotated
from .schedule import keep_plan, once
from .texts import Texts, heldout_name, make_heldout, make_texts
from .time_budget import within

log = logging.getLogger("sparsegate")
RECOVERING = "recovery"
"""The training stage's own work folder below OUT.work."""


def convert(
    model: str | None = None,
    output: str | Path | None = None,
    method: str | None = None,
    sparsity: float | None = None,
    max_ppl_increase: float | None = None,
    max_kl: float | None = None,
    max_kl_long: float | None = None,
    recipe: str | Path | None = None,
    calibration: str | Path | None = None,
    precision: str | None = None,
    target: str | None = None,
    seed: int | None = None,
    rotate: bool = False,
    time_budget: str | None = None,
    device: str = "cpu",
    push_to: str | None = None,
    public: bool = False,
    dry_run: bool = False,
    keep_stages: bool = False,
    command: str = "sparsegate convert",
) -> Result:
    """Turn a model folder or Hub id into the sparse checkpoint OUT. `model` None is the small model that comes with
    sparsegate. The parameters are the flags of the command line.

    Raises InputError for every user's mistake, and when the result breaks its budget or its executors disagree; OUT
    then does not appear.
    """
    told: dict[str, Any] = {
        "model": model,
        "method": method,
        "sparsity": sparsity,
        "recipe": recipe,
        "calibration": calibration,
    }
    told |= {"max_ppl_increase": max_ppl_increase, "max_kl": max_kl, "max_kl_long": max_kl_long}
    told |= {"precision": precision, "target": target, "seed": seed, "rotate": rotate or None}
    flags = Flags(**told)
    compiled = within(compile_recipe(flags), time_budget, recipe is not None)
    name = BUNDLED_NAME if compiled.model == BUNDLED_MODEL else Path(compiled.model).absolute().name
    out, inputs = Path(output or f"{name}-sparse"), _inputs(compiled, recipe)
    order = Order(compiled, out, device, push_to, public, dry_run, keep_stages, command, inputs)
    order = _checked(order)
    with job() as running, _work_folder(order) as work:
        return _converted(order, work, running)


def _converted(order: Order, work: Path, running: Job) -> Result:
    """The steps from the named model to OUT."""
    with nullcontext() if order.dry_run else stage("open"):
        opened = open_model(order, work)
    if isinstance(opened, Result):
        return opened
    running.expect(opened.needed.seconds)
    for note in opened.needed.notes:
        log.warning("%s", note)
    recovered = _recovered(opened.source, opened.recipe, work / RECOVERING, order.device)
    opened = opened if recovered is None else replace(opened, record=recovered.record)
    conversion = _begun(order, opened, work, recovered)
    graphs = make_graphs(conversion)  # first: a graph that is not the model ends it before minutes of calibration
    tried = _tried(conversion, opened, graphs, recovered, running)
    chosen, candidates = choose(conversion, tried.candidates, graphs)
    references = measure_references(conversion, graphs, bool(chosen.speed))
    with stage("report"):
        report = build_report(conversion, candidates, chosen, graphs, references, order.command)
        notes = opened.decision.said(tried.form)
        told = {"stages": _times(running), "unused_tensors": opened.unused, "time_notes": notes}
        report = report.model_copy(update=told)
        write_out(order, opened, conversion, chosen, report)
        if not order.keep_stages:
            remove(work)
    return Result(order.out, False, report, opened.needed, pushed(order), order.recipe.export.precision)


def _checked(order: Order) -> Order:
    """The order with its repository's full name. Raises InputError for what can be known before anything is opened."""
    check_device(order.device)
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise InputError(
            f"convert must run in one process, got {os.environ['WORLD_SIZE']}. Run sparsegate tune under torchrun and "
            "convert what it writes."
        )
    if order.push_to:
        order = replace(order, push_to=check_push(order.push_to).id)
    check_out(order.out)
    if order.out.exists() and not (order.out / MANIFEST).is_file():
        raise occupied(order.out, "something else")
    return order


@contextmanager
def _work_folder(order: Order) -> Iterator[Path]:
    """The folder of the stages, for this process alone; one that is thrown away where OUT is there or only looked at:
    what only looks writes nothing.
    """
    with ExitStack() as held:
        if not order.dry_run and not order.out.exists():
            work = held.enter_context(claimed(order.out, order.inputs))
            if not order.out.exists():  # else a conversion that ended in this moment
                yield work
                return
            held.close()
        elif not order.out.exists():
            check_work(order.out, order.inputs)
        yield Path(held.enter_context(TemporaryDirectory()))


def _inputs(compiled: Recipe, recipe: str | Path | None) -> list[tuple[str, Path]]:
    """Files and folders of the user's that a conversion reads, and what they are."""
    inputs = [] if compiled.model == BUNDLED_MODEL or is_hub_id(compiled.model) else [("MODEL", Path(compiled.model))]
    inputs += [("The recipe", Path(recipe))] if recipe and Path(recipe).exists() else []
    inputs += [("The calibration text", Path(compiled.calibration.file))] if compiled.calibration.file else []
    imported = [
        config
        for parts in method_configs(compiled).values()
        for config in parts.values()
        if isinstance(config, ImportedConfig)
    ]
    inputs += [("The folder of predictors", Path(config.folder)) for config in imported if config.folder]
    return inputs + training_inputs(training_stages(compiled))


def _begun(order: Order, opened: Opened, work: Path, recovered: Tuned | None) -> Conversion:
    """The conversion of the opened model, or of what training stages and a rotation made of it, with its texts."""
    source, recipe = opened.source, opened.recipe
    with stage("text"):
        texts = _texts(source, recipe, training_windows(opened.configs), work)
    planned = source if recovered is None else recovered.source
    if recipe.rotate:
        planned = rotated(planned, texts.calibration, work / ROTATED, order.device)
    return Conversion(planned, texts, recipe, work, order.device, recovered_from=None if planned is source else source)


def _tried(conversion: Conversion, opened: Opened, graphs: Graphs, recovered: Tuned | None, running: Job) -> Tried:
    """Every method's plan and what it loses; of a recipe whose last stage trains that of the training, and beside its
    predictors what the zeros alone would give.
    """
    recipe, configs = conversion.recipe, opened.configs
    sparsities = _sparsities(configs, recipe)
    if recipe.budget.bounded and PRECISIONS[recipe.export.precision].bits is not None:
        recipe = room(recipe, graphs)
    if recipe.stages[-1].method == AUTO:

        def expect(best: str) -> None:
            running.expect(opened.decision.later.get(best, opened.decision.seconds))

        return Rounds(conversion, recipe, configs, sparsities).run(expect)
    if recovered is None or TUNED not in configs:
        plans = once(replace(conversion, recipe=recipe), configs)
    else:
        plans = {TUNED: keep_plan(conversion, recovered.plan, recovered.header)}
        if recovered.exact is not recovered.plan:
            plans[EXACT] = keep_plan(conversion, recovered.exact, recovered.header, EXACT)
    with stage("quality"):
        return Tried(measure(conversion, plans, sparsities))


def _times(running: Job) -> list[StageTime]:
    resumed = running.resumed | running.partly
    return [
        StageTime(name=name, expected_seconds=expected, seconds=seconds, resumed=name in resumed)
        for name, expected, seconds in running.rows()
    ]


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
        Heldout(make_heldout(source, recipe, EVALUATED), heldout_name(recipe)),
    )


def _texts(source: Source, recipe: Recipe, training: int, work: Path) -> Texts:
    """The windows of the conversion; those that the dense model writes are the ones that it wrote for the first
    training stage, where it did and where none is searched on, which must be text that nothing was trained on.
    """
    first = next((stage.tune for stage in training_stages(recipe)), None)
    if first is None or first.data.mixture or recipe.searches or recipe.calibration.generated == CHAT:
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

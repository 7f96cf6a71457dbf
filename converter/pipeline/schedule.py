"""The loop over stages: statistics once, then for every method a plan, its training where it is trained, and the search
where there is a budget.

Each is a folder below the work folder that is not made again when its header fits. Where a training changed weights,
the plan's stage has them too, and further steps go on with the model that they make.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

from ...runtime_onnx.errors import InputError
from ..checkpoint.cost import block_cost
from ..checkpoint.plan import VERSION, Plan, check_exact, load_plan, merge, on_swaps, save_plan
from ..checkpoint.source import open_source
from ..checkpoint.sparsity import write_stock
from ..checkpoint.stage import Header, atomic_folder, is_finished, read_header, write_header
from ..checkpoint.tensor_files import load_tensors
from ..checkpoint.writer import as_stored, write_checkpoint
from ..evaluation.density import with_shares
from ..methods import EXACT, IMPORTED, TUNED, load_method
from ..modeling.predictor import residual_rank
from ..progress import partly, resumed, stage, track
from ..sources.predictors import fingerprint, imported_plan, measured
from ..stats import Stats
from ..training.inputs import Models, TrainingRun
from ..training.plans import WEIGHTS, TrainedPlan, train_plan
from ..training.residual import add_residuals
from .configs import Configs
from .conversion import Conversion, Made
from .families import beside_swaps
from .search import Judge, settled, shifted, sparsest
from .shares import LEAST_AND_MOST, Levels, with_densities
from .statistics import Statistics

LEVELS = (0.75, 0.6, 0.45, 0.33, 0.25, 0.18, 0.13)
"""Densities at which a trained method stops in turn on its way to a budget."""
_ABOVE = 0.8  # density that gate thresholds set out from to the first of them
_NOTHING: Configs = {}
_REACH = 6.0  # logits that a trained plan is shifted by at most


@dataclass(frozen=True)
class Run(Conversion):
    """A conversion whose plans are being made: with the statistics, and the judges of a search. Its models are on the
    device.
    """

    stats: Stats = field(default_factory=dict)
    weights: Path | None = None
    """The file of the weights that a training gave `source`."""

    @classmethod
    def of(cls, conversion: Conversion, stats: Stats) -> Run:
        """The conversion with its statistics."""
        return cls(**{part.name: getattr(conversion, part.name) for part in fields(conversion)}, stats=stats)

    @property
    def placed(self) -> Any:
        """The dense model on the device."""
        return self.model(self.device)

    @property
    def teacher(self) -> Any | None:
        """The model that trained selectors are to reproduce, on the device; None where it is `placed` itself."""
        return self.reference_model(self.device)

    @property
    def activation(self) -> str:
        """The feed-forward activation by the op's name."""
        return self.source.arch.activation(self.source.config)

    @cached_property
    def judge(self) -> Judge:
        """Losses on the search windows, from the dense model."""
        assert self.texts.search is not None
        search, long, arch = self.texts.search, self.texts.search_long, self.source.arch
        return Judge(self.placed, arch, self.activation, search, reference_model=self.teacher, long=long)


class Planned(NamedTuple):
    """A plan, and the run whose model it is for."""

    plan: Plan
    run: Run


def _plan_header(conversion: Conversion, name: str, config: Mapping[str, Any], **parents: str) -> Header:
    """The header of a method's stage."""
    models = {"model": conversion.source.fingerprint}
    models |= {} if conversion.recovered_from is None else {"reference": conversion.recovered_from.fingerprint}
    return Header(
        format="plan",
        version=VERSION,
        parents=models | parents,
        config={"method": name, **config},
        seed=conversion.recipe.seed,
        calibration=conversion.texts.calibration.sha256,
    )


def once(conversion: Conversion, configs: Configs) -> dict[str, Made]:
    """One round: what every method in `configs` makes, from one set of statistics; a method that cannot meet the budget
    is left out. Stored activations go when every plan is made.

    Raises InputError when no method can meet the budget.
    """
    statistics = Statistics(conversion)
    made = make(conversion, configs, statistics)
    statistics.drop_samples()
    return met(made, configs)


def met(made: dict[str, Made], configs: Configs) -> dict[str, Made]:
    """What was made of `configs`. Raises InputError where it is nothing."""
    if not made:
        raise InputError(
            f"The budget must be one that a method can meet, got none of {', '.join(configs)} within it. Loosen it."
        )
    return made


def make(
    conversion: Conversion, configs: Configs, statistics: Statistics, later: Configs = _NOTHING
) -> dict[str, Made]:
    """What every method in `configs` makes (validated configurations by part, as `configs.method_configs` gives them),
    without those that cannot meet the budget. What methods need that are made `later` is collected in the same pass.
    """
    work = conversion.work
    headers = {name: _header(conversion, name, config) for name, config in configs.items()}
    todo = [name for name in configs if not is_finished(work / "plan" / name, headers[name])]
    if todo:
        run = Run.of(conversion, statistics.of([*(configs[name] for name in todo), *later.values()]))
        with stage("plan"):
            if len(todo) < len(configs):
                partly()
            for name in track(todo, unit="method"):
                _make_plan(run, name, configs[name], headers[name])
    else:
        trained = (f"train {_shown(name)}" for name, config in configs.items() if _is_trained(config))
        for name in (statistics.label, *trained, "plan"):
            resumed(name)
    made = {name: made_by(conversion, name) for name in configs}
    return {name: each for name, each in made.items() if each.plan}


def _shown(name: str) -> str:
    """A method by the name of its stages: of what is trained the method's own."""
    return name.partition("-")[0]


def made_by(conversion: Conversion, name: str) -> Made:
    """What the finished stage of a method's plan holds; a model with its weights is a stage too."""
    folder = conversion.work / "plan" / name
    plan, weights = load_plan(folder), folder / WEIGHTS
    if not weights.is_file():
        return Made(plan, conversion.source)
    parent = read_header(folder)
    assert parent is not None
    source = _with_weights(conversion, weights, parent, conversion.work / "models" / name).source
    return Made(plan, source, updated=True)


def _with_weights(conversion: Conversion, weights: Path, parent: Header, folder: Path) -> Conversion:
    """The conversion of the model with the weights of a file, which is written to `folder` in the source's dtypes."""
    source = conversion.source
    header = Header(format="model", parents={"weights": parent.fingerprint, "model": source.fingerprint})
    if not is_finished(folder, header):
        updated = as_stored(source, load_tensors(weights, ["F32"]))
        with atomic_folder(folder) as partial:
            write_checkpoint(source, {}, partial, updated)
            if not source.swaps:
                write_stock(partial)
            write_header(partial, header)
    return conversion.with_source(open_source(folder))


def _make_plan(run: Run, name: str, config: Mapping[str, Any], header: Header) -> None:
    """A method's plan, as a stage that is finished."""
    if run.recipe.searches:
        with stage(f"search {_shown(name) if _is_trained(config) else name}", apart=True):
            planned = _searched(run, name, config)
    else:
        planned = direct_plan(run, name, config)
    with atomic_folder(run.work / "plan" / name) as partial:
        save_plan(partial, {} if planned is None else _completely(planned), header)
        if planned is not None and planned.run.weights is not None:
            shutil.copyfile(planned.run.weights, partial / WEIGHTS)


def _completely(planned: Planned) -> Plan:
    """The plan with the swapped activation of every site, where the model has any, and with the shares of exact sites
    as they are on the calibration text.
    """
    run = planned.run
    whole = on_swaps(planned.plan, run.source.swaps, run.activation)
    texts, swaps = run.texts, run.source.swaps
    return with_shares(run.placed, whole, run.source.arch, run.activation, texts.calibration, swaps)


def _header(conversion: Conversion, name: str, config: Mapping[str, Any]) -> Header:
    recipe, texts = conversion.recipe, conversion.texts
    parents = {"training": texts.training.sha256} if _is_trained(config) else {}
    files = fingerprint(config[IMPORTED]) if IMPORTED in config else None
    parents |= {"predictors": files} if files else {}
    budget = {}
    if recipe.searches:
        assert texts.search is not None
        budget, parents = (
            {"budget": recipe.budget.model_dump(mode="json")},
            parents | {"search": texts.search.sha256},
        )
        parents |= {} if texts.search_long is None else {"search_long": texts.search_long.sha256}
    return _plan_header(
        conversion, name, {part: values.model_dump(mode="json") for part, values in config.items()} | budget, **parents
    )


def _is_trained(config: Mapping[str, Any]) -> bool:
    """Whether a method of these parts can be trained."""
    return any(getattr(load_method(part), "start", None) for part in config if part != IMPORTED)


def direct_plan(run: Run, name: str, config: Mapping[str, Any]) -> Planned:
    """The plan of a method at its configured sparsity, from the run's statistics; `config` as in `once`. Parts that `+`
    joins are planned in order; a second one that trains weights too goes on from the first one's.
    """
    plans = []
    for part, values in with_densities(run, run.stats, config).items():
        planned = _part(run, name, part, values)
        plans.append(planned.plan)
        run = planned.run
    return Planned(merge(plans), run)


def _part(run: Run, name: str, part: str, config: Any) -> Planned:
    if part == IMPORTED:
        return Planned(measured(imported_plan(run.source, config), run.stats), run)
    plan = beside_swaps(run.source, load_method(part).plan(run.stats, run.source.arch, config))
    if part == EXACT:
        return Planned(_present(run, plan), run)
    start, density = _start(part, config), 1.0 - config.sparsity
    # something is skipped from the start: one training serves thresholds and residual
    if start is not None and start < 1 and getattr(config, "residual", "none") == "trained":
        return _trained(run, name, part, config, _with_residuals(run, plan), start, density)
    planned = Planned(plan, run) if start is None else _trained(run, name, part, config, plan, start, density)
    return _completed(planned, name, part, config, density)


def _present(run: Run, plan: Plan) -> Plan:
    """The plan of the method exact with the activations that the sites have. Raises InputError for one
    without zeros.
    """
    swaps = run.source.swaps
    present = {site: swaps[site] for site in plan if site in swaps and not plan[site].edits}
    whole = on_swaps(plan, present, run.activation)
    for entry in whole.values():
        check_exact(entry.activation(run.activation))
    return whole


def _completed(planned: Planned, name: str, part: str, config: Any, density: float) -> Planned:
    """The plan with residuals where they are asked for, in closed form, or from there trained together with what
    selects.
    """
    residual = getattr(config, "residual", "none")
    if residual == "none":
        return planned
    run = planned.run
    plan = _with_residuals(run, planned.plan)
    if residual == "ridge":
        return Planned(plan, run)
    return _trained(run, f"{name}-residual", part, config, plan, density, density)


def _with_residuals(run: Run, plan: Plan) -> Plan:
    """The plan with residuals in closed form."""
    arch, units = run.source.arch, run.source.arch.size(run.source.config, "units")
    return add_residuals(
        run.placed,
        arch,
        run.activation,
        plan,
        run.texts.calibration,
        residual_rank(units, arch.matrices),
    )


def _start(part: str, config: Any) -> float | None:
    module = load_method(part)
    return module.start(config) if hasattr(module, "start") else None


def _trained(run: Run, name: str, part: str, config: Any, plan: Plan, start: float, density: float) -> Planned:
    """The plan trained down to a density, and the run of the model with the weights that were trained with it."""
    folder = run.work / "trained" / f"{name}-{density:.3f}"
    header = _plan_header(run, part, config.model_dump(mode="json"), training=run.texts.training.sha256)
    models = Models(run.placed, run.teacher, run.source.arch, run.activation)
    with stage(f"train {_shown(name)}", apart=True):
        (trained,) = train_plan(
            models,
            plan,
            start,
            [density],
            config.tune,
            TrainingRun(run.texts.training, config.seed, folder, header),
        )
    return Planned(trained.plan, _updated(run, trained, folder))


def _updated(run: Run, trained: TrainedPlan, folder: Path) -> Run:
    """The run of the model with the weights that a training below `folder` ended with."""
    if trained.weights is None:
        return run
    parent = read_header(trained.weights.parent)
    assert parent is not None
    updated = _with_weights(run, trained.weights, parent, folder / "model")
    return replace(cast("Run", updated), weights=trained.weights)


def _searched(run: Run, name: str, config: Mapping[str, Any]) -> Planned | None:
    """The cheapest plan of a method that meets the budget on the search windows, None when there is none."""
    part, values = next(iter(config.items()))
    if part == EXACT:
        planned = direct_plan(run, name, config)
        return planned if run.judge.loss(planned.plan).share(run.recipe.budget) <= 1 else None
    if len(config) == 1 and (part == IMPORTED or hasattr(load_method(part), "start")):
        if part != IMPORTED and _start(part, values) is not None:
            return _searched_training(run, name, part, values)
        planned = _part(run, name, part, values)
        plan, run = planned
        cheapest = sparsest(lambda shift: shifted(plan, shift), run.judge, run.recipe.budget, -_REACH, _REACH)
    else:
        levels = Levels(run, run.stats, config)
        cheapest = sparsest(levels.plan, run.judge, run.recipe.budget, *LEAST_AND_MOST)
        if cheapest is not None and levels.evolve(cheapest[0]):
            cheapest = sparsest(levels.plan, run.judge, run.recipe.budget, *LEAST_AND_MOST) or cheapest
    return None if cheapest is None else Planned(settled(cheapest[1], cheapest[2].density), run)


def _searched_training(run: Run, name: str, part: str, config: Any) -> Planned | None:
    """A trained method goes down LEVELS until the budget breaks; the last two levels are shifted to the budget, and the
    cheaper one is taken.
    """
    config = config.model_copy(update={"sparsity": 1 - _ABOVE})
    (config,) = with_densities(run, run.stats, {part: config}).values()
    plan, start = load_method(part).plan(run.stats, run.source.arch, config), _start(part, config)
    assert start is not None
    trained: list[tuple[Planned, float]] = []
    for density in LEVELS:
        if density >= start:
            continue
        plan, run = planned = _trained(run, f"{name}-budget", part, config, plan, start, density)
        start = density
        trained.append((planned, density))
        if run.judge.loss(plan, every=4).share(run.recipe.budget) > 1:
            break
    best: tuple[float, Planned] | None = None
    for planned, density in trained[-2:]:
        whole = _completed(planned, f"{name}-budget", part, config, density)
        cheapest = sparsest(
            lambda shift, plan=whole.plan: shifted(plan, shift), whole.run.judge, run.recipe.budget, -_REACH, _REACH
        )
        if cheapest is not None:
            ready = Planned(settled(cheapest[1], cheapest[2].density), whole.run)
            cost = block_cost(ready.plan, run.source.arch, run.source.config)
            best = min(best or (cost, ready), (cost, ready), key=lambda pair: pair[0])
    return None if best is None else best[1]


def keep_plan(conversion: Conversion, plan: Plan, header: Header, name: str = TUNED) -> Made:
    """A plan that a training stage ended with as the stage that further stages are made from; `header` is the
    training's.
    """
    folder = conversion.work / "plan" / name
    plan_header = Header(
        format="plan", version=VERSION, parents={"tuned": header.fingerprint}, config={"method": name}, seed=header.seed
    )
    if not is_finished(folder, plan_header):
        with atomic_folder(folder) as partial:
            save_plan(partial, plan, plan_header)
    return Made(plan, conversion.source)


def checkpoint(conversion: Conversion, plan: Plan, name: str) -> Path:
    """The checkpoint folder of a method's plan for the conversion's model."""
    folder = conversion.work / "checkpoint" / name
    plan_header = read_header(conversion.work / "plan" / name)
    assert plan_header is not None
    header = Header(format="checkpoint", parents={"plan": plan_header.fingerprint})
    if not is_finished(folder, header):
        with atomic_folder(folder) as partial:
            write_checkpoint(conversion.source, plan, partial)
            write_header(partial, header)
    return folder

"""What a conversion may take: the methods and steps that fit into a time, decided once and kept below OUT.work."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import read_json
from ..arch import Arch
from ..checkpoint.fields import make_part
from ..checkpoint.stage import Header, atomic_folder, is_finished, write_header, write_json
from .configs import AUTO, Configs
from .probe import measure
from .recipe import Recipe, parse_duration
from .timing import Timing, sizes, statistics, timing, tunes, whole

DEFAULT = 1800.0
"""Seconds that `auto` stays below without being told."""
LEAST = 0.5
"""Share of the configured steps below which a training is not worth its time: the defaults are short already, and
methods without training lose less.
"""
DECISION, _FILE = "decision", "decision.json"


@dataclass(frozen=True)
class Decision:
    """What fits, and what a person is to know before it begins.

    Attributes:
        steps: By trained method (0: left out; absent: as configured).
        seconds: Expected by stage; of `auto` where the most is made.
        notes: One line each.
        cut: By trained method, the line on its training where that is cut or left out.
        later: Of `auto`, the expected seconds by stage, by the candidate that is found the best.
    """

    steps: Mapping[str, int]
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()
    cut: Mapping[str, str] = field(default_factory=dict)
    later: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def shown(self) -> dict[str, Any]:
        """The fields of an estimate that tell it."""
        return {"seconds": dict(self.seconds), "notes": [*self.cut.values(), *self.notes]}

    def said(self, trained: str | None) -> list[str]:
        """The lines on what was made: of `auto` without those on the trainings of others than `trained`, the trained
        form of its best candidate.
        """
        cut = [line for name, line in self.cut.items() if not self.later or name == trained]
        return [*cut, *self.notes]


class _StoredDecision(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: dict[str, int]
    seconds: dict[str, float]
    notes: tuple[str, ...]
    cut: dict[str, str] = {}
    later: dict[str, dict[str, float]] = {}


def within(recipe: Recipe, time_budget: str | None, named: bool) -> Recipe:
    """`recipe` with the time that the flag --time-budget gives; `named` says that the recipe came from a file.

    Raises InputError for what is no time, and for the flag together with such a recipe.
    """
    if time_budget is None:
        return recipe
    try:
        parse_duration(time_budget)
    except ValueError as error:
        raise InputError(f"--time-budget {error}") from None
    if named:
        raise InputError(
            "--recipe must stand without the flags that it covers, got --time-budget as well. Put time_budget into the "
            "recipe."
        )
    return recipe.model_copy(update={"time_budget": time_budget})


def decide(
    arch: Arch,
    config: Any,
    shapes: Mapping[str, tuple[int, ...]],
    source_bytes: int,
    recipe: Recipe,
    configs: Configs,
    device: str = "cpu",
) -> Decision:
    """Probe this machine and choose. Raises InputError as `choose` does."""
    begun = time.perf_counter()
    rates = measure(arch, config, statistics(configs), tunes(configs), recipe.calibration.length, device)
    spent = time.perf_counter() - begun
    timed = timing(sizes(arch, config, shapes, source_bytes, recipe), rates, recipe, configs, arch)
    return choose(replace(timed, stages={**timed.stages, "open": timed.stages["open"] + spent}), recipe)


def choose(timed: Timing, recipe: Recipe) -> Decision:
    """The steps that fit. What is made without training is made always; a training has what is left, at most all of its
    steps and at least LEAST of them, else it is left out. `auto` trains one form of several at most, so each is judged
    as if it alone were trained. Methods whose steps the recipe gives stay, and so does a method that is asked for by
    name without a time budget; `auto` has DEFAULT.

    Raises InputError when the one method that a time budget is given for does not fit.
    """
    stage = recipe.stages[-1]
    auto, time_budget = stage.method == AUTO, recipe.time_budget
    limit = parse_duration(time_budget) if time_budget else DEFAULT if auto else None
    steps: dict[str, int] = {}
    cut: dict[str, str] = {}
    notes: list[str] = []
    if limit is not None:
        for name in (name for name in timed.trainings if name not in stage.steps):
            count = _fitting(timed, name, limit, auto)
            if count is not None:
                steps[name], cut[name] = count, _note(name, count, timed, limit)
    seconds = timed.seconds(steps)
    total = sum(seconds.values())
    if limit is None and total > DEFAULT:
        notes.append(
            f"this takes about {whole([total])} on this machine"
            + ("; --time-budget 30m cuts the training" if timed.trainings else "")
        )
    if limit is not None and total > 1.01 * limit:
        notes.append(
            f"this takes about {whole([total])} on this machine, more than the {whole([limit])} of its time budget: "
            "only trainings are cut"
        )
    return Decision(steps, seconds, tuple(notes), cut, {best: timed.seconds(steps, best) for best in timed.later})


def _fitting(timed: Timing, name: str, limit: float, auto: bool) -> int | None:
    """Steps of a training that is cut (0: left out), None where all fit."""
    training = timed.trainings[name]
    rest = timed.longest(name, {name: 1}) - training.step
    whole_training = training.steps * training.step
    share = (limit - rest) / whole_training if whole_training else 1.0
    if share >= 1:
        return None
    if share >= LEAST:
        return max(1, int(training.steps * share))
    if not auto:
        wanted = rest + LEAST * whole_training
        raise InputError(
            f"--time-budget must be at least {_flag(wanted)} for {name} on this machine, got {_flag(limit)}. "
            "Give it, or take a method without training."
        )
    return 0


def _note(name: str, steps: int, timed: Timing, limit: float) -> str:
    """What is said of a training that is cut, or left out where no steps are left."""
    training = timed.trainings[name]
    alone, everything = whole([training.seconds(training.steps)]), _flag(timed.longest(name, {}))
    if steps:
        return (
            f"{name} is trained for {steps} of {training.steps} steps, to stay within {whole([limit])}; all take "
            f"{alone}: give --time-budget {everything}"
        )
    return f"left out: {name} would take {alone}; give --time-budget {everything} or name it with --method {name}"


def _flag(seconds: float) -> str:
    """A time as --time-budget takes it, rounded up."""
    if seconds <= 100:
        return f"{max(1, -int(-seconds // 1))}s"
    minutes = -int(-seconds // 60)
    return (
        f"{minutes}m" if minutes < 100 else f"{minutes // 60}h{minutes % 60}m" if minutes % 60 else f"{minutes // 60}h"
    )


def decided(recipe: Recipe, decision: Decision) -> Recipe:
    """The recipe with the decided steps in its last stage: what is stored, and what needs no decision again."""
    if not decision.steps:
        return recipe
    *before, last = recipe.stages
    return recipe.model_copy(
        update={"stages": (*before, last.model_copy(update={"steps": dict(last.steps) | dict(decision.steps)}))}
    )


def header(fingerprint: str, recipe: Recipe) -> Header:
    """Of the decision for a model and a recipe as asked."""
    return Header(
        format="decision",
        parents={"model": fingerprint},
        config={"recipe": recipe.model_dump(mode="json")},
        seed=recipe.seed,
    )


def stored(work: Path, wanted: Callable[[], Header]) -> Decision | None:
    """The decision that an earlier run made for the same header, None without one."""
    if not (work / DECISION).is_dir() or not is_finished(work / DECISION, wanted()):
        return None
    decision = make_part(_StoredDecision, read_json(work / DECISION / _FILE, "The decision on time"), _FILE)
    return Decision(**dict(decision))


def keep(work: Path, wanted: Header, decision: Decision) -> None:
    """Store a decision for later runs, where it is not stored yet."""
    if not is_finished(work / DECISION, wanted):
        with atomic_folder(work / DECISION) as partial:
            write_json(partial / _FILE, asdict(decision))
            write_header(partial, wanted)

"""What a conversion may take: the methods and steps that fit into a time, decided once and kept below OUT.work."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import read_json
from ..arch import Arch
from ..checkpoint.fields import make_part
from ..checkpoint.stage import Header, atomic_folder, is_finished, write_header, write_json
from .configs import Configs
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
    """Steps by trained method (0: left out), expected seconds by stage, and what a person is to know before it begins,
    one line each.
    """

    steps: Mapping[str, int]
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def shown(self) -> dict[str, Any]:
        """The fields of an estimate that tell it."""
        return {"seconds": dict(self.seconds), "notes": list(self.notes)}


class _StoredDecision(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: dict[str, int]
    seconds: dict[str, float]
    notes: tuple[str, ...]


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
    timed = timing(sizes(arch, config, shapes, source_bytes, recipe), rates, recipe, configs)
    return choose(replace(timed, stages={**timed.stages, "open": timed.stages["open"] + spent}), recipe)


def choose(timed: Timing, recipe: Recipe) -> Decision:
    """The methods and steps that fit: methods without training always, trainings in what is left, all with the same
    share of their steps, at least LEAST of them; where that is too much, the longest one is left out. Methods whose
    steps the recipe gives stay, and so does a method that is asked for by name without a time budget; `auto` has
    DEFAULT.

    Raises InputError when the one method that a time budget is given for does not fit.
    """
    stage = recipe.stages[-1]
    auto, time_budget = stage.method == "auto", recipe.time_budget
    limit = parse_duration(time_budget) if time_budget else DEFAULT if auto else None
    free = {name: training for name, training in timed.trainings.items() if name not in stage.steps}
    steps: dict[str, int] = {}
    notes: list[str] = []
    if limit is not None and free:
        steps = _fitting(timed, free, limit, auto)
        for name, count in steps.items():
            notes.append(_note(name, count, timed, limit))
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
    return Decision(steps, seconds, tuple(notes))


def _fitting(timed: Timing, free: Mapping[str, Any], limit: float, auto: bool) -> dict[str, int]:
    """Steps of every training that is cut (0: left out); trainings that keep all of their steps are not named."""
    out: dict[str, int] = {}
    while True:
        kept = [name for name in free if name not in out]
        rest = sum(timed.seconds(dict.fromkeys(free, 0)).values())
        for name in kept:
            rest += sum(timed.each[name].values()) + free[name].rest
        steps = sum(free[name].steps * free[name].step for name in kept)
        share = (limit - rest) / steps if steps else 1.0
        if not kept or share >= LEAST:
            share = min(1.0, share)
            return out | ({name: max(1, int(free[name].steps * share)) for name in kept} if share < 1 else {})
        longest = max(kept, key=lambda name: free[name].seconds(_least(free[name].steps)))
        if not auto:
            wanted = rest + LEAST * steps
            raise InputError(
                f"--time-budget must be at least {_flag(wanted)} for {longest} on this machine, got {_flag(limit)}. "
                "Give it, or take a method without training."
            )
        out[longest] = 0


def _least(steps: int) -> int:
    return max(1, int(steps * LEAST))


def _note(name: str, steps: int, timed: Timing, limit: float) -> str:
    training = timed.trainings[name]
    alone = training.seconds(training.steps)
    if steps:
        return (
            f"{name} is trained for {steps} of {training.steps} steps, to stay within {whole([limit])}; all take "
            f"{whole([alone])}"
        )
    everything = sum(timed.seconds({}).values())
    return (
        f"left out: {name} would take {whole([alone])}; give --time-budget {_flag(everything)} or name it with "
        f"--method {name}"
    )


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
    return Decision(decision.steps, decision.seconds, decision.notes)


def keep(work: Path, wanted: Header, decision: Decision) -> None:
    """Store a decision for later runs, where it is not stored yet."""
    if not is_finished(work / DECISION, wanted):
        with atomic_folder(work / DECISION) as partial:
            write_json(
                partial / _FILE,
                {"steps": dict(decision.steps), "seconds": dict(decision.seconds), "notes": list(decision.notes)},
            )
            write_header(partial, wanted)

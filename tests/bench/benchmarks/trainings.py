"""Trainings of a benchmark: one that goes through all densities, and the seconds that a step takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.model_study import ModelStudy
from sparsegate.converter.checkpoint.plan import Plan
from sparsegate.converter.checkpoint.stage import Header
from sparsegate.converter.methods.tune import Tune
from sparsegate.converter.text.windows import Batches
from sparsegate.converter.training.inputs import TrainingRun
from sparsegate.converter.training.plans import TrainedPlan, train_plan
from sparsegate.converter.training.selection import SelectionObjective
from sparsegate.converter.training.settings import Settings
from sparsegate.runtime_onnx.errors import InputError

_TIMED = 3  # steps


def check_falling(densities: Sequence[float], what: str) -> None:
    """Raises InputError for densities that one training cannot go through."""
    if list(densities) != sorted(densities, reverse=True):
        raise InputError(f"{what} must fall for a training to go through them, got {list(densities)}. Sort them.")


def train_down(
    study: ModelStudy,
    subject: dict[str, Any],
    plan: Plan,
    start: float,
    densities: Sequence[float],
    tune: Tune,
    folder: Path,
    density_batches: Batches | None = None,
) -> list[TrainedPlan]:
    """One training that goes through falling densities and is kept below `folder`; `subject` says there of what. Where
    several texts are trained on, densities hold on that of `density_batches`.
    """
    header = Header(
        format="tune",
        parents={"model": study.source.fingerprint},
        config=subject,
        seed=study.sizes.seed,
        calibration=study.training.sha256,
    )
    run = TrainingRun(study.training, study.sizes.seed, folder, header, density_batches)
    return train_plan(study.models(), plan, start, densities, tune, run)


def step_times(
    study: ModelStudy,
    plan: Plan,
    start: float,
    density: float,
    tune: Tune,
    draw: Callable[[int], Batches],
    clock: Callable[[], float],
) -> list[float]:
    """Seconds by a clock of a few steps on windows that are drawn by number, after one that warms up."""
    settings = Settings(_TIMED + 1, tune.windows, tune.rate)
    objective = SelectionObjective(study.models(), plan, tune, settings, start, [density], study.training.tokens[:4])
    taken = []
    for step in range(_TIMED + 1):
        batches = draw(step)
        begun = clock()
        objective.loss(batches.tokens, batches.mask, step).backward()
        taken.append(clock() - begun)
    return taken[1:]

"""A plan's predictors and thresholds trained end to end, with what of the weights is trained beside them
(`selection`), in one run that goes through densities.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ...runtime_onnx.errors import InputError
from ..checkpoint.plan import Exact, Plan, load_plan, save_plan
from ..checkpoint.stage import atomic_folder, is_finished, write_json, write_tensors
from ..methods.tune import Tune
from ..modeling.processes import keep_freed_memory
from ..progress import resumed
from ..text.windows import Batches
from .inputs import Models, TrainingRun
from .loop import train
from .selection import SelectionObjective
from .settings import Settings

_ASIDE, _ASIDE_MOST = 16, 32  # every 16th window, about 32 at most, is kept for setting densities


WEIGHTS = "weights.safetensors"
"""The updated weights of a level, by their names in the model."""


class TrainedPlan(NamedTuple):
    """What a training ended with: a plan, and the file of the weights that go with it; None where none changed."""

    plan: Plan
    weights: Path | None


def train_plan(
    models: Models, plan: Plan, start: float, densities: Sequence[float], tune: Tune, run: TrainingRun
) -> list[TrainedPlan]:
    """Train the sites of `plan` and return one plan per density in `densities`, which one run visits in turn; sites
    that keep exact zeros stay as they are.

    `start` is the density that the run begins with (1 for a fresh predictor). Every plan's density holds on windows
    that were not trained on: of all text, or of the one that the run names. State, levels and curve are stored below
    the run's folder, so an interrupted one goes on to the same result. Raises InputError for a plan without a site to
    train and for too few windows.
    """
    gated = {site: entry for site, entry in plan.items() if not isinstance(entry.gate, Exact)}
    if not gated:
        raise InputError(
            f"A plan to train must have thresholds or predictors, got {', '.join(s.key for s in plan) or 'no site'}. "
            "Take another method."
        )
    decides = {"tune": tune.model_dump(mode="json"), "densities": list(densities), "plan": _hash(plan)}
    decides |= {} if run.density_batches is None else {"density_text": run.density_batches.sha256}
    header = run.header.model_copy(update={"config": run.header.config | decides})
    levels, curve_file = [run.folder / f"level_{k}" for k in range(len(densities))], run.folder / "curve.json"
    if all(is_finished(level, header) for level in levels) and curve_file.is_file():
        resumed()
    else:
        windows = _split(run.batches, run.density_batches)
        curve_file.unlink(missing_ok=True)
        keep_freed_memory()
        settings = Settings(tune.steps * len(densities), tune.windows, tune.rate, levels=len(densities), seed=run.seed)
        objective = SelectionObjective(models, gated, tune, settings, start, densities, windows.aside[:4])

        def at_level(level: int) -> None:
            with atomic_folder(levels[level]) as partial:
                save_plan(partial, objective.plan(windows.aside, densities[level]), header)
                if merged := objective.student.merged():
                    write_tensors(partial / WEIGHTS, merged)

        curve = train(objective, windows.trained, settings, run.folder / "state", header, at_level)
        write_json(curve_file, {"rows": curve})
    untrained = {site: entry for site, entry in plan.items() if site not in gated}
    files = [level / WEIGHTS for level in levels]
    return [
        TrainedPlan(untrained | load_plan(level), file if file.is_file() else None)
        for level, file in zip(levels, files, strict=True)
    ]


class _Windows(NamedTuple):
    """Windows to train on, and full ones [N, S] to set densities on."""

    trained: Batches
    aside: Tensor


def _split(batches: Batches, text: Batches | None = None) -> _Windows:
    """Keep some of the full windows, or of those of `text`, aside, and every window like one of them. Raises InputError
    where either part would be empty.
    """
    text = batches if text is None else text
    full = text.tokens[text.mask.all(1)]
    aside = full[:: max(_ASIDE, len(full) // _ASIDE_MOST)]
    trained = [k for k in range(len(batches.tokens)) if not bool((batches.tokens[k] == aside).all(1).any())]
    if not len(aside) or not trained:
        raise InputError(
            "Training end to end must have a full window to set densities on and others to train on, got "
            f"{len(full)} full ones of {len(batches.tokens)}. Give more text."
        )
    return _Windows(Batches(batches.tokens[trained], batches.mask[trained]), aside)


def _hash(plan: Plan) -> str:
    """Sha256 (hex) of a plan's tensors."""
    digest = hashlib.sha256()
    for site, entry in plan.items():
        for role, tensor in entry.tensors().items():
            digest.update(f"{site.key}.{role}".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()

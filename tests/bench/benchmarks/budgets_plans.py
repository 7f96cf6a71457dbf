"""The plan of every row, with the weights that were trained with it, each a stage below the work folder with what it
took.
"""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.budgets_study import ROWS, Study, is_trained
from benchmarks.provenance import commit
from benchmarks.trainings import check_falling, step_times, train_down
from records.budgets_results import Making
from sparsegate.converter.checkpoint.plan import Plan, load_plan, save_plan
from sparsegate.converter.checkpoint.stage import Header, atomic_folder, hash_json, is_finished, read_header, write_json
from sparsegate.converter.checkpoint.tensor_files import load_tensors
from sparsegate.converter.methods import load_method, needs
from sparsegate.converter.pipeline.recipe import Recipe
from sparsegate.converter.pipeline.schedule import Run, direct_plan
from sparsegate.converter.pipeline.texts import Texts
from sparsegate.converter.stats.collect import collect
from sparsegate.converter.text.windows import Batches
from sparsegate.converter.training.loop import STATE
from sparsegate.converter.training.plans import WEIGHTS
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.untrusted import read_json

_MAKING = "making.json"
Made = tuple[Plan, Path | None]
"""A plan, and the file of the weights that were trained with it."""


def header_of(study: Study, name: str, share: float) -> Header:
    """The header of a row's stage."""
    study = study.of(name)
    config: dict[str, Any] = {"row": name, "share": share}
    config |= {"config": study.config(name, study.density(name, share)).model_dump(mode="json")}
    parents = {"model": study.source.fingerprint}
    if is_trained(name):
        sizes = study.sizes
        config |= {"steps": sizes.steps, "minutes": None if sizes.steps else sizes.minutes}
        config |= {"shares": list(study.densities(name))} if study.descend else {}
        parents |= {"training": study.training.sha256}
    return Header(
        format="plan", parents=parents, config=config, seed=study.sizes.seed, calibration=study.calibration.sha256
    )


def place_of(study: Study, name: str, share: float) -> Path:
    """The folder of a row's stage."""
    return study.work / "rows" / f"{name.replace(' ', '_')}-{share:g}"


def is_made(study: Study, name: str, share: float) -> bool:
    """Whether a row's stage is finished as this run would make it."""
    return is_finished(place_of(study, name, share), header_of(study, name, share))


def stored_header(study: Study, name: str, share: float) -> Header | None:
    """The header of a row's finished stage, whatever its training's settings were; None where there is none for this
    model, these texts and this density.
    """
    place, wanted = place_of(study, name, share), header_of(study, name, share)
    stored = read_header(place)
    if stored is None or stored.model_copy(update={"config": wanted.config}) != wanted:
        return None
    sparsities = [header.config.get("config", {}).get("sparsity") for header in (stored, wanted)]
    return stored if sparsities[0] == sparsities[1] and is_finished(place, stored) else None


def load_made(study: Study, name: str, share: float) -> Made:
    """What a finished stage holds."""
    place = place_of(study, name, share)
    weights = place / WEIGHTS
    return load_plan(place), weights if weights.is_file() else None


def making_of(study: Study, name: str, share: float) -> Making:
    """What a finished stage took."""
    return Making.model_validate(read_json(place_of(study, name, share) / _MAKING, "What a row took"))


def with_weights(model: Any, weights: Path) -> Any:
    """The model with the weights of a file in place of its own. Raises InputError for one that it has not."""
    unknown = model.load_state_dict(load_tensors(weights, ["F32"]), strict=False).unexpected_keys
    if unknown:
        raise InputError(f"Weights in {weights} must be the model's, got {', '.join(unknown)}. Make the row again.")
    return model


def make(study: Study, name: str) -> None:
    """Make a row at every share where it is not finished. Raises InputError for a text that is too short."""
    missing = [share for share in study.densities(name) if not is_made(study, name, share)]
    if not missing:
        return
    if is_trained(name) and study.descend:
        _make_down(study, name)
        return
    for share in missing:
        _make_alone(study, name, share)
        print(f"{name} at {share:g} of the bytes: made", flush=True)


def _make_alone(study: Study, name: str, share: float) -> None:
    """A row at one share, as a conversion makes it."""
    study = study.of(name)
    kind, density = ROWS[name], study.density(name, share)
    stats, calibration_seconds = _statistics(study, name)
    config, took = study.config(name, density), {}
    if is_trained(name):
        took = _steps(study, name, stats)
        tune = config.tune.model_copy(update={"steps": took["steps"]})
        config = config.model_copy(update={"tune": tune})
    texts = Texts(study.calibration, study.training, study.calibration, None, study.texts[0].name)
    recipe = Recipe(model=study.source.name, seed=study.sizes.seed)
    folder = _folder(study, name, share)
    run = Run(study.source, texts, recipe, folder, stats=stats)
    with _clocked(folder) as clock:
        planned = direct_plan(run, kind.method, {kind.method: config})
    making = _making(study, name, calibration_seconds, clock[0], took, 1)
    _store(study, name, share, (planned.plan, planned.run.weights), making)


def _make_down(study: Study, name: str) -> None:
    """A trained row at all shares, by one training that goes through them; what it took is shared out alike."""
    study = study.of(name)
    densities = study.densities(name)
    check_falling(list(densities), "--bytes")
    kind, first = ROWS[name], next(iter(densities))
    module, config = load_method(kind.method), study.config(name, densities[first])
    stats, calibration_seconds = _statistics(study, name)
    took = _steps(study, name, stats)
    tune = config.tune.model_copy(update={"steps": took["steps"]})
    folder = _folder(study, name, first)
    with _clocked(folder) as clock:
        plan, start = module.plan(stats, study.source.arch, config), module.start(config)
        trained = train_down(
            study, {"row": name}, plan, start, list(densities.values()), tune, folder, study.calibration
        )
    for number, (share, each) in enumerate(zip(densities, trained, strict=True), 1):
        seconds = clock[0] * number / len(densities)
        making = _making(study, name, calibration_seconds, seconds, took, number)
        _store(study, name, share, each, making.model_copy(update={"descended": True}))


def _folder(study: Study, name: str, share: float) -> Path:
    """Where a row's training is kept until it is done; another one's is never mistaken for it."""
    return study.work / "making" / f"{name.replace(' ', '_')}-{header_of(study, name, share).fingerprint[:12]}"


def _making(
    study: Study, name: str, calibration_seconds: float, seconds: float, took: dict[str, Any], parts: int
) -> Making:
    steps = took.get("steps", 0) * parts
    tune = study.config(name).tune.model_dump(mode="json", exclude={"steps"}) if steps else None
    per_step = tune["windows"] * study.sizes.length if tune else 0
    unit = 1 if sys.platform == "darwin" else 1024
    return Making(
        calibration_seconds=calibration_seconds,
        seconds=seconds,
        steps=steps,
        step_seconds=took.get("seconds"),
        tokens=steps * per_step,
        tune=tune,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        commit=commit(),
    )


def _store(study: Study, name: str, share: float, made: Made, making: Making) -> None:
    plan, weights = made
    with atomic_folder(place_of(study, name, share)) as partial:
        write_json(partial / _MAKING, making.model_dump(mode="json"))
        if weights is not None:
            shutil.copyfile(weights, partial / WEIGHTS)
        save_plan(partial, plan, header_of(study, name, share))


def _statistics(study: Study, name: str) -> tuple[Any, float]:
    """The statistics of a row, with all of another row that needs these and more, and the seconds that they took."""
    study = study.of(name)
    every = {row: set(needs(kind.method, study.config(row))) for row, kind in ROWS.items()}
    names = sorted(max((wanted for wanted in every.values() if wanted >= every[name]), key=len))
    model = "rotated-" if study.is_rotated else ""
    folder = study.work / "stats" / (model + "-".join(names).replace(":", "_"))
    with _clocked(folder, key=study.calibration.sha256 + study.source.fingerprint) as clock:
        stats = collect(study.source, study.calibration, names, folder, study.sizes.seed)
    return stats, clock[0]


def _steps(study: Study, name: str, stats: Any) -> dict[str, Any]:
    """Steps at every share, and the seconds of one, stored so that a run goes on with the same number."""
    study = study.of(name)
    sizes, densities = study.sizes, study.densities(name)
    decides = {
        "config": study.config(name).model_dump(mode="json"),
        "minutes": None if sizes.steps else sizes.minutes,
        "steps": sizes.steps,
        "descends": list(densities) if study.descend else None,
        "parents": [study.training.sha256, study.source.fingerprint],
    }
    path = study.work / "steps" / f"{name.replace(' ', '_')}-{hash_json(decides)[:12]}.json"
    if path.is_file():
        return read_json(path, "The steps of a training")
    seconds = step_seconds(study, name, next(iter(densities.values())), stats)
    trainings = len(densities) if study.descend else 1
    steps = sizes.steps or max(1, int(sizes.minutes * 60 / seconds / trainings))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"steps": steps, "seconds": seconds})
    return read_json(path, "The steps of a training")


def step_seconds(study: Study, name: str, density: float, stats: Any) -> float:
    """Seconds of one training step, on windows whose dense logits are not kept yet: the median of a few, before which
    one warms up.
    """
    config, module = study.config(name, density), load_method(ROWS[name].method)
    windows, taken = study.training, config.tune.windows

    def draw(step: int) -> Batches:
        rows = [k % len(windows.tokens) for k in range(step * taken, (step + 1) * taken)]
        return Batches(windows.tokens[rows], windows.mask[rows])

    plan = module.plan(stats, study.source.arch, config)
    return median(step_times(study, plan, module.start(config), density, config.tune, draw, time.monotonic))


@contextmanager
def _clocked(folder: Path, key: str = "") -> Iterator[list[float]]:
    """The seconds inside, in a list when it ends: those of earlier runs that were stopped there too, of a killed one
    those until its training was last stored. What is done is not counted again.
    """
    path, clock = folder.with_name(f"{folder.name}.seconds.json"), [0.0]
    stored = read_json(path, "Seconds") if path.is_file() else {}
    stored = stored if stored.get("key") == key else {}
    if stored.get("done"):
        yield clock
        clock[0] = stored["seconds"]
        return
    states = [read_json(state, "A training's state") for state in folder.rglob(STATE)]
    before = max(stored.get("seconds", 0.0), sum(float(state.get("seconds", 0.0)) for state in states))
    begun, done = time.monotonic(), False
    try:
        yield clock
        done = True
    finally:
        clock[0] = before + time.monotonic() - begun
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "seconds": clock[0], "done": done})


def known_shares(study: Study, names: Sequence[str]) -> list[tuple[str, float]]:
    """Every row and share that can be made."""
    return [(name, share) for name in names for share in study.densities(name)]

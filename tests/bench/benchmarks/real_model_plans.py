"""What the benchmark of a real model measures: its texts, and the plan of every method at every density, each a stage
of its own below a work folder.

What selects is trained alone, where `convert` trains weights with it. A method whose training begins at the density
itself is trained anew for each, with its configuration's steps. One whose training begins with everything kept goes
through all densities in one descending run, of as many steps as fit into the minutes that it is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.model_study import EVERY, ModelStudy, WindowSizes
from benchmarks.trainings import check_falling, step_times, train_down
from records.real_model_results import Training
from sparsegate.converter.checkpoint.plan import Plan, load_plan, save_plan
from sparsegate.converter.checkpoint.stage import Header, atomic_folder, is_finished, read_header, write_json
from sparsegate.converter.methods import LINEAR_METHODS, load_method, make_config, needs
from sparsegate.converter.methods.tune import Tune
from sparsegate.converter.pipeline.recipe import Recipe
from sparsegate.converter.pipeline.schedule import Run, direct_plan
from sparsegate.converter.pipeline.texts import Texts
from sparsegate.converter.stats.collect import collect
from sparsegate.converter.text.windows import Batches, read_text
from sparsegate.runtime_onnx.untrusted import read_json

METHODS = ("gate", "chess", "cett", "trained_gate", "predictor", "teal", "wina")
TRAINED = ("trained_gate", "predictor")
DENSITIES = (0.7, 0.5, 0.4, 0.3)
_HELDOUT_SHARE = 0.2  # of the calibration text, where no other text is given


@dataclass(frozen=True)
class Sizes(WindowSizes):
    """Windows, those to train on too. `steps` are None for the configuration's, and for as many as fit into `minutes`
    of one core for all densities in a descending run.
    """

    training: int = 320


@dataclass(frozen=True, kw_only=True)
class Study(ModelStudy):
    """The text to calibrate on and the text to measure on; None: the last fifth of the former."""

    text: Path
    heldout_text: Path | None = None
    sizes: Sizes = Sizes()
    densities: tuple[float, ...] = DENSITIES

    @property
    def calibration_file(self) -> Path:
        return self.text

    @property
    def heldout_file(self) -> Path:
        """The file of the text to measure on."""
        return self.heldout_text or self.text

    @cached_property
    def _texts(self) -> tuple[str, str]:
        """To calibrate on, to measure on."""
        whole = read_text(self.text)
        if self.heldout_text is not None:
            return whole, read_text(self.heldout_text)
        cut = int(len(whole) * (1 - _HELDOUT_SHARE))
        return whole[:cut], whole[cut:]

    @property
    def calibration_text(self) -> str:
        return self._texts[0]

    @cached_property
    def training(self) -> Batches:
        return self.windows(self._texts[0], self.sizes.training)

    @cached_property
    def heldout(self) -> Batches:
        """Full windows, in an order drawn by the seed: the first of them are a sample of the whole text."""
        every = self.windows(self._texts[1], EVERY, "The held-out text")
        full = every.mask.all(dim=1).nonzero().flatten()
        picked = full[torch.randperm(len(full), generator=torch.Generator().manual_seed(self.sizes.seed + 1))][
            : self.sizes.heldout
        ]
        return Batches(every.tokens[picked], every.mask[picked])


def plans(study: Study, method: str) -> dict[float, Plan]:
    """The plan of a method at every density, from the stages that are finished and from new ones. Raises InputError for
    a text that is too short.
    """
    headers = {density: header_of(study, method, density) for density in study.densities}
    places = {density: study.work / "plans" / f"{method}-{density}" for density in study.densities}
    missing = [density for density in study.densities if not is_finished(places[density], headers[density])]
    if missing:
        made = _makers(method)(study, method, missing)
        for density in missing:
            with atomic_folder(places[density]) as partial:
                save_plan(partial, made[density], headers[density])
    return {density: load_plan(place) for density, place in places.items()}


def planned(study: Study, method: str) -> dict[float, Plan]:
    """The plans of a method that are there, those of a training that goes on among them; nothing is made but their
    stages.
    """
    found = {}
    for level, density in enumerate(study.densities):
        place, header = study.work / "plans" / f"{method}-{density}", header_of(study, method, density)
        if _descends(method) and not is_finished(place, header):
            _take_level(study, method, level, place, header)
        if is_finished(place, header):
            found[density] = load_plan(place)
    return found


def _take_level(study: Study, method: str, level: int, place: Path, header: Header) -> None:
    """Make a plan's stage of a level that a training has finished, where it has."""
    folder = study.work / "trained" / method
    stored, path = read_header(folder / f"level_{level}"), folder / "steps.json"
    if stored is None or not path.is_file():
        return
    steps = read_json(path, "The steps of a training")
    same = stored.parents == header.parents and stored.calibration == header.calibration and stored.seed == header.seed
    own = stored.config.get("densities") == list(study.densities) and stored.config["tune"]["steps"] == steps["steps"]
    if same and own and steps["key"] == _key(study, method):
        with atomic_folder(place) as partial:
            save_plan(partial, load_plan(folder / f"level_{level}"), header)


def training_of(study: Study, method: str, density: float) -> Training:
    """How the training went down to a density."""
    stored = read_json(study.work / "trained" / method / "steps.json", "The steps of a training")
    steps = stored["steps"] * (study.densities.index(density) + 1 if _descends(method) else 1)
    tokens = _config(method, density).tune.windows * study.sizes.length
    return Training(steps=steps, step_seconds=stored["seconds"], minutes=steps * stored["seconds"] / 60, tokens=tokens)


def header_of(study: Study, method: str, density: float) -> Header:
    """The header of a plan."""
    sizes = study.sizes
    config: dict[str, Any] = {"method": method, "density": density}
    if method in TRAINED:
        config |= {"config": _config(method, density).model_dump(mode="json"), "steps": sizes.steps}
    if _descends(method):
        config |= {"densities": list(study.densities), "minutes": None if sizes.steps else sizes.minutes}
    text = study.training if method in TRAINED else study.calibration
    return Header(
        format="plan",
        parents={"model": study.source.fingerprint},
        config=config,
        seed=sizes.seed,
        calibration=text.sha256,
    )


def _calibrated(study: Study, method: str, densities: Sequence[float]) -> dict[float, Plan]:
    """Plans from statistics, which the methods without training share that skip the same kind of thing."""
    kin = (
        LINEAR_METHODS
        if method in LINEAR_METHODS
        else tuple(name for name in METHODS if name not in TRAINED + LINEAR_METHODS)
    )
    names = sorted({stat for name in kin for stat in needs(name, _config(name, 0.5))})
    folder = study.work / "stats" / ("channels" if method in LINEAR_METHODS else "neurons")
    stats = collect(study.source, study.calibration, names, folder, study.sizes.seed)
    return {
        density: load_method(method).plan(stats, study.source.arch, _config(method, density)) for density in densities
    }


def _config(method: str, density: float) -> Any:
    """The configuration of a method; what selects is trained alone."""
    config = make_config(method, {"sparsity": round(1 - density, 9)})
    if method not in TRAINED:
        return config
    alone = {"updates": "none", "offsets": False, "likeliest": 0, "local": 0.2}
    return config.model_copy(update={"tune": config.tune.model_copy(update=alone)})


def _descends(method: str) -> bool:
    """Whether a method's training begins with everything kept, whatever density it is to reach."""
    return method in TRAINED and load_method(method).start(_config(method, 0.5)) == 1


def _makers(method: str) -> Callable[[Study, str, Sequence[float]], dict[float, Plan]]:
    if method not in TRAINED:
        return _calibrated
    return _trained_down if _descends(method) else _trained_each


def _trained_each(study: Study, method: str, densities: Sequence[float]) -> dict[float, Plan]:
    """Plans as a conversion makes them, one training for each density."""
    folder, first = study.work / "trained" / method, _config(method, densities[0])
    stats = collect(
        study.source, study.calibration, needs(method, first), study.work / "stats" / method, study.sizes.seed
    )
    texts = Texts(study.calibration, study.training, study.heldout, None, study.text.name)
    found = {}
    for density in densities:
        config = _config(method, density)
        plan = load_method(method).plan(stats, study.source.arch, config)
        steps = _steps(study, method, plan, density, config.tune)
        config = config.model_copy(update={"tune": config.tune.model_copy(update={"steps": steps})})
        run = Run(
            study.source,
            texts,
            Recipe(model=study.source.name, seed=study.sizes.seed),
            folder / str(density),
            stats=stats,
        )
        found[density] = direct_plan(run, method, {method: config}).plan
    return found


def _start(study: Study, method: str) -> tuple[Plan, float]:
    """The plan that a training begins with, a stage too, and its density."""
    module, config = load_method(method), _config(method, study.densities[0])
    header = Header(
        format="plan",
        parents={"model": study.source.fingerprint},
        config={"start": method, "density": study.densities[0]},
        seed=study.sizes.seed,
        calibration=study.calibration.sha256,
    )
    place = study.work / "trained" / method / "start"
    if not is_finished(place, header):
        stats = collect(
            study.source, study.calibration, needs(method, config), study.work / "stats" / method, study.sizes.seed
        )
        with atomic_folder(place) as partial:
            save_plan(partial, module.plan(stats, study.source.arch, config), header)
    return load_plan(place), module.start(config)


def _trained_down(study: Study, method: str, densities: Sequence[float]) -> dict[float, Plan]:
    """Plans of one training that goes through all densities of the study; `densities` are those that are missing."""
    check_falling(study.densities, "--densities")
    plan, start = _start(study, method)
    folder = study.work / "trained" / method
    base: Tune = _config(method, study.densities[0]).tune
    steps = _steps(study, method, plan, start, base)
    tune = base.model_copy(update={"steps": steps})
    trained = train_down(study, {"method": method}, plan, start, study.densities, tune, folder)
    return dict(zip(study.densities, (each.plan for each in trained), strict=True))


def _key(study: Study, method: str) -> dict[str, Any]:
    """What decides the steps of a training."""
    sizes = study.sizes
    return {
        "model": study.source.fingerprint,
        "minutes": None if sizes.steps else sizes.minutes,
        "steps": sizes.steps,
        "densities": list(study.densities),
        "tune": _config(method, study.densities[0]).tune.model_dump(mode="json"),
    }


def _steps(study: Study, method: str, plan: Plan, start: float, tune: Tune) -> int:
    """Steps for every density, stored with the CPU seconds of one so that a run goes on with the same number."""
    path = study.work / "trained" / method / "steps.json"
    key = _key(study, method)
    if path.is_file():
        stored = read_json(path, "The steps of a training")
        if stored["key"] == key:
            return stored["steps"]
    seconds = step_seconds(study, plan, start, tune)
    fitting = max(4, int(study.sizes.minutes * 60 / seconds / len(study.densities)))
    steps = study.sizes.steps or (fitting if _descends(method) else tune.steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"key": key, "steps": steps, "seconds": seconds})
    return steps


def step_seconds(study: Study, plan: Plan, start: float, tune: Tune) -> float:
    """CPU seconds of one training step: the least of a few on the same windows."""
    first = Batches(study.training.tokens[: tune.windows], study.training.mask[: tune.windows])
    return min(step_times(study, plan, start, study.densities[0], tune, lambda _: first, time.process_time))

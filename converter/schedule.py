"""The loop over stages: statistics once, then a plan for every method, each a folder below the work folder that is not made again when its header fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from .artifact import Header, atomic_folder, is_finished, read_header, write_header
from .data import Batches
from .methods import load_method, make_config, needs
from .plans import Plan, load_plan, save_plan
from .source import Source
from .stats.collect import collect, drop_samples
from .writer import write_checkpoint


def once(source: Source, batches: Batches, configs: Mapping[str, dict[str, Any]], work: Path, seed: int, device: str) -> dict[str, Plan]:
    """One round: the plan of every method in `configs`, from one set of statistics. Stored activations go when every plan is made."""
    made = {name: make_config(name, values) for name, values in configs.items()}
    headers = {name: _plan_header(source, batches, name, config, seed) for name, config in made.items()}
    folders = {name: work / "plan" / name for name in made}
    todo = [name for name in made if not is_finished(folders[name], headers[name])]
    if todo:
        names = sorted({stat for name in todo for stat in needs(name, made[name])})
        stats = collect(source, batches, names, work / "stats", seed, device)
        for name in todo:
            with atomic_folder(folders[name]) as partial:
                save_plan(partial, load_method(name).plan(stats, source.arch, made[name]), headers[name])
    drop_samples(work / "stats")
    return {name: load_plan(folder) for name, folder in folders.items()}


def _plan_header(source: Source, batches: Batches, name: str, config: BaseModel, seed: int) -> Header:
    return Header(
        format="plan", parents={"model": source.fingerprint}, config={"method": name, **config.model_dump(mode="json")}, seed=seed, calibration=batches.sha256
    )


def checkpoint(source: Source, plan: Plan, name: str, work: Path, parent: Path) -> Path:
    """The checkpoint folder of a plan; `parent` is the plan's folder."""
    folder = work / "checkpoint" / name
    plan_header = read_header(parent)
    assert plan_header is not None
    header = Header(format="checkpoint", parents={"plan": plan_header.fingerprint})
    if not is_finished(folder, header):
        with atomic_folder(folder) as partial:
            write_checkpoint(source, plan, partial)
            write_header(partial, header)
    return folder

"""A student's weights, and predictors beside them where that is asked for, trained end to end against the teacher."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..arch.site import Site
from ..checkpoint.cost import network_size
from ..checkpoint.plan import SitePlan
from ..checkpoint.stage import Header
from ..evaluation.recovery_record import CurvePoint, HeldoutPoint
from ..modeling.distributed import world
from ..modeling.predictor import fresh_predictor, rank_for
from ..text.windows import Batches
from .adapters import block_linears
from .heldout import WATCHED, StoredCurve, Watch, watched_every
from .inputs import Models, RecoveryTask
from .loop import train
from .recompute import checkpointed
from .recovery import RecoveryObjective
from .sensitivity import input_rms
from .settings import settings_of
from .unit import Unit, make_unit

PROBE = 16
"""Windows that signs and input scales are taken from."""


@dataclass(frozen=True)
class Training:
    """What a training was: tokens seen, wall and processor seconds, curves, and the predictors trained with the
    weights.
    """

    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    curve: list[CurvePoint] = field(default_factory=list)
    heldout: list[HeldoutPoint] = field(default_factory=list)
    units: dict[Site, Unit] = field(default_factory=dict)


def train_end_to_end(
    task: RecoveryTask, models: Models, batches: Batches, ready: Callable[[], dict[str, Tensor]], header: Header
) -> Training:
    """Train the leaves that `ready` gives; the student's weights are the recovered ones afterwards."""
    recovery, student, settings = task.recovery, models.student, settings_of(task.recovery, task.seed)
    units = _units(task, models, batches.tokens[:PROBE])
    leaves = ready()
    state, curve = task.work / "state", StoredCurve(task.work / "heldout", header)
    if world().rank == 0 and not curve.belongs(state, watched_every(recovery)):
        for folder in (curve.folder, state):
            shutil.rmtree(folder, ignore_errors=True)
    tokens = min(recovery.accumulate * recovery.windows, len(batches.tokens)) * batches.tokens.shape[1]
    few = Batches(task.heldout.batches.tokens[:WATCHED], task.heldout.batches.mask[:WATCHED])
    matrices = {f"{name}.weight" for name in block_linears(student, models.arch)}
    objective = RecoveryObjective(
        models if recovery.losses.distill or recovery.losses.hidden else replace(models, teacher=None),
        recovery,
        settings,
        leaves,
        units,
        hidden=[name for name in leaves if name in matrices or recovery.lora is not None],
        watch=Watch(models, few, units, recovery, curve, tokens),
    )
    with checkpointed(student) if recovery.checkpointing else nullcontext():
        rows = train(objective, batches, settings, state, header, lambda _: None)
    return Training(
        tokens=recovery.steps * tokens,
        seconds=float(rows[-1]["seconds"]) if rows else 0.0,
        cpu_seconds=objective.cpu_seconds,
        curve=[_point(row) for row in rows],
        heldout=[HeldoutPoint.model_validate(row) for row in curve.read()],
        units=units,
    )


def _units(task: RecoveryTask, models: Models, probe: Tensor) -> dict[Site, Unit]:
    """Fresh predictors by site, where they are asked for, for inputs as large as those of windows `probe` [N, S]."""
    if task.recovery.predictors is None:
        return {}
    arch, config, student = task.arch, task.source.config, models.student
    generator = torch.Generator().manual_seed(task.seed * 7919)
    fresh: dict[Site, Unit] = {}
    for site, scale in input_rms(student, arch, arch.sites(config), probe).items():
        size = network_size(arch, config, site.layer)
        rank = rank_for(*size, task.recovery.predictors.cost)
        gate = fresh_predictor(size.hidden, size.units, rank, generator)
        fresh[site] = make_unit(SitePlan(gate=gate), student.device, scale)
    return fresh


def _point(row: dict[str, float]) -> CurvePoint:
    figures = {name: row[name] for name in CurvePoint.model_fields if name in row}
    return CurvePoint.model_validate(figures | {name: int(row[name]) for name in ("step", "tokens")})

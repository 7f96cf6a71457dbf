"""A student on held-out windows: beside the dense model, and as a curve while it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import read_json
from ..arch.site import Site
from ..checkpoint.plan import Exact, Plan, SitePlan, Swap
from ..checkpoint.stage import Header, atomic_folder, is_finished, read_header, write_header, write_json
from ..evaluation.checks import Quality
from ..evaluation.quality import measure_quality
from ..evaluation.recovery_record import HeldoutPoint, SiteDensity, SwappedQuality
from ..modeling.distributed import sum_over_processes, world
from ..modeling.gated import apply_plan, remove_plan
from ..text.windows import Batches
from .inputs import Models
from .loop import STATE
from .settings import Recovery
from .unit import Unit

WATCHED, WATCHES = 16, 12
"""The first held-out windows that are looked at while training, and how often."""
_ROWS = "heldout.json"


@torch.no_grad()
def compared(models: Models, plan: Plan, batches: Batches) -> Quality:
    """The student under its plan beside the teacher."""
    student = models.student
    apply_plan(student, plan, models.arch, models.activation)
    try:
        return measure_quality(student, plan, batches, reference_model=models.teacher, error=0.0, most=batches.count)
    finally:
        remove_plan(student)


def swapped_quality(exact: Quality, predicted: Quality | None = None) -> SwappedQuality:
    """What is reported of a model with exact zeros: its loss, with predictors theirs, and the shares by site."""
    shown = predicted or exact
    sites = [
        SiteDensity(
            site=key,
            density=share,
            opened=exact.site_opened[key],
            predicted=predicted.site_density[key] if predicted else None,
        )
        for key, share in exact.site_density.items()
    ]
    return SwappedQuality(
        nll=shown.nll,
        kl=max(shown.kl, 0.0),
        agreement=shown.agreement,
        density=exact.density,
        opened=sum(site.opened for site in sites) / len(sites),
        predicted=predicted.density if predicted else None,
        cost=shown.cost,
        sites=sites,
    )


@dataclass(frozen=True)
class StoredCurve:
    """The held-out curve so far, a stage of its own: looks are taken between states."""

    folder: Path
    header: Header

    def read(self) -> list[dict[str, Any]]:
        """What was seen."""
        stored = read_header(self.folder) == self.header
        return read_json(self.folder / _ROWS, "The held-out curve")["rows"] if stored else []

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Store it."""
        with atomic_folder(self.folder) as partial:
            write_json(partial / _ROWS, {"rows": rows})
            write_header(partial, self.header)

    def belongs(self, state: Path, every: int) -> bool:
        """Whether it is whole up to a training state that is, which looked every so many steps."""
        if not is_finished(state, self.header) or (self.folder.exists() and not is_finished(self.folder, self.header)):
            return False
        done = int(read_json(state / STATE, "The training state").get("step", 0))
        return sum(row["step"] <= done for row in self.read()) == done // every


def watched_every(recovery: Recovery) -> int:
    """Steps from one look to the next: there are WATCHES, or one a step."""
    return max(1, recovery.steps // WATCHES)


@dataclass(frozen=True)
class Watch:
    """Called after every step of a training, looks at held-out text now and then, and keeps what it saw in `curve`, so
    that a resumed run has the whole curve. `units` are the predictors that are trained too, `tokens` those of a step.
    """

    models: Models
    batches: Batches
    units: Mapping[Site, Unit]
    recovery: Recovery
    curve: StoredCurve
    tokens: int

    def __call__(self, step: int) -> dict[str, float]:
        """The loss on held-out text where it was looked at. Raises InputError for one that is not finite."""
        if (step + 1) % watched_every(self.recovery):
            return {}
        all_look = self.recovery.parallel == "fsdp"  # at weights that none has whole
        nll_and_kl = self._look(step) if all_look or world().rank == 0 else [0.0, 0.0]
        means = (sum_over_processes(torch.tensor(nll_and_kl)) / (world().size if all_look else 1)).tolist()
        if not all(map(math.isfinite, means)):
            raise InputError(
                f"The loss on held-out text must be a finite number, got {means[0]} after {step + 1} steps. Lower the "
                "rate."
            )
        return {"heldout": means[0]}

    def _look(self, step: int) -> list[float]:
        """NLL and divergence, which the first process keeps."""
        quality = compared(self.models, self._plan(), self.batches)
        nll_and_kl = [quality.nll, quality.kl]
        if world().rank == 0 and all(map(math.isfinite, nll_and_kl)):
            point = HeldoutPoint(
                step=step + 1,
                tokens=(step + 1) * self.tokens,
                nll=quality.nll,
                nll_dense=quality.nll_dense,
                kl=max(quality.kl, 0.0),
                agreement=quality.agreement,
                density=None if self.units else quality.density,
                predicted=quality.density if self.units else None,
            )
            before = [row for row in self.curve.read() if row["step"] < step + 1]
            self.curve.write([*before, point.model_dump()])
        return nll_and_kl

    def _plan(self) -> Plan:
        """The student's activations, and what its predictors are by now."""
        student, arch = self.models.student, self.models.arch
        modules = {site: student.get_submodule(arch.ffn_module(site.layer)) for site in arch.sites(student.config)}
        edits = {site: (Swap(module.swapped),) for site, module in modules.items()}
        if not self.units:
            return {site: SitePlan(edit, Exact()) for site, edit in edits.items()}
        return {site: self.units[site].site_plan(1.0, edit) for site, edit in edits.items()}

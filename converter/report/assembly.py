"""From a conversion's measurements to its report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from ...runtime_onnx.bench import machine
from ..data import Batches
from ..manifest import installed_versions
from ..methods import load_method
from ..plans import Plan
from ..recipe import Recipe
from ..source import Source
from ..verification import Check as Verified
from ..verification import Quality
from .results import Check, Layer, Machine, Report, Row, Speed, Text

BUNDLED_TEXT = "the text that comes with sparsegate"


class Candidate(Protocol):
    """One method's result. `speed` is what `runtime_onnx.bench` returned for dense against this method, or empty."""

    @property
    def method(self) -> str:
        """The method's name."""
        ...

    @property
    def plan(self) -> Plan:
        """What is kept, by whom."""
        ...

    @property
    def quality(self) -> Quality:
        """Held-out quality."""
        ...

    @property
    def checks(self) -> list[Verified]:
        """What verification judged."""
        ...

    @property
    def speed(self) -> dict[str, Any]:
        """The benchmark's record."""
        ...


def build(source: Source, recipe: Recipe, calibration: Batches, candidates: Sequence[Candidate], chosen: Candidate, command: str) -> Report:
    """The report of a conversion that tried `candidates` and kept `chosen`. Local paths stay out of it, since checkpoints are published."""
    timed = chosen.speed or next((candidate.speed for candidate in candidates if candidate.speed), {})
    here = (timed.get("machine") if timed else None) or machine()
    file = recipe.calibration.file
    name = BUNDLED_TEXT if file is None else Path(file).name
    stored = recipe.model_copy(update={"model": source.name, "calibration": recipe.calibration.model_copy(update={"file": None if file is None else name})})
    return Report(
        model=source.name,
        revision=source.revision,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        machine=Machine(cpu=here["cpu"], cores=here["cpus"], os=here["system"], memory_bytes=here["memory_bytes"]),
        versions=installed_versions(),
        recipe=stored.model_dump(mode="json"),
        calibration=Text(tokens=calibration.count, hash=calibration.sha256, name=name),
        evaluation=Text(tokens=chosen.quality.tokens, name=f"held-out text of {name}"),
        speed=_speed(timed, recipe.export.precision) if timed else None,
        rows=[_dense(chosen.quality, timed), *(_row(candidate, candidate is chosen) for candidate in candidates)],
        layers=_layers(chosen, recipe),
        checks=[Check(**check.model_dump()) for check in chosen.checks],
    )


def _speed(timed: dict[str, Any], precision: str) -> Speed:
    settings = timed["settings"]
    return Speed(
        runtime=settings["runtime"],
        precision=precision,
        provider=timed["candidate"]["provider"],
        threads=settings["threads"],
        prompt_tokens=settings["prompt_tokens"],
        new_tokens=settings["new_tokens"],
        executor=timed["candidate"]["executor"],
        command=timed["command"],
        commit=timed["versions"].get("commit"),
        disturbed=timed.get("quiet") is False,
    )


def _dense(quality: Quality, timed: dict[str, Any]) -> Row:
    rates = _rates(timed, "baseline")
    return Row(method="dense", nll=quality.nll_dense, perplexity=math.exp(quality.nll_dense), kl=0, agreement=1, density=1, cost=1, **rates)


def _row(candidate: Candidate, selected: bool) -> Row:
    quality, timed = candidate.quality, candidate.speed
    return Row(
        method=candidate.method,
        nll=quality.nll,
        perplexity=math.exp(quality.nll),
        kl=quality.kl,
        agreement=quality.agreement,
        density=quality.density,
        cost=quality.cost,
        decode_ratio=timed["decode"]["ratio"] if timed else None,
        selected=selected,
        bench={key: timed[key] for key in ("settings", "prefill", "decode", "samples", "dropped", "waits") if key in timed} or None,
        **_rates(timed, "candidate"),
    )


def _rates(timed: dict[str, Any], role: str) -> dict[str, Any]:
    return {f"{phase}_tokens_per_second": timed[role][f"{phase}_tokens_per_s"] if timed else None for phase in ("prefill", "decode")}


def _layers(chosen: Candidate, recipe: Recipe) -> list[Layer]:
    (stage,) = recipe.stages
    field = load_method(chosen.method).Config.model_fields.get("sparsity")
    sparsity = stage.config.get("sparsity", field.default if field else None)
    quality, rows = chosen.quality, []
    for site, entries in sorted(chosen.plan.items()):
        for entry in entries:
            rows.append(
                Layer(
                    site=site.key,
                    density_target=1 - sparsity if isinstance(sparsity, float) else None,
                    density_calibrated=entry.density,
                    density_realised=quality.site_density[site.key],
                    recall=getattr(entry, "recall", None),
                    rank=getattr(entry, "rank", None),
                    cost=quality.site_cost[site.key],
                )
            )
    return rows

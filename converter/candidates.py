"""What the methods made: each plan's held-out quality, the choice among them, the chosen one's checkpoint, ONNX folder and checks, and the report on all."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..runtime_onnx.bench import bench
from . import report as reporting
from .artifact import Header, InputError, atomic_folder, is_finished, read_header, read_json, write_header, write_json
from .onnx_export import build_base, check_base, export
from .plans import Plan, Predictor
from .recipe import Recipe
from .reference import apply_plan, load, load_dense, remove_plan
from .report import Report
from .schedule import checkpoint
from .source import Source
from .texts import Texts, heldout_name
from .verification import Check, Quality, check_budget, check_onnx, measure_quality

log = logging.getLogger("sparsegate")
SPEED_PAIRS = 25


@dataclass(frozen=True)
class Candidate:
    """A method's plan and its held-out quality; of the one that was exported also its folders, the checks it passed or failed, and its speed beside dense
    (empty when not measured).
    """

    method: str
    plan: Plan
    sparsity: float | None
    quality: Quality
    checks: list[Check]
    checkpoint: Path | None = None
    onnx: Path | None = None
    speed: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def make_base(source: Source, texts: Texts, work: Path) -> Path:
    """The dense ONNX graph, compared with torch before anything is built on it."""
    folder, header = work / "base", Header(format="base", parents={"model": source.fingerprint})
    if not is_finished(folder, header):
        with atomic_folder(folder) as partial:
            build_base(source.folder, partial)
            check_base(partial, load_dense(source.folder), texts.heldout.tokens[texts.heldout.mask.all(1)][:2, :32])
            write_header(partial, header)
    return folder


def measure(source: Source, plans: Mapping[str, Plan], sparsities: Mapping[str, float | None], texts: Texts, recipe: Recipe, work: Path) -> list[Candidate]:
    """The held-out quality of every plan, each a stage below `work`, and whether it keeps the budget and the asked density."""
    found, model = [], None
    for name, plan in plans.items():
        parent = read_header(work / "plan" / name)
        assert parent is not None
        folder, header = work / "quality" / name, Header(format="quality", parents={"plan": parent.fingerprint}, calibration=texts.heldout.sha256)
        if not is_finished(folder, header):
            model = model or load_dense(source.folder)
            apply_plan(model, plan, source.arch, source.arch.activation(source.config))
            quality = measure_quality(model, plan, texts.heldout)
            remove_plan(model)
            with atomic_folder(folder) as partial:
                write_json(partial / "quality.json", quality.model_dump())
                write_header(partial, header)
        quality = Quality(**read_json(folder / "quality.json", "The measured quality"))
        budget = recipe.budget.model_dump() | {"sparsity": sparsities[name], "searched": recipe.searches}
        found.append(Candidate(name, plan, sparsities[name], quality, check_budget(quality, budget)))
    return found


def choose(candidates: list[Candidate], source: Source, texts: Texts, base: Path, recipe: Recipe, work: Path) -> tuple[Candidate, list[Candidate]]:
    """The best candidate, exported and checked, and all of them with it in its place: the cheapest one where a budget was searched, else the one with the
    least KL to dense. One whose executors disagree is passed over.

    Raises InputError with the failed checks when none passes.
    """
    order = sorted(candidates, key=lambda c: (c.quality.block_cost or c.quality.cost) if recipe.searches else c.quality.kl)
    tried: dict[str, Candidate] = {candidate.method: candidate for candidate in candidates}
    for candidate in order:
        if candidate.passed:
            tried[candidate.method] = _exported(candidate, source, texts, base, recipe, work)
            if tried[candidate.method].passed:
                break
    else:
        found = "; ".join(_failures(list(tried.values())))
        raise InputError(
            f"A checkpoint must hold its budget and its executors must agree, got {found}. "
            "Lower --sparsity, loosen the budget, or report executors that disagree."
        )
    for line in _failures(list(tried.values())):
        log.warning("not chosen, %s", line)
    return tried[candidate.method], list(tried.values())


def _failures(candidates: list[Candidate]) -> list[str]:
    return [f"{c.method}: {check.name} {check.value:.3g} against {check.bound:.3g} {check.note}" for c in candidates for check in c.checks if not check.passed]


def _exported(candidate: Candidate, source: Source, texts: Texts, base: Path, recipe: Recipe, work: Path) -> Candidate:
    """The candidate with checkpoint, ONNX folder, checks of its executors and speed, each a stage below `work`."""
    name = candidate.method
    folder = checkpoint(source, candidate.plan, name, work, work / "plan" / name)
    parent = read_header(folder)
    assert parent is not None
    onnx, header = work / "onnx" / name, Header(format="onnx", parents={"checkpoint": parent.fingerprint}, config=recipe.export.model_dump(mode="json"))
    if not is_finished(onnx, header):
        with atomic_folder(onnx) as partial:
            export(base, candidate.plan, source.arch, source.config, partial)
            write_header(partial, header)
    measured, header = work / "measured" / name, Header(format="measured", parents={"onnx": header.fingerprint}, calibration=texts.heldout.sha256)
    if not is_finished(measured, header):
        checks = check_onnx(onnx, load(folder), texts.heldout)
        speed = _speed(base, onnx, texts)
        with atomic_folder(measured) as partial:
            write_json(partial / "measured.json", {"checks": [check.model_dump() for check in checks], "speed": speed})
            write_header(partial, header)
    stored = read_json(measured / "measured.json", "The measurement")
    checks = [Check(**row) for row in stored["checks"]] + candidate.checks
    return replace(candidate, checkpoint=folder, onnx=onnx, checks=checks, speed=stored["speed"])


def _speed(base: Path, onnx: Path, texts: Texts) -> dict[str, Any]:
    """Tokens per second of a candidate and of the dense graph, back to back; an empty dict where the machine was too busy to measure."""
    length = texts.heldout.tokens.shape[1]
    prompt = texts.heldout.tokens[0, : min(128, length // 2)].tolist()
    try:
        return bench(base, onnx, prompt=prompt, new_tokens=min(64, length - len(prompt) - 1), pairs=SPEED_PAIRS, command="sparsegate convert")
    except ValueError as error:
        log.warning("Speed was not measured: %s", error)
        return {}


def build_report(source: Source, recipe: Recipe, texts: Texts, candidates: list[Candidate], chosen: Candidate, command: str) -> Report:
    """The report on every candidate, dense first; layers and checks are the chosen one's."""
    quality = chosen.quality
    dense_speed = chosen.speed.get("baseline", {})
    dense = reporting.Row(
        method="dense", nll=quality.nll_dense, perplexity=math.exp(quality.nll_dense), kl=0.0, agreement=1.0, density=1.0, cost=1.0, block_cost=1.0,
        prefill_tokens_per_second=dense_speed.get("prefill_tokens_per_s"), decode_tokens_per_second=dense_speed.get("decode_tokens_per_s"),
    )  # fmt: skip
    return Report(
        model=source.name,
        revision=source.revision,
        date=datetime.now(UTC).date().isoformat(),
        command=command,
        machine=reporting.this_machine(),
        versions=reporting.installed_versions(),
        recipe=recipe.model_copy(update={"model": source.name, "calibration": _public(recipe), "stages": _public_stages(recipe)}).model_dump(mode="json"),
        calibration=reporting.Text(hash=texts.calibration.sha256, tokens=texts.calibration.count, name=texts.name),
        evaluation=reporting.Text(hash=texts.heldout.sha256, tokens=quality.tokens, name=heldout_name(recipe)),
        speed=_conditions(chosen.speed),
        rows=[dense, *(_row(candidate, candidate is chosen) for candidate in candidates)],
        layers=[_layer(chosen, site, entries[0]) for site, entries in chosen.plan.items()],
        checks=[
            reporting.Check(name=check.name, value=check.value, bound=check.bound, passed=check.passed, at_least=check.at_least, note=check.note)
            for check in chosen.checks
        ],
    )


def _public(recipe: Recipe) -> Any:
    """The calibration part without the folders of this machine."""
    file = recipe.calibration.file
    return recipe.calibration if file is None else recipe.calibration.model_copy(update={"file": Path(file).name})


def _public_stages(recipe: Recipe) -> Any:
    """The stages without the folders of this machine."""
    (stage,) = recipe.stages
    folder = stage.config.get("folder")
    return (stage if folder is None else stage.model_copy(update={"config": stage.config | {"folder": Path(folder).name}}),)


def _row(candidate: Candidate, selected: bool) -> reporting.Row:
    quality, speed = candidate.quality, candidate.speed
    return reporting.Row(
        method=candidate.method, nll=quality.nll, perplexity=math.exp(quality.nll), kl=max(0.0, quality.kl), agreement=quality.agreement,
        density=quality.density, cost=quality.cost, block_cost=quality.block_cost, selected=selected,
        prefill_tokens_per_second=speed.get("candidate", {}).get("prefill_tokens_per_s"),
        decode_tokens_per_second=speed.get("candidate", {}).get("decode_tokens_per_s"),
        decode_ratio=speed.get("decode", {}).get("ratio"),
    )  # fmt: skip


def _layer(candidate: Candidate, site: Any, entry: Any) -> reporting.Layer:
    quality = candidate.quality
    realised = quality.site_density[site.key]
    return reporting.Layer(
        site=site.key, density_target=None if candidate.sparsity is None else 1 - candidate.sparsity, density_calibrated=entry.density,
        density_realised=realised, cost=quality.site_cost[site.key],
        recall=entry.recall if isinstance(entry, Predictor) else None, rank=entry.rank if isinstance(entry, Predictor) else None,
    )  # fmt: skip


def _conditions(speed: dict[str, Any]) -> reporting.Speed | None:
    if not speed:
        return None
    settings = speed["settings"]
    return reporting.Speed(
        precision="fp32", provider=speed["candidate"]["provider"], threads=settings["threads"],
        prompt_tokens=settings["prompt_tokens"], new_tokens=settings["new_tokens"], executor=speed["candidate"]["executor"], command=speed["command"],
        disturbed=speed["quiet"] is False,
    )  # fmt: skip

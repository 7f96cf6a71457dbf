"""One method's result, stage by stage: checkpoint, ONNX folder, measurements; the choice among methods, and the report on all of them."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..runtime_onnx.bench import bench
from . import report as reporting
from .artifact import Header, InputError, atomic_folder, is_finished, read_header, read_json, write_header, write_json
from .data import CALIBRATION_TEXT, HELDOUT_TEXT, Batches, make_batches, read_text
from .onnx_export import build_base, check_base, export
from .plans import Plan, Predictor
from .recipe import Recipe
from .reference import load, load_dense
from .report import Report
from .schedule import checkpoint
from .source import Source
from .verification import Check, Quality, check_budget, check_onnx, measure_quality

log = logging.getLogger("sparsegate")
HELDOUT_WINDOWS = 64
SPEED_PAIRS = 25
HELDOUT_SHARE = 0.2  # of a user's own calibration text, kept for measuring


@dataclass(frozen=True)
class Texts:
    """Token windows to calibrate on and to measure on; no window is in both."""

    calibration: Batches
    heldout: Batches
    name: str


@dataclass(frozen=True)
class Candidate:
    """A method's plan and folders, its held-out quality, the checks it passed or failed, and its speed beside dense (empty when not measured)."""

    method: str
    plan: Plan
    checkpoint: Path
    onnx: Path
    sparsity: float | None
    quality: Quality
    checks: list[Check]
    speed: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def make_texts(source: Source, recipe: Recipe) -> Texts:
    """Calibration and held-out windows: of the bundled texts, or of a user's file, whose last fifth is held out."""
    tokenizer, asked = source.tokenizer(), recipe.calibration
    length = min(asked.length, int(getattr(source.config, "max_position_embeddings", asked.length)))
    if asked.file is None:
        text, heldout, name = read_text(CALIBRATION_TEXT), read_text(HELDOUT_TEXT), "Python standard library modules"
    else:
        whole = read_text(Path(asked.file))
        cut = int(len(whole) * (1 - HELDOUT_SHARE))
        text, heldout, name = whole[:cut], whole[cut:], Path(asked.file).name
    return Texts(
        make_batches(tokenizer, text, asked.windows, length, recipe.seed),
        make_batches(tokenizer, heldout, HELDOUT_WINDOWS, length, recipe.seed + 1, "The last fifth of the calibration text"),
        name,
    )


def make_base(source: Source, texts: Texts, work: Path) -> Path:
    """The dense ONNX graph, compared with torch before anything is built on it."""
    folder, header = work / "base", Header(format="base", parents={"model": source.fingerprint})
    if not is_finished(folder, header):
        with atomic_folder(folder) as partial:
            build_base(source.folder, partial)
            check_base(partial, load_dense(source.folder), texts.heldout.tokens[texts.heldout.mask.all(1)][:2, :32])
            write_header(partial, header)
    return folder


def make_candidate(source: Source, name: str, plan: Plan, texts: Texts, base: Path, recipe: Recipe, config: dict[str, Any], work: Path) -> Candidate:
    """Checkpoint, ONNX folder and measurements of one plan, each a stage below `work`."""
    folder = checkpoint(source, plan, name, work, work / "plan" / name)
    parent = read_header(folder)
    assert parent is not None
    onnx, header = work / "onnx" / name, Header(format="onnx", parents={"checkpoint": parent.fingerprint}, config=recipe.export.model_dump(mode="json"))
    if not is_finished(onnx, header):
        with atomic_folder(onnx) as partial:
            export(base, plan, source.arch, source.config, partial)
            write_header(partial, header)
    sparsity = config.get("sparsity")
    budget = recipe.budget.model_dump() | {"sparsity": sparsity}
    measured, header = (
        work / "measured" / name,
        Header(format="measured", parents={"onnx": header.fingerprint}, config=budget, calibration=texts.heldout.sha256),
    )
    if not is_finished(measured, header):
        model = load(folder)
        quality = measure_quality(model, plan, texts.heldout)
        checks = check_onnx(onnx, model, texts.heldout) + check_budget(quality, budget)
        del model
        speed = _speed(base, onnx, texts)
        with atomic_folder(measured) as partial:
            write_json(partial / "measured.json", {"quality": quality.model_dump(), "checks": [check.model_dump() for check in checks], "speed": speed})
            write_header(partial, header)
    stored = read_json(measured / "measured.json", "The measurement")
    return Candidate(name, plan, folder, onnx, sparsity, Quality(**stored["quality"]), [Check(**row) for row in stored["checks"]], stored["speed"])


def _speed(base: Path, onnx: Path, texts: Texts) -> dict[str, Any]:
    """Tokens per second of a candidate and of the dense graph, back to back; an empty dict where the machine was too busy to measure."""
    length = texts.heldout.tokens.shape[1]
    prompt = texts.heldout.tokens[0, : min(128, length // 2)].tolist()
    try:
        return bench(base, onnx, prompt=prompt, new_tokens=min(64, length - len(prompt) - 1), pairs=SPEED_PAIRS, command="sparsegate convert")
    except ValueError as error:
        log.warning("Speed was not measured: %s", error)
        return {}


def choose(candidates: list[Candidate]) -> Candidate:
    """The passing candidate with the least KL to dense. Raises InputError with the failed checks when none passes."""
    failed = [
        f"{c.method}: {check.name} {check.value:.3g} against {check.bound:.3g} {check.note}" for c in candidates for check in c.checks if not check.passed
    ]
    passing = [candidate for candidate in candidates if candidate.passed]
    if not passing:
        raise InputError(
            f"A checkpoint must hold its budget and its executors must agree, got {'; '.join(failed)}. "
            "Lower --sparsity, loosen the budget, or report executors that disagree."
        )
    for line in failed:
        log.warning("not chosen, %s", line)
    return min(passing, key=lambda candidate: candidate.quality.kl)


def build_report(source: Source, recipe: Recipe, texts: Texts, candidates: list[Candidate], chosen: Candidate, command: str) -> Report:
    """The report on every candidate, dense first; layers and checks are the chosen one's."""
    quality = chosen.quality
    dense_speed = chosen.speed.get("baseline", {})
    dense = reporting.Row(
        method="dense", nll=quality.nll_dense, perplexity=math.exp(quality.nll_dense), kl=0.0, agreement=1.0, density=1.0, cost=1.0,
        prefill_tokens_per_second=dense_speed.get("prefill_tokens_per_s"), decode_tokens_per_second=dense_speed.get("decode_tokens_per_s"),
    )  # fmt: skip
    return Report(
        model=source.name,
        revision=source.revision,
        date=datetime.now(UTC).date().isoformat(),
        command=command,
        machine=reporting.this_machine(),
        versions=reporting.installed_versions(),
        recipe=recipe.model_copy(update={"model": source.name, "calibration": _public(recipe)}).model_dump(mode="json"),
        calibration=reporting.Text(hash=texts.calibration.sha256, tokens=texts.calibration.count, name=texts.name),
        evaluation=reporting.Text(hash=texts.heldout.sha256, tokens=quality.tokens, name=f"{texts.name}, held out"),
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


def _row(candidate: Candidate, selected: bool) -> reporting.Row:
    quality, speed = candidate.quality, candidate.speed
    return reporting.Row(
        method=candidate.method, nll=quality.nll, perplexity=math.exp(quality.nll), kl=max(0.0, quality.kl), agreement=quality.agreement,
        density=quality.density, cost=quality.cost, selected=selected,
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

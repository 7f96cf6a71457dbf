"""What the methods made: each plan's held-out quality, the choice among them, and the chosen one's checkpoint, ONNX
folder and checks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...runtime_onnx.bench.folders import BenchTiming, bench
from ...runtime_onnx.untrusted import read_json
from ..checkpoint.plan import Plan
from ..checkpoint.source import Source
from ..checkpoint.stage import CheckError, Header, atomic_folder, is_finished, read_header, write_header, write_json
from ..evaluation.agreement import check_onnx, has_cuda, measure_shipped
from ..evaluation.checks import Check, ExecutorQuality, Quality, check_budget, check_text, shipped_checks
from ..evaluation.long_context import measure_positions
from ..evaluation.quality import MOST_TOKENS, measure_qualities
from ..methods import TUNED
from ..modeling.gated import load
from ..onnx_export.export import export
from ..progress import resumed, stage, update
from ..text.windows import Batches
from .conversion import Conversion, Made
from .graphs import Graphs, graph_of, stored_quality
from .schedule import checkpoint
from .texts import Texts, quality_error

log = logging.getLogger("sparsegate")
SPEED_PAIRS = 25
_MEASURED = "measured.json"


@dataclass(frozen=True)
class Candidate:
    """A method's plan, the model that it is for (`updated`, `rotated`: as in `Made`), and its held-out quality; of the
    one that was exported also its folders, the checks it passed or failed, what its ONNX file loses in its own
    precision (None where that is torch's, or nothing could run it), and its speed beside dense (empty when not
    measured).
    """

    method: str
    plan: Plan
    sparsity: float | None
    quality: Quality
    checks: list[Check]
    source: Source
    updated: bool = False
    rotated: bool = False
    checkpoint: Path | None = None
    onnx: Path | None = None
    shipped: ExecutorQuality | None = None
    speed: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def measure(
    conversion: Conversion,
    made: Mapping[str, Made],
    sparsities: Mapping[str, float | None],
    windows: int | None = None,
) -> list[Candidate]:
    """The held-out quality of every plan, each a stage, and whether it keeps the budget and the density that was asked
    for (None: none was). All are for one model. Where one is missing all are measured, so that they are compared on the
    same windows: the first `windows`, where others were measured on them, else as many as the plan takes that needs the
    most.
    """
    work, recipe, heldout = conversion.work, conversion.recipe, conversion.texts.heldout
    stages: dict[str, tuple[Path, Header]] = {}
    config: dict[str, Any] = {} if conversion.texts.long is None else {"long": conversion.texts.long.sha256}
    config |= {} if windows is None else {"windows": windows}
    for name in made:
        parent = read_header(work / "plan" / name)
        assert parent is not None
        stages[name] = (
            work / "quality" / name,
            Header(format="quality", parents={"plan": parent.fingerprint}, config=config, calibration=heldout.sha256),
        )
    if not all(is_finished(*stage) for stage in stages.values()):
        for name, quality in _qualities(conversion, made, windows).items():
            folder, header = stages[name]
            with atomic_folder(folder) as partial:
                write_json(partial / "quality.json", quality.model_dump())
                write_header(partial, header)
    else:
        resumed()
    conversion.models.release()
    candidates = []
    for name, each in made.items():
        quality = Quality(**read_json(stages[name][0] / "quality.json", "The measured quality"))
        sparsity = sparsities.get(name)
        budget = recipe.budget.model_dump() | {"sparsity": sparsity, "searched": recipe.searches}
        checks = check_budget(quality, budget)
        candidates.append(
            Candidate(name, each.plan, sparsity, quality, checks, each.source, each.updated, each.rotated)
        )
    return candidates


def _qualities(conversion: Conversion, made: Mapping[str, Made], windows: int | None) -> dict[str, Quality]:
    """The held-out quality of plans for one model, from one dense pass; `windows` as in `measure`."""
    own = conversion.with_source(next(iter(made.values())).source)
    plans, heldout = {name: each.plan for name, each in made.items()}, conversion.texts.heldout
    error, most = quality_error(conversion.recipe), MOST_TOKENS
    if windows is not None:
        heldout, error = Batches(heldout.tokens[:windows], heldout.mask[:windows]), 0.0
        most = heldout.count
    qualities = measure_qualities(own.model(), plans, heldout, own.reference_model(), error, most)
    return dict(_with_long(own, plans, qualities))


def _with_long(
    conversion: Conversion, plans: Mapping[str, Plan], qualities: Mapping[str, Quality]
) -> Mapping[str, Quality]:
    """The qualities with what long windows lose, where a budget bounds it."""
    long = conversion.texts.long
    if long is None:
        return qualities
    measured = measure_positions(conversion.model(), plans, long, conversion.reference_model())
    return {name: quality.with_long(measured[name]) for name, quality in qualities.items()}


def best_first(candidates: list[Candidate], searches: bool) -> list[Candidate]:
    """The candidates in order: what a training ended with, else by `rank`."""
    return sorted(candidates, key=lambda candidate: (candidate.method != TUNED, rank(candidate, searches)))


def rank(candidate: Candidate, searches: bool) -> float:
    """What is to be least: the bytes of the blocks' maps where a budget is searched, else the divergence from dense."""
    quality = candidate.quality
    return (quality.block_cost or quality.cost) if searches else quality.kl


def choose(conversion: Conversion, candidates: list[Candidate], graphs: Graphs) -> tuple[Candidate, list[Candidate]]:
    """The best candidate, exported and checked, and all of them with it in its place. One whose executors disagree is
    passed over.

    Raises InputError with the failed checks when none passes.
    """
    order = best_first(candidates, conversion.recipe.searches)
    tried: dict[str, Candidate] = {candidate.method: candidate for candidate in candidates}
    for candidate in order:
        if candidate.passed:
            tried[candidate.method] = _exported(conversion, candidate, graphs)
            if tried[candidate.method].passed:
                break
    else:
        failures = "; ".join(_failures(list(tried.values())))
        raise CheckError(
            f"A checkpoint must hold its budget and its executors must agree, got {failures}. "
            "Lower --sparsity, loosen the budget, choose a precision of more bits, or report executors that disagree."
        )
    for line in _failures(list(tried.values())):
        log.warning("not chosen, %s", line)
    return tried[candidate.method], list(tried.values())


def _failures(candidates: list[Candidate]) -> list[str]:
    return [
        f"{c.method}: {check.name} {check.value:.3g} against {check.bound:.3g} {check.note}"
        for c in candidates
        for check in c.checks
        if not check.passed
    ]


def _exported(conversion: Conversion, candidate: Candidate, graphs: Graphs) -> Candidate:
    """The candidate with checkpoint, ONNX folder, checks of its executors and speed, each a stage."""
    conversion = conversion.with_source(candidate.source)
    recipe, settings = conversion.recipe, conversion.recipe.export
    with stage("export"):
        folder = checkpoint(conversion, candidate.plan, candidate.method)
        onnx = _onnx(conversion, candidate, graphs, folder)
    stored = _judged(conversion, candidate, graphs, folder, onnx)
    checks = [Check(**row) for row in stored["checks"]] + candidate.checks
    shipped = stored_quality(stored.get("shipped", {}))
    if shipped is not None:
        budget = recipe.budget.model_dump() | {"searched": recipe.searches}
        checks += shipped_checks(shipped, candidate.quality, budget, settings.precision)
    return replace(candidate, checkpoint=folder, onnx=onnx, checks=checks, shipped=shipped, speed=stored["speed"])


def _onnx(conversion: Conversion, candidate: Candidate, graphs: Graphs, folder: Path) -> Path:
    """The ONNX folder of a checkpoint folder, in the recipe's precision and for its target."""
    settings = conversion.recipe.export
    parent = read_header(folder)
    assert parent is not None
    onnx = conversion.work / "onnx" / candidate.method
    header = Header(format="onnx", parents={"checkpoint": parent.fingerprint}, config=settings.model_dump(mode="json"))
    if is_finished(onnx, header):
        resumed()
    else:
        with atomic_folder(onnx) as partial:
            base = graph_of(conversion, graphs, folder)
            export(folder, partial, settings.precision, settings.target, base)
            write_header(partial, header)
    return onnx


def _judged(conversion: Conversion, candidate: Candidate, graphs: Graphs, folder: Path, onnx: Path) -> dict[str, Any]:
    """Whether the executors of a checkpoint folder and its ONNX folder agree, its speed where they do, and what its
    file loses: as it is stored.
    """
    texts, settings = conversion.texts, conversion.recipe.export
    parent = read_header(onnx)
    assert parent is not None
    measured = conversion.work / "measured" / candidate.method
    header = Header(format="measured", parents={"onnx": parent.fingerprint}, calibration=texts.heldout.sha256)
    stored = _agreed(measured, header)
    if stored is not None:
        resumed("agreement")
        resumed("speed")
        return stored
    with stage("agreement"):
        model, reference = load(folder), conversion.reference_model()
        loss = measure_shipped(onnx, model, texts.heldout, settings, reference_model=reference, known=candidate.quality)
        checks = [*check_onnx(onnx, model, candidate.plan, texts.heldout, settings), check_text(onnx)]
        del model, reference
        conversion.models.release()
    agree = all(check.passed for check in checks)
    speed = {} if not agree or (settings.target == "cuda" and not has_cuda()) else _speed(graphs.dense, onnx, texts)
    shipped = {} if loss is None else loss.model_dump()
    stored = {"checks": [check.model_dump() for check in checks], "speed": speed, "shipped": shipped}
    if agree:
        with atomic_folder(measured) as partial:
            write_json(partial / _MEASURED, stored)
            write_header(partial, header)
    return stored


def _agreed(measured: Path, header: Header) -> dict[str, Any] | None:
    """What was measured of an ONNX folder whose executors agreed. None where nothing was, or where they did not:
    another version may judge otherwise.
    """
    if not is_finished(measured, header):
        return None
    stored = read_json(measured / _MEASURED, "The measurement")
    return stored if all(row["passed"] for row in stored["checks"]) else None


@stage("speed")
def _speed(base: Path, onnx: Path, texts: Texts) -> dict[str, Any]:
    """Tokens per second of a candidate and of the dense graph, back to back; an empty dict where the machine was too
    busy to measure.
    """
    length = texts.heldout.tokens.shape[1]
    prompt = texts.heldout.tokens[0, : min(128, length // 2)].tolist()
    try:
        return bench(
            base,
            onnx,
            BenchTiming(new_tokens=min(64, length - len(prompt) - 1), pairs=SPEED_PAIRS),
            prompt,
            command="sparsegate convert",
            progress=lambda done: update(done, SPEED_PAIRS, unit="pair"),
        )
    except ValueError as error:
        log.warning("Speed was not measured: %s", error)
        return {}

"""What the methods made: each plan's held-out quality, the choice among them, and the chosen one's checkpoint, ONNX
folder and checks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...runtime_onnx.bench.folders import bench
from ...runtime_onnx.untrusted import read_json
from ..checkpoint.plan import Plan
from ..checkpoint.source import Source
from ..checkpoint.stage import CheckError, Header, atomic_folder, is_finished, read_header, write_header, write_json
from ..evaluation.agreement import check_onnx, has_cuda, measure_shipped
from ..evaluation.checks import Check, ExecutorQuality, Quality, check_budget, check_text, shipped_checks
from ..evaluation.quality import measure_qualities
from ..methods import TUNED
from ..modeling.gated import load, load_dense
from ..onnx_export.gated_graph import export
from ..progress import partly, resumed, stage, update
from .graphs import Graphs, stored_quality
from .recipe import Recipe
from .schedule import checkpoint
from .texts import Texts, quality_error

log = logging.getLogger("sparsegate")
SPEED_PAIRS = 25
_MEASURED = "measured.json"


@dataclass(frozen=True)
class Candidate:
    """A method's plan and its held-out quality; of the one that was exported also its folders, the checks it passed or
    failed, what its ONNX file loses in its own precision (None where that is torch's, or nothing could run it), and its
    speed beside dense (empty when not measured).
    """

    method: str
    plan: Plan
    sparsity: float | None
    quality: Quality
    checks: list[Check]
    checkpoint: Path | None = None
    onnx: Path | None = None
    shipped: ExecutorQuality | None = None
    speed: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def measure(
    source: Source,
    plans: Mapping[str, Plan],
    sparsities: Mapping[str, float | None],
    texts: Texts,
    recipe: Recipe,
    work: Path,
    original: Source | None = None,
) -> list[Candidate]:
    """The held-out quality of every plan, each a stage below `work`, and whether it keeps the budget and the asked
    density. What is not there yet is measured together.

    Dense is `original`, the model that `source` was recovered from, where it was.
    """
    stages: dict[str, tuple[Path, Header]] = {}
    for name in plans:
        parent = read_header(work / "plan" / name)
        assert parent is not None
        stages[name] = (
            work / "quality" / name,
            Header(format="quality", parents={"plan": parent.fingerprint}, calibration=texts.heldout.sha256),
        )
    missing = {name: plans[name] for name, stage in stages.items() if not is_finished(*stage)}
    if missing:
        if len(missing) < len(plans):
            partly()
        model, dense = load_dense(source.folder), _load(original)
        qualities = measure_qualities(model, missing, texts.heldout, dense, quality_error(recipe))
        for name, quality in qualities.items():
            folder, header = stages[name]
            with atomic_folder(folder) as partial:
                write_json(partial / "quality.json", quality.model_dump())
                write_header(partial, header)
    else:
        resumed()
    found = []
    for name, plan in plans.items():
        quality = Quality(**read_json(stages[name][0] / "quality.json", "The measured quality"))
        budget = recipe.budget.model_dump() | {"sparsity": sparsities[name], "searched": recipe.searches}
        found.append(Candidate(name, plan, sparsities[name], quality, check_budget(quality, budget)))
    return found


def _load(source: Source | None) -> Any | None:
    return None if source is None else load_dense(source.folder)


def choose(
    candidates: list[Candidate],
    source: Source,
    texts: Texts,
    graphs: Graphs,
    recipe: Recipe,
    work: Path,
    original: Source | None = None,
) -> tuple[Candidate, list[Candidate]]:
    """The best candidate, exported and checked, and all of them with it in its place: what a training ended with, else
    the cheapest one where a budget was searched, else the one with the least KL to dense. One whose executors disagree
    is passed over.

    Raises InputError with the failed checks when none passes.
    """
    order = sorted(
        candidates,
        key=lambda c: (
            c.method != TUNED,
            (c.quality.block_cost or c.quality.cost) if recipe.searches else c.quality.kl,
        ),
    )
    tried: dict[str, Candidate] = {candidate.method: candidate for candidate in candidates}
    for candidate in order:
        if candidate.passed:
            tried[candidate.method] = _exported(candidate, source, texts, graphs, recipe, work, original)
            if tried[candidate.method].passed:
                break
    else:
        found = "; ".join(_failures(list(tried.values())))
        raise CheckError(
            f"A checkpoint must hold its budget and its executors must agree, got {found}. "
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


def _exported(
    candidate: Candidate,
    source: Source,
    texts: Texts,
    graphs: Graphs,
    recipe: Recipe,
    work: Path,
    original: Source | None,
) -> Candidate:
    """The candidate with checkpoint, ONNX folder, checks of its executors and speed, each a stage below `work`."""
    name, asked = candidate.method, recipe.export
    with stage("export"):
        folder = checkpoint(source, candidate.plan, name, work, work / "plan" / name)
        parent = read_header(folder)
        assert parent is not None
        onnx, header = (
            work / "onnx" / name,
            Header(format="onnx", parents={"checkpoint": parent.fingerprint}, config=asked.model_dump(mode="json")),
        )
        if is_finished(onnx, header):
            resumed()
        else:
            with atomic_folder(onnx) as partial:
                export(graphs.base, candidate.plan, source.arch, source.config, partial, asked.precision, asked.target)
                write_header(partial, header)
    measured, header = (
        work / "measured" / name,
        Header(format="measured", parents={"onnx": header.fingerprint}, calibration=texts.heldout.sha256),
    )
    stored = _agreed(measured, header)
    if stored is not None:
        resumed("agreement")
        resumed("speed")
    else:
        with stage("agreement"):
            model, dense = load(folder), _load(original)
            found = measure_shipped(onnx, model, texts.heldout, asked, reference_model=dense, known=candidate.quality)
            checks = [*check_onnx(onnx, model, candidate.plan, texts.heldout, asked), check_text(onnx)]
        agree = all(check.passed for check in checks)
        speed = {} if not agree or (asked.target == "cuda" and not has_cuda()) else _speed(graphs.dense, onnx, texts)
        shipped = {} if found is None else found.model_dump()
        stored = {"checks": [check.model_dump() for check in checks], "speed": speed, "shipped": shipped}
        if agree:
            with atomic_folder(measured) as partial:
                write_json(partial / _MEASURED, stored)
                write_header(partial, header)
    checks, shipped = (
        [Check(**row) for row in stored["checks"]] + candidate.checks,
        stored_quality(stored.get("shipped", {})),
    )
    if shipped is not None:
        budget = recipe.budget.model_dump() | {"searched": recipe.searches}
        checks += shipped_checks(shipped, candidate.quality, budget, asked.precision)
    return replace(candidate, checkpoint=folder, onnx=onnx, checks=checks, shipped=shipped, speed=stored["speed"])


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
            prompt=prompt,
            new_tokens=min(64, length - len(prompt) - 1),
            pairs=SPEED_PAIRS,
            command="sparsegate convert",
            progress=lambda done: update(done, SPEED_PAIRS, unit="pair"),
        )
    except ValueError as error:
        log.warning("Speed was not measured: %s", error)
        return {}

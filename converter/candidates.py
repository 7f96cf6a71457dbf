"""What the methods made: each plan's held-out quality, the choice among them, and the chosen one's checkpoint, ONNX folder and checks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..runtime_onnx.bench import bench
from .artifact import CheckError, Header, InputError, atomic_folder, is_finished, read_header, read_json, write_header, write_json
from .executors import check_dense_text, check_onnx, has_cuda, measure_shipped
from .onnx_export import PRECISIONS, build_base, check_base, export, export_dense, load_stock
from .planning import TUNED
from .plans import Plan
from .progress import partly, resumed, stage, update
from .quality import measure_qualities
from .recipe import Recipe
from .reference import load, load_dense
from .schedule import checkpoint
from .source import Source
from .texts import Texts, quality_error
from .verification import DENSE_WINDOWS, Check, ExecutorQuality, Quality, check_budget, check_text, shipped_checks

log = logging.getLogger("sparsegate")
SPEED_PAIRS = 25
_MEASURED = "measured.json"


@dataclass(frozen=True)
class Candidate:
    """A method's plan and its held-out quality; of the one that was exported also its folders, the checks it passed or failed, what its ONNX file loses in its
    own precision (None where that is torch's, or nothing could run it), and its speed beside dense (empty when not measured).
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


def make_base(source: Source, texts: Texts, work: Path) -> Path:
    """The dense ONNX graph, compared with torch before anything is built on it."""
    folder, header = work / "base", Header(format="base", parents={"model": source.fingerprint})
    if not is_finished(folder, header):
        with stage("base graph"), atomic_folder(folder) as partial:
            build_base(source.folder, partial)
            model = load_stock(source.folder)
            check_base(partial, model, texts.heldout.tokens[texts.heldout.mask.all(1)][:2, :32])
            check_dense_text(partial, model, texts.heldout)
            write_header(partial, header)
    else:
        resumed("base graph")
    return folder


@dataclass(frozen=True)
class Graphs:
    """The float graph that candidates are made from; the dense one in their precision, which their speed is compared with (fp16 and bf16 on the CPU: fp32,
    since ONNX Runtime has nothing faster there); and what that one loses, where it is in integers, something could run it and its function is a dense
    model's: under swapped activations the float graph has the sizes of the dense source's, not its function.
    """

    base: Path
    dense: Path
    loss: ExecutorQuality | None = None


def make_graphs(source: Source, texts: Texts, recipe: Recipe, work: Path, original: Source | None = None) -> Graphs:
    """The dense graphs of a recipe's precision and target, each a stage below `work`; none before the one in fp32 is found to be the model.

    `original` is the dense model that `source` was recovered from, where it was: the dense graph in integers is then made of it.
    """
    base, asked = _float_graph(source, texts, recipe, work), recipe.export
    if PRECISIONS[asked.precision].bits is None:
        return Graphs(base, base)
    model, plain = (source, base) if original is None else (original, _float_graph(original, texts, recipe, work / "original"))
    parent = read_header(plain)
    assert parent is not None
    dense, header = work / "dense", Header(format="dense", parents={"base": parent.fingerprint}, config=asked.model_dump(mode="json"))
    if not is_finished(dense, header):
        with stage("base graph"), atomic_folder(dense) as partial:
            export_dense(plain, partial, asked.precision, asked.target)
            write_header(partial, header)
    else:
        resumed("base graph")
    if model.swaps:
        return Graphs(base, dense)
    folder, header = work / "quality_dense", Header(format="quality", parents={"onnx": header.fingerprint}, calibration=texts.heldout.sha256)
    if not is_finished(folder, header):
        with stage("quality"), atomic_folder(folder) as partial:
            windows = None if recipe.budget.bounded else DENSE_WINDOWS
            found = measure_shipped(dense, load_stock(model.folder), texts.heldout, asked, count=windows)
            write_json(partial / "quality.json", {} if found is None else found.model_dump())
            write_header(partial, header)
    else:
        resumed("quality")
    return Graphs(base, dense, _quality(read_json(folder / "quality.json", "The measured quality")))


def _float_graph(source: Source, texts: Texts, recipe: Recipe, work: Path) -> Path:
    """A model's graph in floats for the recipe's target."""
    base, asked = make_base(source, texts, work), recipe.export
    if asked.target == "cpu":
        return base
    form = PRECISIONS[asked.precision]
    base, header = work / "base_cuda", Header(format="base", parents={"model": source.fingerprint}, config={"precision": form.cuda, "target": "cuda"})
    if not is_finished(base, header):
        with stage("base graph"), atomic_folder(base) as partial:
            build_base(source.folder, partial, form.cuda, "cuda")
            write_header(partial, header)
    else:
        resumed("base graph")
    return base


def _quality(stored: dict[str, Any]) -> ExecutorQuality | None:
    return ExecutorQuality(**stored) if stored else None


def room(recipe: Recipe, graphs: Graphs) -> Recipe:
    """The recipe with what its precision leaves of its budget. Raises InputError when the dense graph in that precision already breaks it."""
    loss, budget = graphs.loss, recipe.budget
    if loss is None or not budget.bounded:
        return recipe
    rise, left = math.exp(loss.nll - loss.nll_torch) - 1, {}
    if budget.max_ppl_increase is not None:
        left["max_ppl_increase"] = (1 + budget.max_ppl_increase) / (1 + max(rise, 0.0)) - 1
    if budget.max_kl is not None:
        left["max_kl"] = budget.max_kl - max(loss.kl, 0.0)
    if not all(value > 0 for value in left.values()):
        asked = ", ".join(f"{name} {getattr(budget, name):.3g}" for name in left)
        raise InputError(
            f"The budget must leave room for {recipe.export.precision}, in which the dense graph alone raises perplexity by {rise:.1%} and has KL "
            f"{loss.kl:.3g}, got {asked}. Loosen it, or choose a precision of more bits."
        )
    return recipe.model_copy(update={"budget": budget.model_copy(update=left)})


def measure(
    source: Source,
    plans: Mapping[str, Plan],
    sparsities: Mapping[str, float | None],
    texts: Texts,
    recipe: Recipe,
    work: Path,
    original: Source | None = None,
) -> list[Candidate]:
    """The held-out quality of every plan, each a stage below `work`, and whether it keeps the budget and the asked density. What is not there yet is measured
    together.

    Dense is `original`, the model that `source` was recovered from, where it was.
    """
    stages: dict[str, tuple[Path, Header]] = {}
    for name in plans:
        parent = read_header(work / "plan" / name)
        assert parent is not None
        stages[name] = (work / "quality" / name, Header(format="quality", parents={"plan": parent.fingerprint}, calibration=texts.heldout.sha256))
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
    candidates: list[Candidate], source: Source, texts: Texts, graphs: Graphs, recipe: Recipe, work: Path, original: Source | None = None
) -> tuple[Candidate, list[Candidate]]:
    """The best candidate, exported and checked, and all of them with it in its place: what a training ended with, else the cheapest one where a budget was
    searched, else the one with the least KL to dense. One whose executors disagree is passed over.

    Raises InputError with the failed checks when none passes.
    """
    order = sorted(candidates, key=lambda c: (c.method != TUNED, (c.quality.block_cost or c.quality.cost) if recipe.searches else c.quality.kl))
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
    return [f"{c.method}: {check.name} {check.value:.3g} against {check.bound:.3g} {check.note}" for c in candidates for check in c.checks if not check.passed]


def _exported(candidate: Candidate, source: Source, texts: Texts, graphs: Graphs, recipe: Recipe, work: Path, original: Source | None) -> Candidate:
    """The candidate with checkpoint, ONNX folder, checks of its executors and speed, each a stage below `work`."""
    name, asked = candidate.method, recipe.export
    with stage("export"):
        folder = checkpoint(source, candidate.plan, name, work, work / "plan" / name)
        parent = read_header(folder)
        assert parent is not None
        onnx, header = work / "onnx" / name, Header(format="onnx", parents={"checkpoint": parent.fingerprint}, config=asked.model_dump(mode="json"))
        if is_finished(onnx, header):
            resumed()
        else:
            with atomic_folder(onnx) as partial:
                export(graphs.base, candidate.plan, source.arch, source.config, partial, asked.precision, asked.target)
                write_header(partial, header)
    measured, header = work / "measured" / name, Header(format="measured", parents={"onnx": header.fingerprint}, calibration=texts.heldout.sha256)
    stored = _agreed(measured, header)
    if stored is not None:
        resumed("agreement")
        resumed("speed")
    else:
        with stage("agreement"):
            model, dense = load(folder), _load(original)
            found = measure_shipped(onnx, model, texts.heldout, asked, original=dense, known=candidate.quality)
            checks = [*check_onnx(onnx, model, candidate.plan, texts.heldout, asked), check_text(onnx)]
        agree = all(check.passed for check in checks)
        speed = {} if not agree or (asked.target == "cuda" and not has_cuda()) else _speed(graphs.dense, onnx, texts)
        shipped = {} if found is None else found.model_dump()
        stored = {"checks": [check.model_dump() for check in checks], "speed": speed, "shipped": shipped}
        if agree:
            with atomic_folder(measured) as partial:
                write_json(partial / _MEASURED, stored)
                write_header(partial, header)
    checks, shipped = [Check(**row) for row in stored["checks"]] + candidate.checks, _quality(stored.get("shipped", {}))
    if shipped is not None:
        budget = recipe.budget.model_dump() | {"searched": recipe.searches}
        checks += shipped_checks(shipped, candidate.quality, budget, asked.precision)
    return replace(candidate, checkpoint=folder, onnx=onnx, checks=checks, shipped=shipped, speed=stored["speed"])


def _agreed(measured: Path, header: Header) -> dict[str, Any] | None:
    """What was measured of an ONNX folder whose executors agreed. None where nothing was, or where they did not: another version may judge otherwise."""
    if not is_finished(measured, header):
        return None
    stored = read_json(measured / _MEASURED, "The measurement")
    return stored if all(row["passed"] for row in stored["checks"]) else None


@stage("speed")
def _speed(base: Path, onnx: Path, texts: Texts) -> dict[str, Any]:
    """Tokens per second of a candidate and of the dense graph, back to back; an empty dict where the machine was too busy to measure."""
    length = texts.heldout.tokens.shape[1]
    prompt = texts.heldout.tokens[0, : min(128, length // 2)].tolist()
    try:
        return bench(
            base, onnx, prompt=prompt, new_tokens=min(64, length - len(prompt) - 1), pairs=SPEED_PAIRS, command="sparsegate convert",
            progress=lambda done: update(done, SPEED_PAIRS, unit="pair"),
        )  # fmt: skip
    except ValueError as error:
        log.warning("Speed was not measured: %s", error)
        return {}

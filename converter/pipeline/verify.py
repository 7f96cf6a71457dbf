"""verify: integrity, equality of executors and the quality budget of a checkpoint."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...runtime_onnx.errors import InputError
from ..checkpoint.listing import unlisted
from ..checkpoint.manifest import MANIFEST, Manifest, check_files, read_manifest
from ..checkpoint.plan import Exact, Plan
from ..checkpoint.source import Source, open_source
from ..checkpoint.stage import hash_file
from ..evaluation.agreement import check_onnx, measure_shipped
from ..evaluation.checks import (
    Check,
    ExecutorQuality,
    Quality,
    Verification,
    check_budget,
    check_record,
    check_source,
    check_text,
    read_plan,
    shipped_checks,
)
from ..evaluation.long_context import measure_long
from ..evaluation.quality import measure_quality
from ..modeling.gated import load as load_folder
from ..modeling.gated import load_dense
from ..progress import job, stage
from ..sources.hub import home_folder, local_folder
from ..sources.named import resolve
from ..text.windows import Batches
from .recipe import Budget, Recipe, make_recipe, training_stages
from .texts import EARLIER_WINDOWS, LONG, make_heldout, make_long

log = logging.getLogger("sparsegate")


def _counted(name: str, wrong: list[str], right: str) -> Check:
    """The check that nothing is wrong; `right` is said then."""
    return Check(name=name, value=len(wrong), bound=0, passed=not wrong, note="; ".join(wrong[:3]) or right)


@dataclass(frozen=True)
class _VerifyInputs:
    """What is verified: folder, manifest, plan, model, held-out windows, and the dense model that it was made from,
    where that is given. `own_text` where the windows are of the text that its quality is recorded on. `long` are
    windows for a budget on long context, None without one.
    """

    folder: Path
    manifest: Manifest
    recipe: Recipe
    plan: Plan
    model: Any
    heldout: Batches
    source: Source | None
    own_text: bool
    long: Batches | None = None

    @property
    def recovered(self) -> bool:
        """Whether the weights were trained."""
        return self.manifest.updated or bool(training_stages(self.recipe))

    @cached_property
    def reference_model(self) -> Any | None:
        """The dense model to compare with, where it is not the checkpoint's own ungated one."""
        return load_dense(self.source.folder) if self.recovered and self.source is not None else None


@job()
def verify(model: str | Path, source: str | Path | None = None, calibration: str | Path | None = None) -> Verification:
    """Check a checkpoint: files against the manifest, dense weights against `source`, quality against budget and
    record, executors against each other.

    A checkpoint made with a text of its own is measured on that text when it is given as `calibration`, else on the one
    that comes with sparsegate. Speed is never judged. Raises InputError when the folder is no sparse checkpoint.
    """
    with stage("open"):
        opened = _opened(model, source, calibration)
        checks, reference = _written(opened), opened.reference_model
    folder, sparse, plan, heldout = opened.folder / "onnx", opened.model, opened.plan, opened.heldout
    settings = opened.recipe.export
    with stage("quality"):
        quality = measure_quality(sparse, plan, heldout, reference_model=reference, error=0.0, most=heldout.count)
        if opened.long is not None:
            quality = quality.with_long(measure_long(sparse, opened.long, reference))
    if opened.source is not None:
        rotated = opened.recipe.rotate or opened.manifest.rotated
        checks.append(check_source(sparse, opened.source.folder, heldout, trained=opened.recovered, rotated=rotated))
    with stage("agreement"):
        shipped = measure_shipped(folder, sparse, heldout, settings, reference_model=reference, known=quality)
        checks += [*check_onnx(folder, sparse, plan, heldout, settings), check_text(folder)]
    if opened.recovered and reference is None:
        quality, shipped = _as_recorded(opened.manifest, quality, shipped)
    checks += _within_budget(opened, quality, shipped)
    return Verification(quality=quality, checks=checks, shipped=shipped)


def _opened(model: str | Path, source: str | Path | None, calibration: str | Path | None) -> _VerifyInputs:
    folder = local_folder(model)
    if not folder.is_dir():
        raise InputError(
            f"DIR must be a sparse checkpoint or a Hub id, got {str(model)!r}, which is neither. Check the spelling."
        )
    manifest = read_manifest(folder)
    dense_source = None if source is None else resolve(str(source), home_folder("dense", str(source)))
    plan, sparse = read_plan(folder), load_folder(folder)
    recipe = make_recipe(manifest.recipe, f"{MANIFEST}'s recipe")
    wanted = manifest.calibration.get("file")
    if calibration is not None and (not Path(calibration).is_file() or hash_file(Path(calibration)) != wanted):
        raise InputError(
            f"--calibration must be the text that the checkpoint was made with, got {calibration}. Give that file, "
            "or none."
        )
    if calibration is None and wanted is not None:
        log.warning(
            "Quality is measured on the text that comes with sparsegate; give the checkpoint's own with "
            "--calibration FILE."
        )
    text = None if calibration is None else str(calibration)
    recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"file": text})})
    windows = int(manifest.measured.get("windows", EARLIER_WINDOWS[recipe.searches]))
    opened = open_source(folder, sparse=True)
    heldout = make_heldout(opened, recipe, windows)
    own_text = calibration is not None or wanted is None
    comparable = source is not None or not training_stages(recipe)  # else the record's numbers are taken
    bounded = own_text and comparable and recipe.budget.max_kl_long is not None
    count, length = (int(manifest.measured.get(f"long_{name}", most)) for name, most in LONG.items())
    long = make_long(opened, recipe, count, length) if bounded else None
    return _VerifyInputs(folder, manifest, recipe, plan, sparse, heldout, dense_source, own_text, long)


def _written(opened: _VerifyInputs) -> list[Check]:
    """Whether the files are as they were written, and the manifest is one of its own recipe."""
    folder, manifest = opened.folder, opened.manifest
    exact = all(isinstance(entry.gate, Exact) for entry in opened.plan.values())
    wrong = check_files(folder, manifest) + unlisted(folder, manifest)
    return [
        _counted("files", wrong, f"{len(manifest.files)} files as written"),
        _counted("manifest", contradictions(manifest, exact), "judged by its own recipe"),
    ]


def _as_recorded(
    manifest: Manifest, quality: Quality, shipped: ExecutorQuality | None
) -> tuple[Quality, ExecutorQuality | None]:
    """What compares with a dense model that is not there, as the manifest has it."""
    log.warning(
        "The weights were trained: NLL is measured, and what compares with the dense model is the record's. Give "
        "that model with --source MODEL."
    )
    names = ("nll_dense", "kl", "agreement")
    quality = quality.model_copy(update={name: manifest.measured.get(name, math.nan) for name in names})
    quality = quality.model_copy(update={"kl_long": manifest.measured.get("kl_long")})
    if shipped is not None:
        recorded = {name: manifest.measured.get(f"onnx_{name}", math.nan) for name in names[1:]}
        shipped = shipped.model_copy(update=recorded)
    return quality, shipped


def _within_budget(opened: _VerifyInputs, quality: Quality, shipped: ExecutorQuality | None) -> list[Check]:
    """Quality against budget and record, on the text that they hold on."""
    if not opened.own_text:
        note = "not judged: it holds on the checkpoint's own text (--calibration FILE)"
        return [Check(name="budget", value=0, bound=0, passed=True, note=note)]
    manifest = opened.manifest
    checks = check_budget(quality, manifest.budget) + check_record(quality, manifest.measured, shipped)
    if shipped is not None:
        checks += shipped_checks(shipped, quality, manifest.budget, opened.recipe.export.precision)
    return checks


_ALWAYS = ("nll_dense", "nll", "kl", "agreement", "density", "cost")


def contradictions(manifest: Manifest, exact: bool = False) -> list[str]:
    """What of a manifest does not follow from its own recipe, one line each: the budget that results are judged by, the
    seed, the precision.

    Where zeros decide (`exact`) or weights were trained, no share to skip was asked for. Raises InputError for a recipe
    that is none.
    """
    recipe = make_recipe(manifest.recipe, f"The recipe of {MANIFEST}")
    wrong = [f"measured lacks {name}" for name in _ALWAYS if name not in manifest.measured]
    expected: dict[str, Any] = {name: getattr(recipe.budget, name) for name in Budget.model_fields}
    expected["searched"] = recipe.searches
    if "sparsity" in recipe.stages[-1].config and not exact and not any(stage.tune for stage in recipe.stages):
        expected["sparsity"] = recipe.stages[-1].config["sparsity"]
    wrong += [
        f"budget.{name} is {manifest.budget.get(name)}, {value} in the recipe"
        for name, value in expected.items()
        if manifest.budget.get(name) != value
    ]
    if manifest.seed != recipe.seed:
        wrong.append(f"seed is {manifest.seed}, {recipe.seed} in the recipe")
    export = recipe.export.model_dump()
    wrong += [
        f"onnx.{name} is {manifest.onnx[name]}, {value} in the recipe"
        for name, value in export.items()
        if manifest.onnx.get(name, value) != value
    ]
    return wrong

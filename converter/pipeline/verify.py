"""verify: integrity, equality of executors and the quality budget of a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

from ...runtime_onnx.errors import InputError
from ..checkpoint.listing import unlisted
from ..checkpoint.manifest import MANIFEST, Manifest, check_files, read_manifest
from ..checkpoint.plan import deciding, score_of
from ..checkpoint.source import open_source
from ..checkpoint.stage import hash_file
from ..evaluation.agreement import check_onnx, measure_shipped
from ..evaluation.checks import (
    Check,
    Verification,
    check_budget,
    check_record,
    check_source,
    check_text,
    read_plan,
    shipped_checks,
)
from ..evaluation.quality import measure_quality
from ..modeling.gated import load as load_folder
from ..modeling.gated import load_dense
from ..progress import job, stage
from ..sources.hub import home_folder, local_folder
from ..sources.named import resolve
from .convert import log
from .recipe import make_recipe, training_stages
from .texts import EARLIER_WINDOWS, make_heldout


def _counted(name: str, wrong: list[str], right: str) -> Check:
    """The check that nothing is wrong; `right` is said then."""
    return Check(name=name, value=len(wrong), bound=0, passed=not wrong, note="; ".join(wrong[:3]) or right)


@job()
def verify(model: str | Path, source: str | Path | None = None, calibration: str | Path | None = None) -> Verification:
    """Check a checkpoint: files against the manifest, dense weights against `source`, quality against budget and
    record, executors against each other.

    A checkpoint made with a text of its own is measured on that text when it is given as `calibration`, else on the one
    that comes with sparsegate. Speed is never judged. Raises InputError when the folder is no sparse checkpoint.
    """
    with stage("open"):
        folder = local_folder(model)
        if not folder.is_dir():
            raise InputError(
                f"DIR must be a sparse checkpoint or a Hub id, got {str(model)!r}, which is neither. Check the "
                "spelling."
            )
        manifest = read_manifest(folder)
        original = None if source is None else resolve(str(source), home_folder("dense", str(source)))
        plan = read_plan(folder)
        exact = all(score_of(deciding(entries)) == "exact" for entries in plan.values())
        checks = [
            _counted(
                "files",
                check_files(folder, manifest) + unlisted(folder, manifest),
                f"{len(manifest.files)} files as written",
            ),
            _counted("manifest", contradictions(manifest, exact), "judged by its own recipe"),
        ]
        sparse = load_folder(folder)
        opened = open_source(folder, sparse=True)
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
        heldout = make_heldout(opened, recipe, int(manifest.measured.get("windows", EARLIER_WINDOWS[recipe.searches])))
        recovered, dense = bool(training_stages(recipe)), None
        if recovered and original is not None:
            dense = load_dense(original.folder)
    with stage("quality"):
        quality = measure_quality(sparse, plan, heldout, reference_model=dense, error=0.0, most=heldout.count)
    if original is not None:
        checks.append(check_source(sparse, original.folder, heldout, trained=recovered))
    asked = recipe.export
    with stage("agreement"):
        shipped = measure_shipped(folder / "onnx", sparse, heldout, asked, reference_model=dense, known=quality)
        checks += [*check_onnx(folder / "onnx", sparse, plan, heldout, asked), check_text(folder / "onnx")]
    if recovered and dense is None:
        log.warning(
            "The weights were trained: NLL is measured, and what compares with the dense model is the record's. Give "
            "that model with --source MODEL."
        )
        recorded = {
            name: manifest.measured.get(name, math.nan)
            for name in ("nll_dense", "kl", "agreement", "onnx_kl", "onnx_agreement")
        }
        quality = quality.model_copy(update={name: recorded[name] for name in ("nll_dense", "kl", "agreement")})
        shipped = (
            None
            if shipped is None
            else shipped.model_copy(update={name: recorded[f"onnx_{name}"] for name in ("kl", "agreement")})
        )
    if calibration is not None or wanted is None:
        checks += check_budget(quality, manifest.budget) + check_record(quality, manifest.measured, shipped)
        checks += [] if shipped is None else shipped_checks(shipped, quality, manifest.budget, asked.precision)
    else:
        checks.append(
            Check(
                name="budget",
                value=0,
                bound=0,
                passed=True,
                note="not judged: it holds on the checkpoint's own text (--calibration FILE)",
            )
        )
    return Verification(quality=quality, checks=checks, shipped=shipped)


_ALWAYS = ("nll_dense", "nll", "kl", "agreement", "density", "cost")


def contradictions(manifest: Manifest, exact: bool = False) -> list[str]:
    """What of a manifest does not follow from its own recipe, one line each: the budget that results are judged by, the
    seed, the precision.

    Where zeros decide (`exact`) or weights were trained, no share to skip was asked for. Raises InputError for a recipe
    that is none.
    """
    recipe = make_recipe(manifest.recipe, f"The recipe of {MANIFEST}")
    wrong = [f"measured lacks {name}" for name in _ALWAYS if name not in manifest.measured]
    expected = {**recipe.budget.model_dump(), "searched": recipe.searches}
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

"""Rows of the benchmark of budgets as files: exported, compared executor by executor, measured in their own precision
and timed beside the dense model in the same one.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.budgets_plans import load_made, stored_header
from benchmarks.budgets_study import ROWS, Study
from records.budgets_results import DenseFile, Shipped
from sparsegate.converter.checkpoint.plan import VERSION, save_plan
from sparsegate.converter.checkpoint.stage import Header, atomic_folder, is_finished, write_header, write_json
from sparsegate.converter.evaluation.checks import ExecutorQuality
from sparsegate.converter.onnx_export.precision import PRECISIONS
from sparsegate.converter.pipeline.candidates import choose, measure
from sparsegate.converter.pipeline.conversion import Conversion
from sparsegate.converter.pipeline.graphs import make_graphs
from sparsegate.converter.pipeline.recipe import Recipe
from sparsegate.converter.pipeline.schedule import made_by
from sparsegate.converter.pipeline.texts import Texts
from sparsegate.converter.training.plans import WEIGHTS
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.untrusted import read_json

_FILE = "shipped.json"


def ship(study: Study, name: str, share: float, precision: str) -> None:
    """Make and measure a row's file in a precision, a stage. Raises InputError for a row that is not made, CheckError
    where executors differ.
    """
    folder, header = _stage(study, name, share, precision)
    if is_finished(folder, header):
        return
    found = _shipped(study, name, share, precision)
    with atomic_folder(folder) as partial:
        write_json(partial / _FILE, found.model_dump(mode="json"))
        write_header(partial, header)


def all_shipped(study: Study) -> list[Shipped]:
    """What was measured of the files of rows as they are made now."""
    found = []
    for name in ROWS:
        for share in study.densities(name):
            for precision in PRECISIONS:
                folder, header = _stage(study, name, share, precision)
                if header.parents["row"] and is_finished(folder, header):
                    found.append(Shipped.model_validate(read_json(folder / _FILE, "What a file loses")))
    return found


def _stage(study: Study, name: str, share: float, precision: str) -> tuple[Path, Header]:
    row = stored_header(study, name, share)
    judge = next(iter(study.judges.values())).sha256
    header = Header(
        format="shipped",
        parents={"row": "" if row is None else row.fingerprint},
        config={"precision": precision},
        calibration=judge,
    )
    return _folder(study, name, share) / f"{precision}-shipped", header


def _folder(study: Study, name: str, share: float) -> Path:
    return study.work / "exports" / f"{name.replace(' ', '_')}-{share:g}"


def _shipped(study: Study, name: str, share: float, precision: str) -> Shipped:
    conversion, method = _conversion(study, name, share, precision), ROWS[name].method
    graphs = make_graphs(conversion)
    candidates = measure(conversion, {method: made_by(conversion, method)}, {method: None})
    chosen, _ = choose(conversion, candidates, graphs)
    file, speed, dense = chosen.shipped, chosen.speed, graphs.loss
    quality = chosen.quality if file is None else file
    return Shipped(
        name=name,
        share=share,
        precision=precision,
        tokens=quality.tokens,
        rise=quality.nll - (chosen.quality.nll_dense if quality.nll_dense is None else quality.nll_dense),
        rise_error=quality.nll_error,
        kl=quality.kl,
        agreement=quality.agreement,
        dense=None if dense is None else _dense_file(dense),
        checks=[check.model_dump(mode="json") for check in chosen.checks],
        decode_ratio=_ratio(speed, "decode"),
        prefill_ratio=_ratio(speed, "prefill"),
        pairs=speed["decode"]["pairs"] if speed else 0,
        quiet=bool(speed.get("quiet")),
    )


def _dense_file(loss: ExecutorQuality) -> DenseFile:
    return DenseFile(tokens=loss.tokens, rise=loss.nll - loss.nll_torch, rise_error=loss.nll_error, kl=loss.kl)


def _ratio(speed: dict[str, Any], part: str) -> float | None:
    return speed[part]["ratio"] if speed else None


def _conversion(study: Study, name: str, share: float, precision: str) -> Conversion:
    """The conversion whose only plan is the row's, on the text that is measured first."""
    dense, study = study.source, study.of(name)
    header = stored_header(study, name, share)
    if header is None:
        raise InputError(f"--export must name a row that is made, got {name} at {share:g}. Make it first.")
    heldout = next(iter(study.judges.values()))
    texts = Texts(study.calibration, study.calibration, heldout, None, study.texts[0].name)
    recipe = Recipe(model=study.source.name, seed=study.sizes.seed)
    export = recipe.export.model_copy(update={"precision": precision})
    recovered_from = None if study.source.fingerprint == dense.fingerprint else dense
    recipe = recipe.model_copy(update={"export": export})
    conversion = Conversion(
        study.source, texts, recipe, _folder(study, name, share) / precision, recovered_from=recovered_from
    )
    _keep_plan(conversion, study, name, share, header)
    return conversion


def _keep_plan(conversion: Conversion, study: Study, name: str, share: float, row: Header) -> None:
    """The row's plan and weights as the stage that a conversion goes on from."""
    folder = conversion.work / "plan" / ROWS[name].method
    header = Header(format="plan", version=VERSION, parents={"row": row.fingerprint}, seed=row.seed)
    if is_finished(folder, header):
        return
    plan, weights = load_made(study, name, share)
    with atomic_folder(folder) as partial:
        if weights is not None:
            shutil.copyfile(weights, partial / WEIGHTS)
        save_plan(partial, plan, header)

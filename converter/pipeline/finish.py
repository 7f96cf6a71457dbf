"""The last step of a conversion: OUT is put together and pushed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ...runtime_onnx.library import variants
from ..checkpoint.manifest import Manifest, installed_versions, list_files, write_manifest
from ..checkpoint.stage import atomic_folder, hash_file, listed_files, write_json
from ..evaluation.checks import ExecutorQuality, Quality
from ..evaluation.records import Report
from ..evaluation.recovery_record import RECOVERY
from ..report.card import read_base_card
from ..report.html import write_report
from .candidates import Candidate
from .conversion import Conversion
from .order import Opened, Order
from .push import push

MEASURED = ("nll_dense", "nll", "kl", "agreement", "density", "cost", "nll_error", "windows")
"""What the manifest records of the quality."""


def write_out(order: Order, opened: Opened, conversion: Conversion, chosen: Candidate, report: Report) -> None:
    """Assemble OUT from the chosen candidate's stages, report and card; the manifest is written last and one rename
    makes OUT appear.
    """
    source, recipe, texts, quality = conversion.reference, conversion.recipe, conversion.texts, chosen.quality
    with atomic_folder(order.out, new=True) as partial:
        assert chosen.checkpoint is not None and chosen.onnx is not None
        _place(chosen.checkpoint, partial, order.keep_stages)
        (partial / "onnx").mkdir()
        _place(chosen.onnx, partial / "onnx", order.keep_stages)
        if opened.record is not None:
            (partial / RECOVERY).parent.mkdir(exist_ok=True)
            write_json(partial / RECOVERY, opened.record.model_dump(mode="json"))
        write_report(partial, report, read_base_card(source.folder, source.id, source.revision), order.push_to)
        manifest = Manifest(
            fingerprint=opened.fingerprint,
            source={"id": source.id, "revision": source.revision, "fingerprint": source.fingerprint},
            calibration={
                "sha256": texts.calibration.sha256,
                "tokens": texts.calibration.count,
                "file": None if recipe.calibration.file is None else hash_file(Path(recipe.calibration.file)),
            },
            recipe=report.recipe,
            seed=recipe.seed,
            budget=recipe.budget.model_dump() | {"sparsity": chosen.sparsity, "searched": recipe.searches},
            measured={name: getattr(quality, name) for name in MEASURED}
            | _long_measured(quality)
            | _onnx_measured(chosen.shipped),
            updated=report.updated,
            rotated=report.rotated,
            onnx={**recipe.export.model_dump(mode="json"), "variants": variants(chosen.onnx)},
            versions=installed_versions(),
            files=list_files(partial),
        )
        write_manifest(partial, manifest)


def _long_measured(quality: Quality) -> dict[str, float]:
    long = quality.long
    return {} if long is None else {"kl_long": long.far.kl, "long_windows": long.windows, "long_length": long.length}


def _onnx_measured(shipped: ExecutorQuality | None) -> dict[str, float]:
    return {} if shipped is None else {f"onnx_{name}": getattr(shipped, name) for name in ("nll", "kl", "agreement")}


def _place(stage: Path, folder: Path, keep: bool) -> None:
    """Put a stage's files into `folder`. The stage stays whole, so that an interruption costs nothing; without `keep`
    it goes soon and hard links do.
    """
    for name in listed_files(stage) or {}:  # and nothing that came there since
        path, target = stage / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            (shutil.copyfile if keep else os.link)(path, target)
        except OSError:
            if keep:
                raise
            shutil.copyfile(path, target)  # a file system without hard links


def pushed(order: Order) -> str | None:
    """The URL that OUT was pushed to, None where it was not to be pushed."""
    if not order.push_to:
        return None
    return push(order.out, order.push_to, private=not order.public)

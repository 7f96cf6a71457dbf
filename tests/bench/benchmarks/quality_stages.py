"""What plans lose on windows, each quality a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from records.model_results import Loss
from sparsegate.converter.checkpoint.stage import Header, atomic_folder, write_header, write_json
from sparsegate.converter.evaluation.checks import Quality
from sparsegate.converter.text.windows import Batches
from sparsegate.runtime_onnx.untrusted import read_json

_FILE = "quality.json"


def quality_header(plan: dict[str, str], batches: Batches) -> Header:
    """The header of a quality on windows; `plan` is the fingerprint of the plan's stage by what it is called."""
    return Header(format="quality", parents=plan, calibration=batches.sha256)


def store_quality(folder: Path, header: Header, quality: Quality) -> None:
    """Store a quality as a stage."""
    with atomic_folder(folder) as partial:
        write_json(partial / _FILE, quality.model_dump(mode="json"))
        write_header(partial, header)


def load_quality(folder: Path) -> Quality:
    """A stored quality."""
    return Quality.model_validate(read_json(folder / _FILE, "A stored quality"))


def loss_fields(quality: Quality) -> dict[str, Any]:
    """What a record says of a quality, as fields of `Loss`."""
    return quality.model_dump(include=set(Loss.model_fields))

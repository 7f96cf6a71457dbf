"""export: a model with predictors as another system's file."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from pydantic import BaseModel
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ..checkpoint.plan import Plan, Predictor
from ..checkpoint.source import Source, open_source
from ..checkpoint.sparsity import TENSORS, read_sparsity
from ..checkpoint.work_folder import check_out
from ..progress import job, stage
from ..sources.gpu_split import SIDE_FILE
from ..sources.named import resolve
from ..sources.powerinfer import check_powerinfer, write_powerinfer
from ..sources.predictors import NEEDS, kept_units, predictors_beside
from ..stats.collect import collect
from .recipe import Flags, compile_recipe
from .texts import make_texts

FORMATS = {"powerinfer": write_powerinfer}
PRECISIONS = ("fp16", "fp32")
_GIB, _MOST = 1 << 30, 1 << 20


class Exported(BaseModel):
    """What was written: the file, its format and bytes, and the side file that places neurons on a GPU."""

    output: str
    format: str
    bytes: int
    side_file: str | None = None


@job()
def export(
    folder: str | Path,
    output: str | Path,
    format: str = "powerinfer",
    precision: str = "fp16",
    vram_budget: float | None = None,
    calibration: str | Path | None = None,
) -> Exported:
    """Write a sparse checkpoint whose every layer has a predictor, or a model folder with predictors beside its
    weights, as the new file `output`.

    With `vram_budget` in GiB the side file says which neurons live on the GPU: those that the predictors keep most on
    `calibration`, a text (None: Python source). Raises InputError for what the format cannot hold; nothing is written
    then.
    """
    folder, output = Path(folder), Path(output)
    if format not in FORMATS:
        raise InputError(f"--format must be {' or '.join(FORMATS)}, got {format!r:.100}. Correct it.")
    if precision not in PRECISIONS:
        raise InputError(f"--precision must be {' or '.join(PRECISIONS)}, got {precision!r:.100}. Correct it.")
    if vram_budget is not None and not 0 < vram_budget <= _MOST:
        raise InputError(f"--vram-budget must be above 0 GiB and at most {_MOST}, got {vram_budget}. Correct it.")
    if calibration is not None and vram_budget is None:
        raise InputError("--calibration must be given with --vram-budget, got it alone. Leave it out, or give both.")
    if not folder.is_dir():
        raise InputError(f"DIR must be a folder, got {str(folder)!r}, which is none. Check the spelling.")
    check_out(output)
    if output.exists() or not output.absolute().parent.is_dir():
        what = "which exists" if output.exists() else "in a folder that is not there"
        raise InputError(f"-o must be a new file, got {output}, {what}. Choose another.")
    with TemporaryDirectory() as scratch:
        with stage("open"):
            source, plan = _opened(folder, Path(scratch))
        counts, room = None, None
        if vram_budget is not None:
            check_powerinfer(source, plan)  # before minutes of counting
            counts, room = _counts(source, plan, calibration, Path(scratch)), int(vram_budget * _GIB)
        with stage("export"):
            FORMATS[format](source, plan, output, precision=precision, counts=counts, vram_bytes=room)
    side = None if counts is None else f"{output}{SIDE_FILE}"
    return Exported(output=str(output), format=format, bytes=output.stat().st_size, side_file=side)


def _opened(folder: Path, scratch: Path) -> tuple[Source, Plan]:
    """The model, and the plan of its sparse checkpoint or of the predictors beside its weights."""
    if (folder / TENSORS).is_file():
        return open_source(folder, sparse=True), read_sparsity(folder)[0]
    source = resolve(str(folder.absolute()), scratch / "source")
    return source, predictors_beside(source)


def _counts(source: Source, plan: Plan, calibration: str | Path | None, scratch: Path) -> dict[int, Tensor]:
    """How often the predictors keep each neuron, int64 [n] by layer, on samples of a calibration text."""
    recipe = compile_recipe(Flags(str(source.folder), calibration=calibration))
    with stage("text"):
        texts = make_texts(source, recipe, work=scratch)
    with stage("calibrate"), torch.no_grad():
        stats = collect(source, texts.calibration, list(NEEDS), scratch / "stats", recipe.seed)
        predictors = {site: entry.gate for site, entry in plan.items()}
        return {
            site.layer: kept_units(predictor, stats[site][f"{NEEDS[0]}.x"].float()).sum(0)
            for site, predictor in predictors.items()
            if isinstance(predictor, Predictor)
        }

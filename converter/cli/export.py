"""`sparsegate export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import Quiet, Verbose


def export(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Sparse checkpoint or model folder with a predictor in every layer.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new file.")],
    format: Annotated[str, typer.Option(help="powerinfer: PowerInfer's GGUF.")] = "powerinfer",
    precision: Annotated[str, typer.Option(help="Of the matrices: fp16 or fp32.")] = "fp16",
    vram_budget: Annotated[
        float | None,
        typer.Option(
            help="GiB of GPU memory for neurons; OUTPUT.generated.gpuidx then says which ones, by how often they are "
            "kept.",
            metavar="GIB",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text, .jsonl or .parquet that neurons are counted on. Default: Python source."),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Write the file and say where it lies."""
    from ..pipeline.export import export as run
    from . import output as show

    with show.telling(quiet, verbose):
        result = run(folder, output, format, precision, vram_budget, calibration)
    show.exported(result, json)
    return 0

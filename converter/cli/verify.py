"""`sparsegate verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import Quiet, Verbose


def verify(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Sparse checkpoint or Hub id.")],
    source: Annotated[
        str | None,
        typer.Option(
            help="The dense model to compare with: a folder or Hub id. Default: the checkpoint's own dense weights."
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="The text that the checkpoint was made with, where it was not the bundled one.")
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Check and print one line a check; status 1 when one fails."""
    from ..pipeline.verify import verify as run
    from . import output as show

    with show.telling(quiet, verbose):
        result = run(model, source, calibration)
    show.verification(result, json)
    return 0 if result.passed else 1

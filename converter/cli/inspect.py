"""`sparsegate inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import Quiet, Verbose


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Model folder, PowerInfer file or Hub id; of the latter only headers are fetched."
        ),
    ],
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Print what the model is, whether it can be converted and what that needs; status 1 when it cannot."""
    from ..pipeline.inspect import inspect as run
    from . import output as show

    with show.telling(quiet, verbose):
        result = run(model)
    show.inspection(result, json)
    return 0 if result.convertible else 1

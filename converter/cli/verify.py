"""`sparsegate verify`."""

from __future__ import annotations

from typing import Annotated

import typer


def verify(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Sparse checkpoint or Hub id.")],
    source: Annotated[
        str | None, typer.Option(help="The dense model to compare with: a folder or Hub id. Default: the checkpoint's own dense weights.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Check and print one line a check; status 1 when one fails."""
    from ..conversion import verify as run
    from . import output as show

    result = run(model, source)
    show.verification(result, json)
    return 0 if result.passed else 1

"""`sparsegate doctor`."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False) -> int:
    """Print the state of the installation; status 1 when something needed is missing."""
    from ..pipeline.doctor import diagnose
    from . import output as show

    result = diagnose()
    show.diagnosis(result, json)
    return 0 if not result.remedies else 1

"""`sparsegate report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Sparse checkpoint.")]) -> int:
    """Write the page and its pictures and print where the page lies."""
    from ..report.html import make_report

    print(f"wrote {make_report(folder)}")
    return 0

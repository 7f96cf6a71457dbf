"""`sparsegate unlink`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def unlink(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Sparse checkpoint or ONNX folder.")]) -> int:
    """Unlink and say whether there was something to undo."""
    from ...runtime_onnx.link import unlink as run

    print(f"unlinked {folder}" if run(folder) else f"{folder} was not linked")
    return 0

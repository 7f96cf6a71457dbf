"""`sparsegate link`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def link(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Sparse checkpoint or ONNX folder.")]) -> int:
    """Link and say where the library lies."""
    from ...runtime_onnx import link as run

    print(f"linked {run(folder)}; onnxruntime-genai in every language now uses it")
    return 0

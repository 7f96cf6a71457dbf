"""`sparsegate push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Sparse checkpoint.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Hub repository, owner/name.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
) -> int:
    """Upload and print the URL."""
    from ..hub import push as run

    print(run(folder, repository, private=not public))
    return 0

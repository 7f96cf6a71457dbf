"""`sparsegate push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import Quiet, Verbose


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Sparse checkpoint.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Hub repository, owner/name.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Upload and print the URL."""
    from ..pipeline.push import push as run
    from . import output as show

    with show.telling(quiet, verbose):
        url = run(folder, repository, private=not public)
    print(url)
    return 0

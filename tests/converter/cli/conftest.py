"""The command line in this process, and a conversion for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_recipe import WITHOUT_SPEED, Done, call_cli, run_cli, small_recipe


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the command line in this process."""
    return partial(call_cli, capsys)


@pytest.fixture(scope="session")
def conversion_run(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """`convert --json` of a tiny Llama in a process of its own: the folder that it wrote, and the process."""
    folder = tmp_path_factory.mktemp("cli")
    recipe = small_recipe(tiny_model("llama"), folder)
    done = run_cli(
        "convert", "--recipe", recipe, "-o", folder / "out", "--keep-stages", "--json", preamble=WITHOUT_SPEED
    )
    assert done.returncode == 0, done.stderr
    return folder / "out", done


@pytest.fixture(scope="session")
def converted(conversion_run: tuple[Path, Any]) -> Path:
    """A sparse checkpoint; copy it before changing anything in it. The dense graph lies in out.work/base, the recipe
    beside it.
    """
    return conversion_run[0]

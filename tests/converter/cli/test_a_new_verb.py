"""A verb is its file and its row: a toy one is in the help, takes flags, and its mistakes are one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import test_registry
import toys
from small_recipe import Done, one_line

from sparsegate.converter.cli import VERBS

TEXT = '''
"""`sparsegate toy`."""
from typing import Annotated

import typer

from sparsegate.runtime_onnx.errors import InputError


def toy(number: Annotated[int, typer.Argument(help="A number.")], twice: bool = False) -> int:
    """Print a number."""
    if number < 0:
        raise InputError(f"The number must be at least 0, got {number}. Choose a larger one.")
    print(number * (1 + twice))
    return 0 if number else 1
'''


def test_a_file_and_a_row_make_a_verb(
    call: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("toy", "3").status == 2 and "toy" not in call("--help").out
    module = toys.add(monkeypatch, tmp_path, VERBS, TEXT)
    monkeypatch.setitem(VERBS, "toy", (module, "Print a number."))
    test_registry.test_verb("toy")
    assert "Print a number." in call("--help").out
    assert "--twice" in call("toy", "--help").out
    assert call("toy", "3") == Done(0, "3\n", "") and call("toy", "3", "--twice") == Done(0, "6\n", "")
    assert call("toy", "0").status == 1
    assert "The number must be at least 0, got -1" in one_line(call("toy", "--", "-1"))

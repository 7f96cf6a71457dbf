"""A recipe that converts a tiny model of models.py in seconds, and the command line in this process and in one of its
own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import yaml
from models import write_text

from sparsegate.converter.cli import main

WITHOUT_SPEED = (
    "from sparsegate.converter.pipeline import candidates, convert\n"
    "candidates._speed = lambda base, onnx, texts: {}\nconvert.measure_references = lambda *_: []\n"
)
"""Python that leaves out the timing of candidates and the dense models of fewer bits: half of a tiny conversion."""


def small_recipe(model: str | Path, folder: Path, **changes: object) -> Path:
    """Write recipe.yaml and its calibration text into `folder`; `changes` are the recipe's fields."""
    text = write_text(folder)
    values = {
        "version": 1,
        "model": str(model),
        "calibration": {"file": str(text), "windows": 24, "length": 48},
        "seed": 3,
        "stages": [{"method": "gate", "config": {"sparsity": 0.4}}],
    } | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def run_cli(*arguments: str | Path, preamble: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `sparsegate ARGUMENTS` in a new process, after the Python text `preamble`."""
    code = f"{preamble}\nimport sys\nfrom sparsegate.converter.cli import main\nmain(sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", timeout=120, env={**os.environ, **environment}
    )


class Done(NamedTuple):
    """Exit status and streams of a command."""

    status: int
    out: str
    err: str


def call_cli(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Done:
    """Run `sparsegate ARGUMENTS` in this process."""
    capsys.readouterr()
    words = [str(word) for word in arguments]
    with patch.object(sys, "argv", ["sparsegate", *words]), pytest.raises(SystemExit) as stop:
        main(words)
    assert isinstance(stop.value.code, int)
    return Done(stop.value.code, *capsys.readouterr())


def one_line(done: Done) -> str:
    """The single line on stderr of a user's mistake; nothing stands on stdout."""
    assert done.status == 2 and done.out == "", done
    assert done.err.startswith("sparsegate: ") and done.err.count("\n") == 1 and done.err.endswith("\n"), done.err
    assert "must" in done.err and "got" in done.err, done.err
    return done.err

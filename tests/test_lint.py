"""ruff and pyright find nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff(command: list[str]) -> None:
    found = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
def test_pyright() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    files = json.loads(found.stdout)["summary"]["filesAnalyzed"]
    assert files == len([path for tree in ("converter", "runtime_onnx") for path in (ROOT / tree).rglob("*.py")])


def test_public_functions_are_there() -> None:
    import sparsegate.converter as converter
    import sparsegate.runtime_onnx as runtime

    for module in (converter, runtime):
        assert all(callable(getattr(module, name)) for name in module.__all__)

"""ruff and pyright find nothing, and native sources keep the same width."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NATIVE = ("runtime_onnx/csrc", "tests/op_harness/native", "tests/runtime_onnx/cuda_emulation")
SUFFIXES = {".cc", ".cu", ".cuh", ".h", ".inc", ".txt"}


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff(command: list[str]) -> None:
    found = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_native_sources_are_at_most_120_wide_and_500_long() -> None:
    paths = [p for folder in NATIVE for p in (ROOT / folder).iterdir() if p.suffix in SUFFIXES]
    assert {p.suffix for p in paths} == SUFFIXES
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 500, path
        assert not [f"{path}:{i}" for i, line in enumerate(lines, 1) if len(line) > 120]


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

"""Benchmarks, pages and records are told apart: who imports whom, and every path below tests/bench/ that is named."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from records.folders import DOCS, README, ROOT, repeatable

BENCH = ROOT / "tests" / "bench"
ALLOWED = {"benchmarks": {"benchmarks", "pages", "records"}, "pages": {"pages", "records"}, "records": {"records"}}
PROSE = [README, BENCH / "README.md", *sorted(DOCS.glob("*.md")), *sorted((ROOT / "converter").glob("*.md"))]
CODE = sorted(path for path in BENCH.rglob("*.py") if path.name != Path(__file__).name)


def imported_folders(path: Path) -> set[str]:
    """The folders of tests/bench/ that a file imports from."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    return {module.partition(".")[0] for module in modules} & set(ALLOWED)


def missing_paths(text: str) -> list[str]:
    """The paths below tests/bench/ that a text names and that are not there."""
    named = re.findall(r"tests/bench/[\w./-]*\w\.(?:py|md|json|png)\b", text)
    return [name for name in named if not (ROOT / name).is_file()]


def test_a_missing_path_is_found() -> None:
    assert missing_paths("`python tests/bench/curves.py` and tests/bench/results/curves.md.") == [
        "tests/bench/curves.py"
    ]


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_down(folder: str) -> None:
    files = list((BENCH / folder).glob("*.py"))
    assert len(files) > 1
    for path in files:
        assert imported_folders(path) <= ALLOWED[folder], path


@pytest.mark.parametrize("path", [*PROSE, BENCH / "results" / "curves.md"], ids=lambda path: path.name)
def test_named_paths_exist(path: Path) -> None:
    assert missing_paths(path.read_text(encoding="utf-8")) == []


def test_paths_named_in_code_exist() -> None:
    to_be_written = {"tests/bench/results/cuda.json"}
    missing = {name for path in CODE for name in missing_paths(path.read_text(encoding="utf-8"))}
    assert missing <= to_be_written


def test_recorded_commands_are_printed_with_the_path_of_today() -> None:
    old = "python tests/bench/curves.py --work WORK"
    assert repeatable(old) == "python tests/bench/benchmarks/curves.py --work WORK" == repeatable(repeatable(old))
    bench = "sparsegate bench -o tests/bench/results/op_cpu.json"
    assert repeatable(bench) == bench


def test_readme_names_every_benchmark_and_only_files_that_exist() -> None:
    named = set(re.findall(r"(?:benchmarks|pages|records)/\w+\.py", (BENCH / "README.md").read_text(encoding="utf-8")))
    assert all((BENCH / name).is_file() for name in named)
    scripts = [path for path in (BENCH / "benchmarks").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert {f"benchmarks/{path.name}" for path in scripts} <= named


@pytest.mark.slow
@pytest.mark.parametrize("script", ["benchmarks/cuda_run.py", "benchmarks/real_model.py"])
def test_scripts_start_without_a_search_path(script: str) -> None:
    done = subprocess.run([sys.executable, BENCH / script, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr

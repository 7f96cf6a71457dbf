"""An op is its files, its rows and these places: what an existing one's name stands in, by exact list. A new op is
written in the same places, and a place that is not here is one too many.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sparsegate.runtime_onnx.ops import OPS

ROOT = Path(__file__).parents[2]
OP = "sparse_linear"
PLACES = {
    "runtime_onnx/ops/{op}.py": "its file: variants, body, reference, bounds",
    "runtime_onnx/ops/__init__.py": "its row",
    "runtime_onnx/ops/margins.py": "how far its executors may lie apart",
    "converter/onnx_export/emit.py": "the roles that a plan's entry gives it",
    "converter/onnx_export/gated_graph.py": "its node in the graph",
    "converter/onnx_export/names.py": "the name of that node",
    "converter/onnx_export/stored.py": "how it is read back from a graph",
    "runtime_onnx/bench/graphs.py": "the bytes that it reads",
    "runtime_onnx/bench/op.py": "its sizes in words",
    "runtime_onnx/bench/op_cases.py": "the case that times it, and its row",
    "runtime_onnx/bench/op_graphs.py": "its model of one node",
    "converter/cli/bench.py": "its name in the help of --op",
}
"""Python files that name an op, and what for; `{op}` is its stem."""
NATIVE = {"runtime_onnx/csrc/CMakeLists.txt": "its sources", "runtime_onnx/csrc/ops.inc": "its row a provider"}
"""Files of the library that name it, beside those that carry its name."""
TESTS = ("tests/runtime_onnx/test_{op}.py", "tests/op_harness/{op}.py", "tests/op_harness/__init__.py")


def named_in(stem: str, folder: str, *suffixes: str) -> set[str]:
    """Files below a folder whose lines, comments left out, name an op by its stem or its name in graphs."""
    name = re.compile(rf"\b{stem}|{stem.replace('_', '')}\b", re.IGNORECASE)
    comment = re.compile(r"//.*|(?<!\S)#\s.*")
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and name.search(comment.sub("", path.read_text(encoding="utf-8")))
    }


def test_the_python_places_of_an_op() -> None:
    found = named_in(OP, "converter", ".py") | named_in(OP, "runtime_onnx", ".py")
    assert found == {place.format(op=OP) for place in PLACES}


def test_the_native_places_of_an_op() -> None:
    found = named_in(OP, "runtime_onnx/csrc", ".cc", ".h", ".cu", ".cuh", ".inc", ".txt")
    assert {path for path in found if not Path(path).name.startswith(OP)} == set(NATIVE)
    assert f"runtime_onnx/csrc/{OP}.cc" in found


@pytest.mark.parametrize("stem", OPS)
def test_every_op_has_the_files_and_tests_of_one(stem: str) -> None:
    assert all((ROOT / place.format(op=stem)).is_file() for place in (*PLACES, *NATIVE, *TESTS))
    rows = ("runtime_onnx/ops/__init__.py", "runtime_onnx/bench/op_cases.py", "tests/op_harness/__init__.py")
    assert all(f'"{stem}"' in (ROOT / row).read_text(encoding="utf-8") for row in rows)


def test_the_count_sees_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for name, text in (
        ("a.py", f"from x import {OP}"),
        ("b.py", "NAME = 'SparseLinear'"),
        ("c.py", f"# {OP}"),
        ("d.txt", OP),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert named_in(OP, ".", ".py") == {"a.py", "b.py"}

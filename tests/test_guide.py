"""The guide's list of what can be added is true: every row has a test that adds a toy one of its kind, or that counts
the places of an existing one, and what a row names exists.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from test_layers import ROOT

GUIDE = ROOT / "converter" / "README.md"
TITLE = "## To add one"
FOLDERS = ("", "converter")
"""What paths in the guide start from."""


def rows_of(text: str) -> dict[str, list[str]]:
    """The table's rows: what is added, and the cells on its file, its row and its tests."""
    _, _, part = text.partition(TITLE)
    lines = [line for line in part.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {what: rest for what, *rest in cells[1:]}


def checks() -> dict[str, Path]:
    """What is added by the files called test_a_new_<what>.py."""
    found = {path.stem.removeprefix("test_a_new_"): path for path in (ROOT / "tests").rglob("test_a_new_*.py")}
    return {kind.replace("_", " "): path for kind, path in found.items()}


def kind_of(what: str) -> str:
    """A row's kind without its article."""
    return re.sub(r"^an? ", "", what)


ROWS = rows_of(GUIDE.read_text(encoding="utf-8"))


def test_every_row_has_a_check_and_every_check_a_row() -> None:
    assert {kind_of(what) for what in ROWS} == set(checks())


@pytest.mark.parametrize("what", ROWS)
def test_a_row_is_checked(what: str) -> None:
    tree = ast.parse(checks()[kind_of(what)].read_text(encoding="utf-8"))
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert any(isinstance(node, ast.Assert) for test in tests for node in ast.walk(test))


def paths(cell: str) -> list[str]:
    return [word for word in re.findall(r"`([^`]+)`", cell) if "/" in word or word.endswith((".py", ".json", ".inc"))]


def exists(path: str) -> bool:
    """Whether a path of the guide leads to something; NAME and TYPE stand for any name."""
    pattern = re.sub("NAME|TYPE", "*", path.rstrip("/"))
    if "/" not in pattern:
        return any((ROOT / "tests").rglob(pattern))
    return any(any((ROOT / folder).glob(pattern)) for folder in FOLDERS)


@pytest.mark.parametrize("what", ROWS)
def test_what_a_row_names_exists(what: str) -> None:
    file, row, tests = ROWS[what]
    assert paths(tests) and all(exists(path) for cell in (file, row, tests) for path in paths(cell)), what
    for table, path in re.findall(r"`([A-Z_]+)`[^`|]*? in `([^`]+)`", f"{row} {tests}"):
        (found,) = {place for folder in FOLDERS for place in (ROOT / folder).glob(path)}
        assert re.search(rf"^{table}\b", found.read_text(encoding="utf-8"), re.MULTILINE), (table, path)


def test_the_guide_is_read() -> None:
    table = "| what | file | row | tests |\n|---|---|---|---|\n| an op | `a.py` | none | `t/` |"
    text = f"# A\n\n{TITLE}\n\n{table}\n\n## B\n| x | y |\n"
    assert rows_of(text) == {"an op": ["`a.py`", "none", "`t/`"]}
    assert exists("arch/TYPE.json") and exists("tests/models.py") and exists("test_guide.py")
    assert not exists("scores/nothing.py") and not exists("nothing.py")
    assert {kind_of("an op"), kind_of("a score")} == {"op", "score"}

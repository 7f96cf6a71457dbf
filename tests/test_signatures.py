"""A function fits a screen, and a call fits a line: at most 60 lines and eight parameters. What is more has a reason in
the lists below.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_layers import ROOT, TREES, sources

LINES, PARAMETERS = 60, 8
FLAGS = "its parameters are the flags of the verb, with their help"
PYTHON = "its parameters are the flags of the verb, for Python"
EXCEPTIONS = {
    "converter/cli/bench.py bench": FLAGS,
    "converter/cli/convert.py convert": FLAGS,
    "converter/cli/eval.py eval": FLAGS,
    "converter/cli/export.py export": FLAGS,
    "converter/cli/generate.py generate": FLAGS,
    "converter/cli/tune.py tune": FLAGS,
    "converter/pipeline/convert.py convert": PYTHON,
    "converter/pipeline/evaluate.py evaluate": PYTHON,
    "converter/pipeline/tune.py tune": PYTHON,
}
"""File and function, and why it is longer or takes more."""


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Dotted name, definition, and whether it is a method, of every function, those inside others too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + node.name, node, isinstance(tree, ast.ClassDef)
        inner = (
            f"{prefix}{node.name}."
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            else prefix
        )
        yield from functions(node, inner)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> int:
    """How many a caller may give: without self or cls; *args and **fields are one each."""
    spec = function.args
    static = any(isinstance(name, ast.Name) and name.id == "staticmethod" for name in function.decorator_list)
    named = len(spec.posonlyargs) + len(spec.args) + len(spec.kwonlyargs)
    return named + (spec.vararg is not None) + (spec.kwarg is not None) - (method and not static)


def too_much(text: str) -> dict[str, str]:
    """Functions over the bounds and by how much; a function's lines are those from `def` to its end, docstring
    included.
    """
    over = {}
    for name, function, method in functions(ast.parse(text)):
        lines, count = (function.end_lineno or 0) - function.lineno + 1, parameters(function, method)
        if lines > LINES or count > PARAMETERS:
            over[name] = f"{lines} lines, {count} parameters"
    return over


def test_functions_stay_small() -> None:
    over = {
        f"{path.relative_to(ROOT).as_posix()} {name}": how
        for path in sources(*TREES)
        for name, how in too_much(path.read_text(encoding="utf-8")).items()
    }
    assert not {name: how for name, how in over.items() if name not in EXCEPTIONS}
    assert not set(EXCEPTIONS) - set(over), "what has become small is no exception"


def test_a_verb_is_short_below_its_flags() -> None:
    rooms = {FLAGS: "converter/cli", PYTHON: "converter/pipeline"}
    for name, reason in EXCEPTIONS.items():
        path, function = name.split()
        assert Path(path).parent.as_posix() == rooms[reason]
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        verb = next(node for found, node, _ in functions(tree) if found == function)
        assert (verb.end_lineno or 0) - verb.body[0].lineno + 1 <= LINES, name


NINE = ", ".join(f"p{k}" for k in range(9))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (f"def f({NINE}): pass", ["f"]),
        (f"def f({NINE.rpartition(',')[0]}): pass", []),
        (f"def f(*, {NINE}): pass", ["f"]),
        (f"async def f({NINE}): pass", ["f"]),
        (f"class C:\n    def __init__(self, {NINE}): pass", ["C.__init__"]),
        (f"class C:\n    def f(self, {NINE.rpartition(',')[0]}): pass", []),
        (f"class C:\n    @staticmethod\n    def f({NINE}): pass", ["C.f"]),
        (f"def f({NINE.rpartition(',')[0]}, **more): pass", ["f"]),
        (f"if True:\n    def f():\n        def g({NINE}): pass", ["f.g"]),
        ("def f():\n" + "    x = 1\n" * 59, []),
        ("def f():\n" + "    x = 1\n" * 60, ["f"]),
        ('def f():\n    """Text.\n' + "\n" * 58 + '    """\n', ["f"]),
    ],
)
def test_the_check_sees_what_is_too_much(text: str, names: list[str]) -> None:
    assert list(too_much(text)) == names

"""Imports go down only. The lines are the list below; an import inside a function counts, and so does one under
TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TREES = ("converter", "runtime_onnx")
LINES = (
    ("cli",),
    ("pipeline",),
    ("report", "training"),
    ("methods",),
    ("evaluation", "stats"),
    ("text", "onnx_export", "sources"),
    ("modeling",),
    ("checkpoint",),
    ("scores", "arch", "progress", "bundled"),
)
"""The folders of converter/, from the top: one imports from lines below its own, never from another folder on its line.
"""
ABOVE_THE_RUNTIME = ("cli", "pipeline", "report", "evaluation")
"""Folders that may run a model: the others see only RUNTIME_BELOW of runtime_onnx."""
RUNTIME_BELOW = ("ops", "errors", "untrusted", "genai_config")


def line_of(room: str) -> int:
    return next(k for k, line in enumerate(LINES) if room in line)


def sources(*trees: str) -> list[Path]:
    return sorted(p for tree in trees for p in (ROOT / tree).rglob("*.py") if "__pycache__" not in p.parts)


def imports(path: Path, text: str | None = None) -> Iterator[str]:
    """Absolute dotted names that a file imports, `from a import b` as a.b; relative ones below sparsegate."""
    package = ["sparsegate", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if text is None else text)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{name.name}" for name in node.names)


def room_of(name: str) -> str | None:
    """The folder of converter/ that a dotted name lies in, `root` for the package's own; None elsewhere."""
    words = name.split(".")
    if words[:2] != ["sparsegate", "converter"]:
        return None
    return words[2] if len(words) > 2 and any(words[2] in line for line in LINES) else "root"


def upward(path: Path, text: str | None = None) -> list[str]:
    """Imports of a converter file that the lines do not allow."""
    own, bad = path.relative_to(ROOT / "converter").parts[0], []
    for name in imports(path, text):
        room = room_of(name)
        if name.startswith("sparsegate.runtime_onnx"):
            allowed = own in ABOVE_THE_RUNTIME or name.split(".")[2:3] in [[part] for part in RUNTIME_BELOW]
        elif room is None or own == room:
            allowed = True
        else:
            allowed = room != "root" and line_of(room) > line_of(own)
        if not allowed:
            bad.append(f"{path.relative_to(ROOT)} imports {name}")
    return bad


def rooms() -> dict[str, set[str]]:
    """Folders of converter/ and the others that they import from."""
    found: dict[str, set[str]] = {room: set() for line in LINES for room in line}
    for path in sources("converter"):
        own = path.relative_to(ROOT / "converter").parts[0]
        if own in found:
            found[own] |= {room for name in imports(path) if (room := room_of(name)) not in (None, own)}
    return found


def modules() -> dict[str, set[str]]:
    """Modules of converter/ and the others that they import from."""
    known = {
        ".".join(["sparsegate", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in sources("converter")
    }
    found = {}
    for module, path in known.items():
        targets = {name if name in known else name.rpartition(".")[0] for name in imports(path)}
        found[module] = (targets & set(known)) - {module}
    return found


def circular(arrows: Mapping[str, set[str]]) -> set[str]:
    """What is left when everything is taken away that imports nothing of the rest."""
    left = dict(arrows)
    while leaves := {name for name, targets in left.items() if not targets & set(left)}:
        left = {name: targets for name, targets in left.items() if name not in leaves}
    return set(left)


def summary() -> str:
    """The house in one line."""
    up = sum(len(upward(path)) for path in sources("converter") if path.parent != ROOT / "converter")
    arrows = rooms()
    count = sum(len(targets) for targets in arrows.values())
    return (
        f"converter/: {len(arrows)} rooms, {len(LINES)} levels, {count} arrows between rooms, {up} upwards, "
        f"{len(circular(modules()))} modules in circles"
    )


def test_every_file_lies_in_a_room() -> None:
    assert {path.name for path in (ROOT / "converter").glob("*.py")} == {"__init__.py"}
    folders = {path.relative_to(ROOT / "converter").parts[0] for path in sources("converter")} - {"__init__.py"}
    assert folders == {room for line in LINES for room in line}


def test_imports_go_down() -> None:
    assert not [line for path in sources("converter") if path.parent != ROOT / "converter" for line in upward(path)]


@pytest.mark.parametrize(
    ("file", "line", "seen"),
    [
        ("checkpoint/stage.py", "from ..modeling.blocks import swap", True),
        ("methods/gating/gate.py", "def f():\n    from ...report.html import make_report", True),
        ("modeling/blocks.py", "from ...runtime_onnx import session", True),
        ("modeling/gated.py", "from ...runtime_onnx.session import Decoder", True),
        ("modeling/gated.py", "from ...runtime_onnx.errors import InputError", False),
        ("pipeline/schedule.py", "import sparsegate.converter.cli.convert", True),
        ("scores/gate.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..stats import STATS", True),
        ("training/loop.py", "from ..report.html import make_report", True),
        ("pipeline/configs.py", "from .. import convert", True),
        ("cli/x.py", "import typer", False),
    ],
)
def test_the_check_sees_upward_imports(file: str, line: str, seen: bool) -> None:
    assert bool(upward(ROOT / "converter" / file, line)) == seen


def test_no_circles() -> None:
    assert not circular(modules())
    assert circular({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == {"a", "b", "c"}


def test_the_guide_has_every_room_on_its_line() -> None:
    rows = re.findall(r"^\| (\d) \| `(\w+)/` \|", (ROOT / "converter" / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted((int(line), room) for line, room in rows) == sorted(
        (k, room) for k, line in enumerate(LINES, 1) for room in line
    )


def test_runtime_imports_neither_torch_nor_converter() -> None:
    for path in sources("runtime_onnx"):
        assert not [
            name
            for name in imports(path)
            if name.split(".")[0] in ("torch", "transformers") or name.startswith("sparsegate.converter")
        ], path


def test_ops_need_only_numpy_and_onnx() -> None:
    standard = {
        "__future__",
        "dataclasses",
        "typing",
        "collections",
        "functools",
        "itertools",
        "math",
        "re",
        "enum",
        "importlib",
    }
    for path in sources("runtime_onnx/ops"):
        below = ("sparsegate.runtime_onnx.ops", "sparsegate.runtime_onnx.errors")
        names = {name.split(".")[0] for name in imports(path) if not name.startswith(below)}
        assert names <= standard | {"numpy", "onnx", "ml_dtypes"}, (path, names - standard)


@pytest.mark.parametrize(("package", "table"), [("methods", "METHODS"), ("scores", "SCORES"), ("stats", "STATS")])
def test_rows_of_a_table_do_not_import_each_other(package: str, table: str) -> None:
    import importlib

    rows = {
        getattr(row, "module", row).rpartition(".")[2]
        for row in getattr(importlib.import_module(f"sparsegate.converter.{package}"), table).values()
    }
    assert rows <= {path.stem for path in sources(f"converter/{package}")}
    for path in sources(f"converter/{package}"):
        if path.stem in rows:
            below = {
                word
                for name in imports(path)
                if name.startswith(f"sparsegate.converter.{package}.")
                for word in name.split(".")[3:]
            }
            assert not below & rows, path


def test_methods_see_no_models_files_or_datasets() -> None:
    for path in sources("converter/methods"):
        names = list(imports(path))
        assert not [
            n
            for n in names
            if n.startswith(
                (
                    "sparsegate.converter.checkpoint.source",
                    "sparsegate.converter.modeling.blocks",
                    "sparsegate.converter.text",
                )
            )
        ], path
        assert not [n for n in names if n.split(".")[0] in ("transformers", "safetensors", "pathlib")], path


def test_source_does_not_download() -> None:
    names = list(imports(ROOT / "converter" / "checkpoint" / "source.py"))
    assert not [name for name in names if "hub" in name or name.split(".")[0] in ("requests", "httpx", "urllib")]
    assert "def download(" in (ROOT / "converter" / "sources" / "hub.py").read_text(encoding="utf-8")


def test_files_stay_under_500_lines() -> None:
    long = {
        str(p.relative_to(ROOT)): n
        for p in sources(*TREES, "tests", "examples")
        if (n := len(p.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert not long


def test_no_pickle() -> None:
    for path in sources(*TREES):
        names = list(imports(path))
        assert not [
            n
            for n in names
            if n.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
        ], path
        calls = {
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
        }
        assert not calls & {"torch.load", "torch.save", "np.save", "eval", "exec"}, path


REMOVING = {
    "checkpoint/stage": "what it made itself, known by its record",
    "checkpoint/work_folder": "stages by their names, in a folder known by its record",
    "text/generated": "groups that are joined",
    "training/by_block": "the state of a block that is finished",
    "training/loop": "a state that does not belong to the run",
    "training/end_to_end": "a state without what was seen on the way",
    "pipeline/references": "graphs that are measured and thrown away",
}
"""Files that remove folders, and which: all lie in OUT.work."""


def test_one_error_for_a_users_mistake() -> None:
    """InputError alone is told to the user in a line: what says "must ..., got ..." is of it, and no other exception is
    of its name.
    """
    defined, plain = [], []
    for path in sources(*TREES):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name == "InputError":
                defined.append(path.relative_to(ROOT).as_posix())
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                said = ast.unparse(node.exc)
                if not said.startswith(("InputError", "CheckError")) and re.search(r"must .*got .*\. [A-Z]", said):
                    plain.append((path.relative_to(ROOT).as_posix(), said))
    assert defined == ["runtime_onnx/errors.py"]
    assert [name for name, _ in plain] == ["converter/modeling/processes.py"], (
        plain,
        "whose process told its own error",
    )


def test_few_files_remove_folders_and_one_writes_safetensors() -> None:
    """A folder that is not ours is never removed, and what safetensors writes has the mode that the umask says."""
    for path in sources(*TREES):
        name = path.relative_to(ROOT / path.relative_to(ROOT).parts[0]).with_suffix("").as_posix()
        calls = {
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
        }
        assert not calls & {"shutil.rmtree", "rmtree"} or name in REMOVING, path
        assert not calls & {"save_file", "safetensors.torch.save_file"} or name == "checkpoint/stage", path


OWN_JSON = {
    "runtime_onnx/untrusted.py": "the reader itself",
    "converter/arch/__init__.py": "files of the package",
    "converter/progress/__init__.py": "what a process that we started says",
    "converter/training/loop.py": "what the first process sends",
    "converter/sources/powerinfer_vocabulary.py": "what the tokenizers library says of a tokenizer",
    "converter/onnx_export/tokenizer_check.py": "what a process that we started says",
    "converter/onnx_export/base_graph.py": "what the builder has just written",
    "converter/evaluation/speed/run.py": "a value as it would be stored",
    "converter/evaluation/speed/memory.py": "what its parent says",
    "runtime_onnx/chat_template.py": "what a process that we started, or its parent, says",
    "runtime_onnx/bench/graphs.py": "a profile that ONNX Runtime has just written",
}
"""Files that read JSON by themselves, and which: all others ask `untrusted`, which refuses keys twice, NaN and
infinity.
"""
CHECKED = {"converter/checkpoint/tensor_files.py", "converter/checkpoint/source.py", "converter/checkpoint/writer.py"}
"""Files that read safetensors which `tensor_files` has checked."""
STAGES = {
    f"converter/{name}.py"
    for name in (
        "text/mixture",
        "text/generated",
        "training/by_block",
        "training/stage",
        "training/loop",
        "stats/__init__",
    )
}
"""Files that read safetensors of a stage, whose hashes were compared."""


def test_one_reader_of_json_and_one_of_safetensors() -> None:
    json_read, tensors_read = set(), set()
    for path in sources(*TREES):
        calls = {
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
        }
        name = path.relative_to(ROOT).as_posix()
        json_read |= {name} if calls & {"json.loads", "json.load", "_json.loads", "_json.load"} else set()
        tensors_read |= {name} if calls & {"load_file", "safe_open"} else set()
    assert json_read == set(OWN_JSON)
    assert tensors_read == CHECKED | STAGES


def test_no_grab_bag_modules() -> None:
    assert not [path for path in sources(*TREES) if path.stem in ("utils", "helpers", "common", "misc")]


def patches(text: str) -> list[str]:
    """What changes how a torch module runs: its `forward` set or deleted, by name or as a key of its `__dict__`, and
    hooks on its forward.

    Hooks on gradients are no taps: they see what no forward has.
    """
    changed = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            sets = node.attr == "forward" and not isinstance(node.ctx, ast.Load)
            hooks = re.fullmatch(r"register_(module_)?forward_(pre_)?hook", node.attr)
            if sets or hooks:
                changed.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            words = {ast.unparse(part).rpartition(".")[2] for part in (node.func, *node.args)}
            if "'forward'" in words and words & {"setattr", "delattr", "__setattr__", "__delattr__", "pop"}:
                changed.append(ast.unparse(node))
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            if isinstance(node.slice, ast.Constant) and node.slice.value == "forward":
                changed.append(ast.unparse(node))
    return changed


def test_taps_are_the_only_way_to_watch_or_change_a_network() -> None:
    changing = {
        path.relative_to(ROOT / "converter").as_posix()
        for path in sources("converter")
        if patches(path.read_text(encoding="utf-8"))
    }
    assert changing == {"modeling/taps.py"}


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("module.forward = f", True),
        ("model.layers[0].mlp.forward: Any = f", True),
        ("a, module.forward = 1, f", True),
        ("del module.forward", True),
        ("stack.callback(delattr, module, 'forward')", True),
        ("setattr(module, 'forward', f)", True),
        ("vars(module).pop('forward', None)", True),
        ("module.__dict__['forward'] = f", True),
        ("module.register_forward_pre_hook(f)", True),
        ("hook = module.register_forward_hook", True),
        ("torch.nn.modules.module.register_module_forward_hook(f)", True),
        ("before = module.forward", False),
        ("parameter.register_hook(f)", False),
        ("module.register_full_backward_hook(f)", False),
        ("def forward(self, x): return x", False),
    ],
)
def test_the_check_sees_patches(text: str, seen: bool) -> None:
    assert bool(patches(text)) == seen

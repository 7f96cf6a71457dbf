"""Imports go down only. The levels are the table below; an import inside a function counts, one under TYPE_CHECKING does not."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TREES = ("converter", "runtime_onnx")
RUNTIME_BELOW = {"runtime_onnx.ops", "runtime_onnx.errors", "runtime_onnx.untrusted", "runtime_onnx.genai_config"}
"""What every part of converter/ may import."""
LEVELS = (
    {"artifact", "locks", "work_folder", "recipe", "plans", "arch", "manifest", "libraries", "progress", "tensor_files", *RUNTIME_BELOW},
    {
        "checkpoint", "source", "config_bounds", "model_check", "listing", "data", "linalg", "distributed", "local_processes", "lora",
        "activation_checkpointing", "mixtures", "weight_names", "documents",
    },
    {"published", "blocks", "modeling"},
    {"scores", "selectors", "calibration_rules", "losses"},
    {"stats"},
    {"methods"},
    {"writer", "reference", "onnx_export", "attribution"},
    {"training", "optimizers", "analysis", "interchange", "powerinfer", "labels", "residual", "orientation", "shares"},
    {"end_to_end", "by_block", "recovery"},
    {"planning", "texts", "verification", "quality", "executors", "op_agreement", "paired", "watched", "report", "hub", "hub_errors", "budget"},
    {"schedule", "evaluation", "opening", "probe", "timing", "time_budget"},
    {"tuning", "recovery_stage"},
    {"conversion", "candidates", "record", "references", "inspection", "diagnosis", "bench", "root"},
    {"cli"},
)  # fmt: skip
"""Names are the parts of converter/; `root` is its __init__.py. Parts of one level may import each other, without cycles."""
RUNTIME = {"session", "generate", "bench", "library", "link", "text", "chat_template", "genai_config", "errors", "untrusted"}
RUNTIME_FROM = next(k for k, level in enumerate(LEVELS) if "verification" in level)


def level_of(part: str) -> int:
    return next(k for k, level in enumerate(LEVELS) if part in level)


def sources(*trees: str) -> list[Path]:
    return sorted(p for tree in trees for p in (ROOT / tree).rglob("*.py") if "__pycache__" not in p.parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path: Path, text: str | None = None) -> Iterator[str]:
    """Absolute dotted names that a file imports, `from a import b` as a.b; relative ones below sparsegate."""
    package = ["sparsegate", *path.relative_to(ROOT).parent.parts]
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8") if text is None else text)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{name.name}" for name in node.names)
        else:
            pending += [*node.orelse] if is_type_checking(node) else list(ast.iter_child_nodes(node))  # type: ignore[attr-defined]


def part_of(name: str) -> str | None:
    """The part of converter/, or runtime_onnx[.module], that a dotted name lies in; None outside the project."""
    words = name.split(".")
    if words[0] != "sparsegate":
        return None
    if words[1] == "runtime_onnx":
        return ".".join(words[1:3]) if len(words) > 2 and (words[2] == "ops" or words[2] in RUNTIME) else "runtime_onnx"
    known = set().union(*LEVELS)
    return words[2] if len(words) > 2 and words[2] in known else "root"


def own_part(path: Path) -> str:
    relative = path.relative_to(ROOT / "converter")
    return "root" if relative.name == "__init__.py" and len(relative.parts) == 1 else relative.parts[0].removesuffix(".py")


def upward(path: Path, text: str | None = None) -> list[str]:
    """Imports of a converter file that the table does not allow."""
    own, bad = own_part(path), []
    for name in imports(path, text):
        part = part_of(name)
        if part is None or part == own:
            continue
        if part.startswith("runtime_onnx"):
            allowed = part in RUNTIME_BELOW or level_of(own) >= RUNTIME_FROM
        else:
            allowed = level_of(part) < level_of(own) or (level_of(part) == level_of(own) and part != "root")
        if not allowed:
            bad.append(f"{path.relative_to(ROOT)} imports {name}")
    return bad


def test_every_file_has_a_level() -> None:
    known = set().union(*LEVELS)
    assert not {own_part(path) for path in sources("converter")} - known


def test_imports_go_down() -> None:
    assert not [line for path in sources("converter") for line in upward(path)]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("artifact.py", "from .source import Source"),
        ("methods/gate.py", "def f():\n    from ..reference import load"),
        ("blocks.py", "from ..runtime_onnx import session"),
        ("reference.py", "from ..runtime_onnx.session import Decoder"),
        ("schedule.py", "import sparsegate.converter.conversion"),
        ("scores/gate.py", "from ..stats import STATS"),
        ("planning.py", "from . import convert"),
        ("cli/x.py", "import typer"),
    ],
)
def test_the_check_sees_upward_imports(file: str, line: str) -> None:
    assert bool(upward(ROOT / "converter" / file, line)) == (file != "cli/x.py")


def test_no_cycles_between_parts() -> None:
    edges: dict[str, set[str]] = {}
    for path in sources("converter"):
        own = own_part(path)
        edges.setdefault(own, set()).update(p for p in (part_of(name) for name in imports(path)) if p and p != own and not p.startswith("runtime_onnx"))
    while leaves := {part for part, targets in edges.items() if not targets & set(edges)}:
        edges = {part: targets for part, targets in edges.items() if part not in leaves}
    assert not edges


def test_type_checking_imports_do_not_count() -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .source import Source\nelse:\n    import json\n"
    assert set(imports(ROOT / "converter" / "artifact.py", text)) == {"typing.TYPE_CHECKING", "json"}


def test_runtime_imports_neither_torch_nor_converter() -> None:
    for path in sources("runtime_onnx"):
        assert not [name for name in imports(path) if name.split(".")[0] in ("torch", "transformers") or name.startswith("sparsegate.converter")], path


def test_ops_need_only_numpy_and_onnx() -> None:
    standard = {"__future__", "dataclasses", "typing", "collections", "functools", "itertools", "math", "re", "enum", "importlib"}
    for path in sources("runtime_onnx/ops"):
        names = {name.split(".")[0] for name in imports(path) if not name.startswith("sparsegate.runtime_onnx.ops")}
        assert names <= standard | {"numpy", "onnx", "ml_dtypes"}, (path, names - standard)


@pytest.mark.parametrize("package", ["methods", "scores", "stats"])
def test_rows_of_a_table_do_not_import_each_other(package: str) -> None:
    """collect.py is the pass itself and knows the table, not its rows."""
    rows = {path.stem for path in sources(f"converter/{package}")} - {"__init__"}
    for path in sources(f"converter/{package}"):
        if path.stem in rows:
            below = [name.split(".")[3] for name in imports(path) if name.startswith(f"sparsegate.converter.{package}.") and len(name.split(".")) > 3]
            assert not set(below) & rows, path


def test_methods_see_no_models_files_or_datasets() -> None:
    for path in sources("converter/methods"):
        parts = {part_of(name) for name in imports(path)}
        assert not parts & {"source", "blocks", "data"}, path
        assert not [name for name in imports(path) if name.split(".")[0] in ("transformers", "safetensors", "pathlib")], path


def test_source_does_not_download() -> None:
    assert (ROOT / "converter" / "hub.py").is_file()
    names = list(imports(ROOT / "converter" / "source.py"))
    assert not [name for name in names if "hub" in name or name.split(".")[0] in ("requests", "httpx", "urllib")]
    assert "def download(" in (ROOT / "converter" / "hub.py").read_text(encoding="utf-8")


def test_files_stay_under_500_lines() -> None:
    long = {str(p.relative_to(ROOT)): n for p in sources(*TREES, "tests", "examples") if (n := len(p.read_text(encoding="utf-8").splitlines())) > 500}
    assert not long


def test_no_pickle() -> None:
    for path in sources(*TREES):
        names = list(imports(path))
        assert not [n for n in names if n.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")], path
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)}
        assert not calls & {"torch.load", "torch.save", "np.save", "eval", "exec"}, path


REMOVING = {
    "artifact": "what it made itself, known by its record",
    "work_folder": "stages by their names, in a folder known by its record",
    "texts": "groups that are joined",
    "by_block": "the state of a block that is finished",
    "training": "a state that does not belong to the run",
    "recovery_stage": "a state without what was seen on the way",
    "references": "graphs that are measured and thrown away",
}
"""Files that remove folders, and which: all lie in OUT.work."""


def test_few_files_remove_folders_and_one_writes_safetensors() -> None:
    """A folder that is not ours is never removed, and what safetensors writes has the mode that the umask says."""
    for path in sources(*TREES):
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)}
        assert not calls & {"shutil.rmtree", "rmtree"} or path.stem in REMOVING, path
        assert not calls & {"save_file", "safetensors.torch.save_file"} or path.stem == "artifact", path


OWN_JSON = {
    "runtime_onnx/untrusted.py": "the reader itself",
    "converter/arch/__init__.py": "files of the package",
    "converter/progress.py": "what a process that we started says",
    "converter/training.py": "what the first process sends",
    "converter/powerinfer.py": "what the tokenizers library says of a tokenizer",
    "converter/onnx_export/tokenizer_check.py": "what a process that we started says",
    "converter/onnx_export/base_graph.py": "what the builder has just written",
    "converter/bench/run.py": "a value as it would be stored",
    "converter/bench/memory.py": "what its parent says",
    "runtime_onnx/chat_template.py": "what a process that we started, or its parent, says",
    "runtime_onnx/bench/graphs.py": "a profile that ONNX Runtime has just written",
}
"""Files that read JSON by themselves, and which: all others ask `untrusted`, which refuses keys twice, NaN and infinity."""


def test_one_reader_of_json_and_one_of_safetensors() -> None:
    """`load_file` and `safe_open` read what `tensor_files` or a stage's hashes have checked before."""
    json_read, tensors_read = set(), set()
    for path in sources(*TREES):
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)}
        name = path.relative_to(ROOT).as_posix()
        json_read |= {name} if calls & {"json.loads", "json.load", "_json.loads", "_json.load"} else set()
        tensors_read |= {path.stem} if calls & {"load_file", "safe_open"} else set()
    assert json_read == set(OWN_JSON)
    checked, stages = {"tensor_files", "source", "writer"}, {"mixtures", "by_block", "texts", "recovery_stage", "training", "__init__"}
    assert tensors_read == checked | stages


def test_no_grab_bag_modules() -> None:
    assert not [path for path in sources(*TREES) if path.stem in ("utils", "helpers", "common", "misc")]

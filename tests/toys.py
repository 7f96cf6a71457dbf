"""Things of a kind that exist in one test alone: a file and a row, and nothing else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


def add(monkeypatch: pytest.MonkeyPatch, folder: Path, table: dict[str, Any], text: str, name: str = "toy") -> str:
    """Write a module of `text` into `folder` and make it importable; its row in a table of modules is `name`. Returns
    the module's name.
    """
    module = f"toy_{folder.name}".replace("-", "_")
    path = folder / f"{module}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module, made)
    spec.loader.exec_module(made)
    monkeypatch.setitem(table, name, module)
    return module

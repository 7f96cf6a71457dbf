"""A method is its file and its row: a toy one, added to a copy of the package by these two alone, is offered,
validated, tried and planned.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
FILE = '''
"""Keeps every other neuron's threshold at 0."""
import torch
from ...checkpoint.plan import SitePlan, Threshold
from ...stats import of_kind
from ..thresholds import NeuronShare as Config

SOURCE = ("none", "tau_i = i mod 2", "none")
NEEDS = ("sizes:gate",)


def plan(stats, arch, config):
    return {
        site: SitePlan((), Threshold("gate", torch.arange(int(tensors["sizes:gate.units"])) % 2.0, 1 - config.sparsity))
        for site, tensors in of_kind(stats, "ffn").items()
    }
'''
ROW = '    "toy": Method(".gating.toy", "neuron"),\n'
FIRST = "import sys; from importlib.machinery import PathFinder; sys.meta_path.insert(0, PathFinder)\n"
"""The package in PYTHONPATH comes before an editable install's."""
SCRIPT = """
import contextlib, io, json
from pathlib import Path
from sparsegate.converter.cli import main
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.methods import load_method, make_config, needs
from sparsegate.converter.pipeline.configs import method_configs
from sparsegate.converter.pipeline.estimate import estimate
from sparsegate.converter.pipeline.recipe import Flags, compile_recipe
from sparsegate.converter.stats.collect import collect
from sparsegate.converter.text.windows import Batches
import torch

def recipe(method, sparsity, kl):
    return compile_recipe(Flags(sys.argv[1], method=method, sparsity=sparsity, max_kl=kl))

def refusal(method):
    try:
        recipe(method, None, None)
    except ValueError as error:
        return str(error)

said = io.StringIO()
with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
    main(["convert", "--help"])
source = open_source(sys.argv[1])
tried = {name: list(method_configs(recipe("auto", *asked))) for name, asked in
         (("share", (0.4, None)), ("budget", (None, 0.1)))}
alone, joined = (method_configs(recipe(method, 0.4, None)) for method in ("toy", "toy+teal"))
tokens = torch.arange(64).reshape(2, 32)
batches = Batches(tokens, torch.ones_like(tokens, dtype=torch.bool))
config = alone["toy"]["toy"]
stats = collect(source, batches, needs("toy", config), Path(sys.argv[2]))
plan = load_method("toy").plan(stats, source.arch, config)
print(json.dumps({
    "help": said.getvalue(),
    "tried": tried,
    "refused": [refusal("toyy"), refusal("toy+toy")],
    "configs": {"toy": list(alone["toy"]), "toy+teal": list(joined["toy+teal"])},
    "cost": estimate(source, recipe("toy", 0.4, None), alone).expected_cost,
    "plan": {site.key: [len(entry.gate.tau), entry.gate.density] for site, entry in plan.items()},
}))
"""


def package(folder: Path, row: bool) -> Path:
    """A root with the package, linked file by file, but for the method's file and row."""
    converter = folder / "sparsegate" / "converter"
    for place in (converter, converter / "methods", converter / "methods" / "gating"):
        place.mkdir(parents=True)
        for path in (ROOT / place.relative_to(folder / "sparsegate")).iterdir():
            if path.name not in ("methods", "gating", "__pycache__"):
                (place / path.name).symlink_to(path)
    (folder / "sparsegate" / "runtime_onnx").symlink_to(ROOT / "runtime_onnx")
    (converter / "methods" / "gating" / "toy.py").write_text(FILE, encoding="utf-8")
    rows = converter / "methods" / "__init__.py"
    text = rows.read_text(encoding="utf-8")
    last = next(line for line in text.splitlines(keepends=True) if line.startswith('    "predictor": Method('))
    rows.unlink()
    rows.write_text(text.replace(last, last + ROW) if row else text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def found(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    environment = os.environ | {"PYTHONPATH": str(package(folder, True)), "COLUMNS": "400"}
    done = subprocess.run(
        [sys.executable, "-c", FIRST + SCRIPT, tiny_model("llama"), folder / "stats"],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_is_offered(found: dict[str, Any]) -> None:
    assert (
        "gate, chess, cett, svd, trained_gate, predictor, toy, exact, teal, wina, trained_input, imported, two as in"
        in found["help"]
    )


def test_it_is_validated(found: dict[str, Any]) -> None:
    unknown, joined = found["refused"]
    assert "trained_gate, predictor, toy, got 'toyy'" in unknown
    assert (
        "one of gate, chess, cett, svd, trained_gate, predictor, toy and one of teal, wina, trained_input, " in joined
    )
    assert ", got 'toy+toy'" in joined
    assert found["configs"] == {"toy": ["toy"], "toy+teal": ["toy", "teal"]}


def test_auto_tries_it(found: dict[str, Any]) -> None:
    assert found["tried"]["share"] == ["gate", "chess", "cett", "toy", "trained_gate"]
    assert "toy" in found["tried"]["budget"]


def test_it_is_planned(found: dict[str, Any]) -> None:
    assert found["plan"] == {f"layers.{layer}.ffn": [176, 0.6] for layer in range(2)}
    assert set(found["cost"]) == {"toy"}


def test_the_row_is_needed(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(package(tmp_path, False))}
    code = FIRST + "from sparsegate.converter.methods import METHODS, NAMED; print('toy' in METHODS, 'toy' in NAMED)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.split() == ["False", "False"], done.stderr

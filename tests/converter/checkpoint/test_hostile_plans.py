"""Plans and sparsity keys that nobody should have written: refused in one line, or of a form that every consumer
takes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fuzz_mutations import mutate_json, mutate_safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsegate.converter.arch import load_arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import (
    Exact,
    Plan,
    Predictor,
    Residual,
    SitePlan,
    Swap,
    Threshold,
    load_plan,
    merge,
    save_plan,
)
from sparsegate.converter.checkpoint.source import check_config
from sparsegate.converter.checkpoint.sparsity import TENSORS, encode, read_sparsity
from sparsegate.converter.checkpoint.stage import Header
from sparsegate.converter.modeling.gated import _check_fit
from sparsegate.converter.onnx_export.emit import emit
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.untrusted import read_json

D, N, R = 8, 12, 3
ARCH = load_arch("llama")
CONFIG = SimpleNamespace(
    hidden_size=D, intermediate_size=N, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2
)
CHANGES = 150
"""Damaged files of each kind that one run reads."""


@pytest.fixture(scope="module")
def plan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of gate and edit, and both kinds of residual."""
    g = torch.Generator().manual_seed(0)
    tau, r = torch.rand(N, generator=g), torch.randn(R, D, generator=g)
    plan: Plan = {
        Site(0): SitePlan((Swap("relu"),), Exact(0.5, 0.6)),
        Site(1): SitePlan((Swap("fatrelu(0.01)"),), Threshold("gate", tau, 0.5), Residual(r, r)),
        Site(2): SitePlan((), Predictor(r, torch.randn(N, R, generator=g), tau, 0.4, 0.9), Residual(r)),
        Site(3, kind="linear:q_proj"): SitePlan((), Threshold("input", torch.rand(D, generator=g), 0.5)),
    }
    folder = tmp_path_factory.mktemp("plan")
    save_plan(folder, plan, Header(format="plan"))
    key, tensors = encode(plan, "silu")
    config = {"model_type": "sparsegate_llama", "hidden_act": "sparsegate", "sparsity": key}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / TENSORS).parent.mkdir()
    save_file(tensors, folder / TENSORS)
    return folder


@pytest.fixture
def copied(plan_folder: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    (tmp_path / TENSORS).parent.mkdir()
    for name in ("plan.json", "plan.safetensors", "config.json", TENSORS):
        (tmp_path / name).write_bytes((plan_folder / name).read_bytes())
    return tmp_path


def used(plan: Plan) -> None:
    """Everything that takes a plan from a file."""
    merge([plan])
    encode(plan, "silu")
    _check_fit(CONFIG, plan, ARCH)
    for site, entry in plan.items():
        emit(site, entry, D, N if site.kind == "ffn" else D)


def edits(raw: Any) -> list[Any]:
    return raw["sites"]["layers.0.ffn"]["edits"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: edits(raw)[0].update(activation=["relu"]), "activation must be a name, got ['relu']"),
        (lambda raw: edits(raw)[0].update(activation="relu\n\x1b[31m"), "must be a name, got 'relu\\n\\x1b[31m'"),
        (lambda raw: edits(raw).append("relu"), "must map a site to its edits and its gate"),
        (lambda raw: raw["sites"]["layers.1.ffn"]["gate"].update(score=[1]), "score at layers.1.ffn must be gate or"),
        (lambda raw: raw["sites"]["layers.1.ffn"]["gate"].update(score="exact"), "must be gate or input, got 'exact'"),
        (lambda raw: raw["sites"]["layers.1.ffn"]["gate"].update(density=10**400), "density of layers.1.ffn must be"),
        (lambda raw: raw["sites"]["layers.2.ffn"]["gate"].update(recall="all"), "recall of layers.2.ffn must be"),
        (lambda raw: raw["sites"]["layers.2.ffn"]["gate"].update(tau=0.5), "got tau as well"),
        (lambda raw: raw["sites"]["layers.2.ffn"].pop("gate"), "must map a site to its edits and its gate"),
        (
            lambda raw: raw["sites"].update({"layers.00.ffn": raw["sites"]["layers.0.ffn"]}),
            "must be spelled layers.0.ffn, got 'layers.00.ffn'",
        ),
        (lambda raw: raw.update(version=[2]), "version must be 2, got [2]"),
        (lambda raw: edits(raw)[0].update(kind="x" * 10000), "must be one of swap, got 'xxx"),
    ],
)
def test_odd_fields_of_a_plan(change: Callable[[Any], Any], words: str, copied: Path) -> None:
    raw = json.loads((copied / "plan.json").read_text())
    change(raw)
    (copied / "plan.json").write_text(json.dumps(raw))
    with pytest.raises(InputError) as error:
        load_plan(copied)
    assert words in str(error.value) and "\n" not in str(error.value), str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("layers.1.ffn.tau", torch.zeros(()), "layers.1.ffn.tau must have shape [n], got []"),
        ("layers.1.ffn.residual.fc1.weight", torch.zeros(()), "must have shape of two axes, got []"),
        ("layers.2.ffn.predictor.fc1.weight", torch.zeros(R), "must have shape of two axes, got [3]"),
        ("layers.2.ffn.residual.fc1.weight", torch.zeros(R, D), "residual of layers.2.ffn must have"),
        ("layers.0.ffn.residual.weight", torch.zeros(R, D), "residual of layers.0.ffn must have"),
        ("layers.0.ffn.tau", torch.zeros(N), "got tau as well"),
        ("layers.1.ffn.tau", torch.full((N,), -torch.inf), "must hold numbers, got -inf"),
        ("layers.1.ffn.residual.weight", torch.full((R, D), torch.nan), "must hold numbers, got NaN"),
    ],
)
def test_odd_tensors_of_a_plan(name: str, tensor: Tensor, words: str, copied: Path) -> None:
    save_file(load_file(copied / "plan.safetensors") | {name: tensor}, copied / "plan.safetensors")
    with pytest.raises(InputError) as error:
        load_plan(copied)
    assert words in str(error.value), str(error.value)


@pytest.mark.parametrize("file", ["plan.json", "plan.safetensors", "config.json", str(TENSORS)])
def test_damage_is_refused_or_means_something(file: str, copied: Path) -> None:
    """InputError or a plan that everything takes, never another exception."""
    whole, refused = (copied / file).read_bytes(), 0
    mutate = mutate_json if file.endswith(".json") else mutate_safetensors
    for seed in range(CHANGES):
        (copied / file).write_bytes(mutate(whole, random.Random(seed)).data)
        try:
            if file == "config.json":
                check_config(read_json(copied / file, file))
            used(load_plan(copied) if file.startswith("plan") else read_sparsity(copied)[0])
        except InputError:
            refused += 1
    assert refused > CHANGES // 10

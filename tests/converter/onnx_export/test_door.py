"""`export` makes an ONNX folder of a checkpoint folder and nothing else: what is edited there is in the graph; float
graphs are shared by what they are made of.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gated_torch import BOUND, TOKENS, N, Tiny, put_plan, run
from models import make_model
from safetensors.torch import load_file, save_file

from sparsegate.converter import export
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Exact, Plan, SitePlan, Swap, Threshold, uniform_tau
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.modeling.gated import load
from sparsegate.converter.onnx_export import float_graph as module
from sparsegate.converter.onnx_export.base_graph import build_base
from sparsegate.converter.onnx_export.float_graph import graph_header
from sparsegate.runtime_onnx.errors import InputError

PLAN: Plan = {Site(0): SitePlan(gate=Threshold("gate", uniform_tau(0.02, N), 0.5))}
EDITED = ("model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight")


def edit(checkpoint: Path, name: str, copy: Path) -> Path:
    """A copy of a checkpoint with one number of a weight changed."""
    shutil.copytree(checkpoint, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[name][5, 3] += 2.0
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@torch.no_grad()
def torch_logits(checkpoint: Path) -> np.ndarray:
    return load(checkpoint)(torch.from_numpy(TOKENS)).logits.numpy()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "header.json"}


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_plan(tiny("llama").checkpoint, PLAN, tmp_path_factory.mktemp("door") / "sparse")


@pytest.mark.parametrize("name", EDITED)
def test_an_edited_weight_is_in_the_graph(
    checkpoint: Path, tiny: Callable[[str], Tiny], tmp_path: Path, name: str
) -> None:
    """The thresholds are of layer 0, whose inputs no edit of layer 1 changes: no neuron changes sides."""
    edited, base = edit(checkpoint, name, tmp_path / "edited"), tiny("llama").base
    with pytest.raises(InputError, match="base must be new or hold .* of other weights"):
        export(edited, tmp_path / "refused", base=base)
    assert not (tmp_path / "refused").exists()
    export(edited, tmp_path / "onnx", base=tmp_path / "base")
    export(checkpoint, tmp_path / "before", base=base)
    logits, before = run(tmp_path / "onnx"), run(tmp_path / "before")
    wanted = torch_logits(edited)
    assert np.abs(logits - wanted).max() < BOUND
    assert np.abs(before - torch_logits(checkpoint)).max() < BOUND
    assert np.abs(logits - before).max() > 100 * BOUND


def test_a_float_graph_is_kept_and_taken_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(checkpoint, tmp_path / "first", base=tmp_path / "base")
    monkeypatch.setattr(module, "build_base", lambda *_: pytest.fail("built again"))
    export(checkpoint, tmp_path / "second", base=tmp_path / "base")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    (tmp_path / "base" / "model.onnx.data").unlink()
    with pytest.raises(pytest.fail.Exception, match="built again"):
        export(checkpoint, tmp_path / "third", base=tmp_path / "base")
    mine = tmp_path / "mine"
    mine.mkdir()
    with pytest.raises(InputError, match="must be new or a folder that sparsegate made"):
        export(checkpoint, tmp_path / "fourth", base=mine)


def test_a_checkpoint_s_graph_is_its_source_s(checkpoint: Path, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Byte for byte, the plan, a swapped activation and code that is not carried over aside."""
    one = tiny("llama")
    assert contents(build_base(checkpoint, tmp_path / "base")) == contents(one.base)
    exact: Plan = {site: SitePlan((Swap("drelu"),), Exact()) for site in one.arch.sites(one.config)}
    swapped = put_plan(one.checkpoint, exact, tmp_path / "drelu")
    assert contents(build_base(swapped, tmp_path / "swapped")) == contents(one.base)
    coded = Path(shutil.copytree(one.checkpoint, tmp_path / "coded"))
    config = json.loads((coded / "tokenizer_config.json").read_text())
    (coded / "tokenizer_config.json").write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": "x.Y"}}))
    headers = {
        graph_header(open_source(folder, sparse=True)).fingerprint
        for folder in (one.checkpoint, checkpoint, swapped, coded)
    }
    assert len(headers) == 1
    assert graph_header(open_source(one.checkpoint), "fp16", "cuda").fingerprint not in headers


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_settings_are_part_of_it(tiny: Callable[[str], Tiny], tmp_path: Path, file: str) -> None:
    one = tiny("llama")
    copy = Path(shutil.copytree(one.checkpoint, tmp_path / "copy"))
    values = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(values | {"eos_token_id": 7}))
    before, after = (graph_header(open_source(folder)).parents for folder in (one.checkpoint, copy))
    assert before["weights"] == after["weights"] and before["settings"] != after["settings"]


def test_a_wrong_graph_and_a_dense_folder_are_refused(
    checkpoint: Path, tiny: Callable[[str], Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match='must have the key "sparsity"'):
        export(tiny("llama").checkpoint, tmp_path / "onnx")
    other = make_model("llama", tmp_path / "other", seed=5)
    monkeypatch.setattr(module, "build_base", lambda _, out, *form: build_base(other, out, *form))
    for target, precision in (("cpu", "fp32"), ("cuda", "fp16")):
        with pytest.raises(InputError, match="must give torch's logits"):
            export(checkpoint, tmp_path / "onnx", precision, target, base=tmp_path / target)
        assert not (tmp_path / "onnx").exists() and not (tmp_path / target).exists()

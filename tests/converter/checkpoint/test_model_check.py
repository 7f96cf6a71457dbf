"""One check of headers for every reader of weights: nothing is made up, nothing is read as what it is not."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODEL_TYPES, OTHER_TYPES, make_model
from safetensors.torch import load_file, save_file

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import SitePlan, Threshold, uniform_tau
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.checkpoint.tensor_files import load_tensors, read_header
from sparsegate.converter.checkpoint.writer import write_checkpoint
from sparsegate.converter.evaluation.speed.torch_peer import Torch
from sparsegate.converter.modeling.gated import load, load_dense
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.inspect import inspect
from sparsegate.runtime_onnx.errors import InputError

ROOT = Path(__file__).parents[3]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, DOWN, KEY_PROJECTION = (
    "model.embed_tokens.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
)
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def model(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


@pytest.fixture
def checkpoint(model: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(open_source(model), {Site(0): SitePlan(gate=Threshold("gate", uniform_tau(0.1, 176), 0.5))}, out)
    return out


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def bits(tensors: Tensors, name: str) -> None:
    """A weight's bits as integers: of the size that floats have."""
    tensors[name] = tensors[name].view(torch.int32)


WRONG = [
    (lambda t: t.pop(KEY_PROJECTION), KEY_PROJECTION),
    (lambda t: t.pop("model.layers.1.input_layernorm.weight"), "input_layernorm"),
    (lambda t: t.pop("lm_head.weight"), "lm_head"),
    (lambda t: bits(t, DOWN), "must be a float tensor, got I32"),
    (lambda t: bits(t, "model.norm.weight"), "must be a float tensor, got I32"),
    (lambda t: t.update({EMBEDDING: t[EMBEDDING].T.contiguous()}), EMBEDDING),
    (lambda t: t.update({KEY_PROJECTION: t[KEY_PROJECTION][:-1].contiguous()}), KEY_PROJECTION),
]


@pytest.mark.parametrize(("change", "word"), WRONG)
def test_every_reader_of_weights_refuses(
    checkpoint: Path, model: Path, change: Callable[[Tensors], Any], word: str
) -> None:
    for folder in (checkpoint, model):
        rewrite(folder, change)
    for read in (
        lambda: load(checkpoint),
        lambda: load_dense(checkpoint),
        lambda: load_dense(model),
        lambda: Torch(model, 1, "fp32"),
    ):
        with pytest.raises(InputError, match=word):
            read()


@pytest.mark.parametrize(("change", "word"), WRONG)
def test_inspect_and_convert_say_the_same(
    model: Path, tmp_path: Path, change: Callable[[Tensors], Any], word: str
) -> None:
    rewrite(model, change)
    same_refusal(model, tmp_path / "sparse", word)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers in config.json must be a whole number from 1 to 4096, got 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers in config.json must be a whole number from 1 to 4096, got -1"),
        ({"num_hidden_layers": 3}, "model.layers.2.mlp.gate_proj.weight"),
        ({"vocab_size": 1 << 31}, "vocab_size in config.json must be a whole number from 1 to"),
        ({"vocab_size": 300}, "no tensor with more than"),
        ({"vocab_size": 200}, r"model.embed_tokens.weight must have shape \[200, 64\]"),
        ({"num_attention_heads": 0}, "num_attention_heads in config.json must be a whole number"),
        ({"attention_bias": True}, "q_proj.bias"),
    ],
)
def test_counts_that_the_files_do_not_back(model: Path, tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    configure(model, **changes)
    same_refusal(model, tmp_path / "sparse", word)


def same_refusal(model: Path, out: Path, word: str) -> None:
    said = inspect(model)
    with pytest.raises(InputError, match=word) as error:
        convert(str(model), out, method="gate", sparsity=0.5)
    assert not said.convertible and said.reason == str(error.value)
    assert not out.exists()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_whole_models_pass(model_type: str, tiny_model: Callable[[str], Path]) -> None:
    open_source(tiny_model(model_type))


def test_what_no_class_computes_with_may_be_of_any_kind(model: Path) -> None:
    """Old transformers stored the positions, int64."""
    expected = load_dense(model)(input_ids=torch.arange(8)[None]).logits
    rewrite(model, lambda t: t.update({"model.embeddings.position_ids": torch.arange(4)}))
    assert torch.equal(load_dense(model)(input_ids=torch.arange(8)[None]).logits, expected)
    with pytest.raises(InputError, match="position_ids must be a float tensor, got I64"):
        open_source(model).read(["model.embeddings.position_ids"])


@pytest.mark.parametrize("model_type", OTHER_TYPES)
def test_types_without_an_architecture_file(model_type: str, tmp_path: Path) -> None:
    """They are no model to convert, but nothing of them is made up either."""
    folder = make_model(model_type, tmp_path / "m")
    load_dense(folder)
    name = next(
        name
        for name in sorted(load_file(folder / SINGLE))
        if name.endswith("norm.weight") or ".ln_" in name or "mlp" in name
    )
    rewrite(folder, lambda t: t.pop(name))
    with pytest.raises(InputError, match=f"must hold {name}"):
        load_dense(folder)


# Headers and shards


def double(path: Path, name: str) -> None:
    """`name` a second time in the header, with other dtype and the same bytes: every offset fits."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + size].decode().rstrip()
    again = json.loads(text)[name] | {"dtype": "I32"}
    head = f'{{"{name}":{json.dumps(again)},{text[1:]}'.encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + size :])


def test_a_name_twice_in_a_header(checkpoint: Path) -> None:
    path = checkpoint / SINGLE
    before = read_header(path)
    double(path, DOWN)
    assert set(load_file(path)) == set(before), "the library keeps one of the two"
    for read in (lambda: open_source(checkpoint, sparse=True), lambda: load(checkpoint), lambda: load_tensors(path)):
        with pytest.raises(
            InputError, match=r"model.safetensors must be a complete safetensors file.* twice in one object"
        ):
            read()


def test_shards_hold_what_the_index_says(model: Path) -> None:
    tensors = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    files = {name: f"model-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, model / file, {"format": "pt"})
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    load_dense(model)
    other = next(file for file in files.values() if file != files[DOWN])
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files | {DOWN: other}}))
    with pytest.raises(InputError, match=f"{DOWN}, which must stand in {other}"):
        load_dense(model)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    save_file(
        {name: tensors[name] for name in tensors if files[name] == other} | {DOWN: tensors[DOWN] + 1},
        model / other,
        {"format": "pt"},
    )
    with pytest.raises(InputError, match=f"{DOWN} must stand in one file"):
        load_dense(model)


def test_dtypes_that_a_format_names(tmp_path: Path) -> None:
    save_file({"tau": torch.zeros(3, dtype=torch.int32)}, tmp_path / "x.safetensors")
    assert load_tensors(tmp_path / "x.safetensors")["tau"].dtype == torch.int32
    with pytest.raises(InputError, match="tau in x.safetensors must be F32, got I32"):
        load_tensors(tmp_path / "x.safetensors", ["F32"])


def test_one_function_calls_from_pretrained_on_a_folder_from_outside() -> None:
    """It is `load_dense`, which checks the headers before and what was made up after; the other one reads what it has
    just written itself.
    """
    found = set()
    for path in (ROOT / "converter").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func).startswith("AutoModel")
                and ast.unparse(node.func).endswith("from_pretrained")
            ):
                found.add(path.relative_to(ROOT / "converter").as_posix())
    assert found == {"modeling/gated.py", "evaluation/speed/random_model.py"}

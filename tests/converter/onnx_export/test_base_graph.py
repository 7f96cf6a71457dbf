"""The base graph and its MLP regions, on every architecture."""

from __future__ import annotations

import logging
import socket
import sys

import numpy as np
import onnx_ir as ir
import pytest
import torch
from gated_torch import (
    BOUND,
    TOKENS,
    D,
    N,
)
from models import MODEL_TYPES, make_model
from transformers import AutoModelForCausalLM

from sparsegate.converter.onnx_export.base_graph import build_base, check_base, compare_base
from sparsegate.converter.onnx_export.linear_region import find_linears
from sparsegate.converter.onnx_export.mlp_region import find_regions
from sparsegate.runtime_onnx.errors import InputError


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_base_is_the_model_and_has_a_region_per_layer(tiny, model_type):
    one = tiny(model_type)
    assert check_base(one.base, one.model, TOKENS) == compare_base(one.base, one.model, TOKENS) <= 2 * BOUND
    assert {path.name for path in one.base.iterdir()} >= {
        "model.onnx",
        "model.onnx.data",
        "genai_config.json",
        "tokenizer.json",
    }
    regions = find_regions(ir.load(one.base / "model.onnx"), one.arch, one.config)
    assert [region.layer for region in regions] == [0, 1]
    plain = model_type == "phi"
    for region in regions:
        assert sorted(region.weights) == (["down", "up"] if plain else ["down", "gate", "up"])
        assert sorted(region.biases) == (["down", "up"] if plain else [])
        assert [tuple(region.weights[role].shape) for role in ("up", "down")] == [(D, N), (N, D)]
        assert all(f"/layers.{region.layer}/mlp/" in node.name for node in region.nodes)
        assert len(region.nodes) == {"gemma2": 5, "phi": 5}.get(model_type, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoint_is_exported_exactly(tmp_path, dtype):
    """gemma2 adds 1 to its norm weights, which half precision would round."""
    checkpoint = make_model("gemma2", tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(checkpoint).to(dtype).save_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    check_base(build_base(checkpoint, tmp_path / "base"), model, TOKENS)


def test_base_compares_worse_with_another_model(tiny):
    """The control of the comparison: one weight of the torch model changed a little."""
    one = tiny("llama")
    weight = one.model.model.layers[1].mlp.down_proj.weight
    old = weight.data.clone()
    try:
        weight.data[3, 7] += 0.05
        with pytest.raises(InputError, match="must give torch's logits"):
            check_base(one.base, one.model, TOKENS)
    finally:
        weight.data.copy_(old)


def test_comparison_takes_a_function_and_refuses_nan(tiny):
    one = tiny("llama")
    assert compare_base(one.base, lambda tokens: one.model(tokens).logits, TOKENS) == compare_base(
        one.base, one.model, TOKENS
    )
    with pytest.raises(InputError, match="nan"):
        check_base(one.base, lambda tokens: one.model(tokens).logits * float("nan"), TOKENS)


def test_known_wrong_builder_type_is_refused(tmp_path):
    checkpoint = make_model("olmo", tmp_path / "olmo")
    base = build_base(checkpoint, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with pytest.raises(InputError, match="builder is wrong for this model"):
        check_base(base, model, TOKENS)


def test_builder_failure_carries_its_message(tmp_path):
    with pytest.raises(InputError, match="not currently supported"):
        build_base(make_model("gpt2", tmp_path / "gpt2"), tmp_path / "base")


def test_missing_builder_names_the_extra(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_genai.models", None)
    with pytest.raises(InputError, match=r"sparsegate\[cpu\]"):
        build_base(tiny_model("llama"), tmp_path / "base")


def test_builder_is_quiet_and_offline(tmp_path, tiny_model, monkeypatch, capfd, caplog):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the builder opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    path = list(sys.path)
    with caplog.at_level(logging.DEBUG, logger="sparsegate"):
        build_base(tiny_model("llama"), tmp_path / "base")
    assert capfd.readouterr() == ("", "")
    assert sys.path == path
    assert "Reading layer 1" in caplog.text


def llama_graph(tiny) -> tuple[ir.Model, dict[str, ir.Node]]:
    model = ir.load(tiny("llama").base / "model.onnx")
    return model, {node.name: node for node in model.graph}


def refused(tiny, model: ir.Model, match: str) -> None:
    one = tiny("llama")
    with pytest.raises(InputError, match=match):
        find_regions(model, one.arch, one.config)


def test_open_region_is_refused(tiny):
    model, nodes = llama_graph(tiny)
    reader = ir.Node("", "Identity", [nodes["/model/layers.1/mlp/up_proj/MatMul"].outputs[0]], name="/thief")
    model.graph.append(reader)
    refused(tiny, model, r"Layer 1, node /model/layers.1/mlp/up_proj/MatMul: .* closed, got .* read by /thief")


def test_region_with_another_input_is_refused(tiny):
    model, nodes = llama_graph(tiny)
    other = nodes["/model/layers.0/mlp/up_proj/MatMul"].outputs[0]
    nodes["/model/layers.1/mlp/Mul"].replace_input_with(1, other)
    refused(tiny, model, r"Layer [01], node .*: the MLP must be")


def test_gate_and_up_of_different_values_are_refused(tiny):
    model, nodes = llama_graph(tiny)
    nodes["/model/layers.1/mlp/up_proj/MatMul"].replace_input_with(
        0, nodes["/model/layers.0/mlp/down_proj/MatMul"].outputs[0]
    )
    refused(tiny, model, r"Layer 1, node /model/layers.1/mlp/gate_proj/MatMul: gate and up must read one value")


@pytest.mark.parametrize(("name", "op"), [("act_fn/Sigmoid", "Tanh"), ("Mul", "Add")])
def test_other_arithmetic_is_refused(tiny, name, op):
    model, nodes = llama_graph(tiny)
    nodes[f"/model/layers.1/mlp/{name}"].op_type = op
    refused(tiny, model, r"Layer 1, node .*: the MLP must (compute silu|be computed)")


def test_missing_and_misshapen_weights_are_refused(tiny):
    model, nodes = llama_graph(tiny)
    weight = nodes["/model/layers.1/mlp/up_proj/MatMul"].inputs[1]
    weight.name = "elsewhere"
    refused(tiny, model, r"Layer 1 .* model.layers.1.mlp.up_proj.MatMul.weight, got none")
    model, nodes = llama_graph(tiny)
    nodes["/model/layers.0/mlp/up_proj/MatMul"].op_type = "MatMulNBits"
    refused(tiny, model, r"Layer 0 .* in one MatMul, got MatMulNBits")
    one = tiny("llama")
    config = type(one.config)(**{**one.config.to_dict(), "intermediate_size": 180})
    with pytest.raises(InputError, match=r"must have shape \[64, 180\], got \[64,176\]"):
        find_regions(llama_graph(tiny)[0], one.arch, config)


def test_packed_weight_under_another_name_is_refused(tiny):
    one, (model, nodes) = tiny("llama"), llama_graph(tiny)
    nodes["/model/layers.1/attn/qkv_proj/MatMul"].inputs[1].name = "elsewhere"
    with pytest.raises(InputError, match=r"Layer 1 .* model.layers.1.attn.qkv_proj.MatMul.weight, got none"):
        find_linears(model.graph, one.arch, one.config, 1, {"k_proj": np.zeros(D, np.float32)})

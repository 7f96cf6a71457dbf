"""--precision in the graph: stored weights, predictors and scales against the torch weights, the rest of the graph
against the builder's own, logits against a torch model that holds the rounded weights.
"""

from __future__ import annotations

import json
import logging
import shutil
import tracemalloc
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from gated_torch import BOUND, TOKENS, D, Gated, N, Tiny, linear_plan, open_tiny, put_plan
from models import MODEL_TYPES, make_model
from onnx.numpy_helper import to_array
from safetensors.torch import load_file

from sparsegate.converter.checkpoint.plan import Plan, SitePlan, Threshold, uniform_tau
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.modeling.gated import apply_plan, load_dense
from sparsegate.converter.onnx_export import base_graph
from sparsegate.converter.onnx_export.base_graph import onnx_logits, open_session
from sparsegate.converter.onnx_export.export import export
from sparsegate.converter.onnx_export.float_graph import graph_header
from sparsegate.converter.onnx_export.gated_graph import export_dense, gate_graph
from sparsegate.converter.onnx_export.matmul_nbits import open_float
from sparsegate.converter.onnx_export.precision import PRECISIONS
from sparsegate.converter.onnx_export.rounded import round_model
from sparsegate.converter.onnx_export.stored_values import load_predictor, store_predictor
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.library import variants
from sparsegate.runtime_onnx.ops.quantisation import quantise

MLP = "model.layers.{}.mlp."
FORMATS = {"fp32": np.float32, "fp16": np.float16, "bf16": "bfloat16", "int8": np.int8, "int4": np.uint8}


@pytest.fixture(scope="session")
def plan(tiny: Callable[[str], Tiny]) -> Callable[[str, str, bool], Plan]:
    return cache(lambda model_type, kind, residual: Gated(tiny(model_type), kind, residual).plan)


def write(
    one: Tiny, plan: Plan, out: Path, precision: str, base: Path | None = None, target: str = "cpu"
) -> onnx.ModelProto:
    one.export(plan, out, precision, base, target)
    return onnx.load(out / "model.onnx", load_external_data=False)


def stored(proto: onnx.ModelProto, folder: Path) -> dict[str, np.ndarray]:
    return {tensor.name: to_array(tensor, str(folder)) for tensor in proto.graph.initializer}


@torch.no_grad()
def torch_logits(one: Tiny, plan: Plan, precision: str | None, target: str = "cpu") -> np.ndarray:
    """Logits of the gated torch model, rounded as a file of that precision or not."""
    model = apply_plan(load_dense(one.checkpoint), plan, one.arch, one.arch.activation(one.config))
    if precision is not None:
        round_model(model, plan, one.arch, precision, target)
    return model(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_op_weights_are_the_torch_weights_in_the_precision(tiny, plan, tmp_path, precision):
    one = tiny("llama")
    found = stored(write(one, plan("llama", "predictor", False), tmp_path / "out", precision), tmp_path / "out")
    weights, entry = (
        load_file(one.checkpoint / "model.safetensors"),
        plan("llama", "predictor", False)[one.arch.sites(one.config)[1]].gating,
    )
    for role in ("gate", "up", "down"):
        rows = weights[f"{MLP.format(1)}{role}_proj.weight"].numpy()
        rows = rows.T if role == "down" else rows  # [n, d]
        got = found[f"{MLP.format(1)}GatedMLP.w_{role}"]
        assert got.dtype == FORMATS[precision]
        if PRECISIONS[precision].weights == "float":
            assert np.array_equal(got.astype(np.float32), rows.astype(got.dtype).astype(np.float32))
            continue
        integers, scale = quantise(rows, PRECISIONS[precision].weights)
        assert np.array_equal(got, integers) and np.array_equal(found[f"{MLP.format(1)}GatedMLP.s_{role}"], scale)
        assert not np.array_equal(
            got,
            quantise(
                weights[f"{MLP.format(0)}{role}_proj.weight"].numpy().reshape(rows.shape), PRECISIONS[precision].weights
            )[0],
        )
    p1, p2 = (found[f"{MLP.format(1)}GatedMLP.{role}"] for role in ("p1", "p2"))
    if PRECISIONS[precision].bits:
        for got, matrix, role in ((p1, entry.fc1, "p1"), (p2, entry.fc2, "p2")):
            integers, scale = quantise(matrix.numpy(), "int8_row")
            assert np.array_equal(got, integers) and np.array_equal(found[f"{MLP.format(1)}GatedMLP.s_{role}"], scale)
    else:
        assert p1.dtype == p2.dtype == FORMATS[precision]
        assert np.array_equal(p2.astype(np.float32), entry.fc2.numpy().astype(p2.dtype).astype(np.float32))
    assert np.array_equal(found[f"{MLP.format(1)}GatedMLP.tau"], entry.tau.numpy())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_body_equals_torch_with_the_rounded_weights(tiny, plan, tmp_path, model_type, precision):
    """Products in floating point; the unrounded model is the control that rounding shows."""
    one, own = tiny(model_type), plan(model_type, "gate", True)
    write(one, own, tmp_path / "out", precision)
    got, expected = onnx_logits(open_float(tmp_path / "out"), TOKENS), torch_logits(one, own, precision)
    assert np.abs(got - expected).max() < BOUND
    assert np.abs(torch_logits(one, own, None) - expected).max() > 5 * BOUND


@pytest.mark.parametrize(("precision", "predictor"), [("bf16", "bfloat16"), ("int8", "int8"), ("int4", "int8")])
@pytest.mark.parametrize("residual", [False, True])
def test_predictors_are_rounded_too(tiny, plan, tmp_path, precision, predictor, residual):
    one, own = tiny("llama"), plan("llama", "predictor", residual)
    write(one, own, tmp_path / "out", precision)
    expected = "float16" if residual and predictor == "int8" else predictor
    assert all(f",p={expected}/" in name for name in variants(tmp_path / "out"))
    assert np.abs(onnx_logits(open_float(tmp_path / "out"), TOKENS) - torch_logits(one, own, precision)).max() < BOUND


def test_predictor_beyond_float16_is_stored_in_bfloat16():
    tensors = {
        "tau": np.array([1e6], np.float32),
        "p1": np.full((1, 2), 7e4, np.float32),
        "p2": np.ones((1, 1), np.float32),
    }
    read, dtype = store_predictor(tensors, PRECISIONS["fp16"])
    assert dtype == "bfloat16" and np.isfinite(load_predictor(read)["p1"]).all()
    assert store_predictor(tensors | {"p1": np.ones((1, 2), np.float32)}, PRECISIONS["fp16"])[1] == "float16"


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
def test_rest_is_matmul_nbits_and_ops_are_left_alone(tiny, plan, tmp_path, precision, bits):
    proto = write(
        tiny("llama"),
        {site: e for site, e in plan("llama", "gate", False).items() if site.layer == 1},
        tmp_path / "out",
        precision,
    )
    kinds = [node.op_type for node in proto.graph.node]
    assert "MatMul" not in kinds and kinds.count("GatedMLP") == 1
    products = {
        node.name: {a.name: a.i for a in node.attribute} for node in proto.graph.node if node.op_type == "MatMulNBits"
    }
    assert set(products) == {
        f"{name}_Q{bits}"
        for name in (
            "/lm_head/MatMul",
            *(f"/model/layers.{k}/attn/{part}_proj/MatMul" for k in (0, 1) for part in ("qkv", "o")),
            *(f"/model/layers.0/mlp/{part}_proj/MatMul" for part in ("gate", "up", "down")),
        )
    }
    assert products[f"/model/layers.0/mlp/down_proj/MatMul_Q{bits}"] == {
        "K": N,
        "N": D,
        "bits": bits,
        "block_size": 32,
        "accuracy_level": 4,
    }


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_dense_graph_is_the_builders_own(tiny, tmp_path, model_type, precision):
    """Bit for bit, untied (llama) and tied (qwen2): node types, attributes and every initialiser."""
    one = tiny(model_type)
    export_dense(one.base, tmp_path / "ours", precision)
    builder = base_graph._builder()
    with redirect_stdout(StringIO()):
        given = (str(one.checkpoint), str(tmp_path / "theirs"), precision, "cpu", str(tmp_path / "cache"))
        builder.create_model("", *given, **builder.parse_extra_options("", *given, list(base_graph._OPTIONS)))
    base_graph._complete(tmp_path / "theirs", base_graph._Missing([], None))  # gives the cache's shapes their head size
    protos = {name: onnx.load(tmp_path / name / "model.onnx", load_external_data=False) for name in ("ours", "theirs")}
    ours, theirs = (stored(proto, tmp_path / name) for name, proto in protos.items())
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)

    def nodes(proto: onnx.ModelProto) -> list[tuple[Any, ...]]:
        quantised = [node for node in proto.graph.node if node.op_type in ("MatMulNBits", "GatherBlockQuantized")]
        return sorted((node.op_type, sorted((a.name, a.i) for a in node.attribute), node.name) for node in quantised)

    assert nodes(protos["ours"]) == nodes(protos["theirs"]) != []
    one_way, other_way = (
        onnx_logits(open_session(tmp_path / name / "model.onnx"), TOKENS) for name in ("ours", "theirs")
    )
    assert np.array_equal(one_way, other_way)


LINEARS = [("q_proj", "k_proj"), ("v_proj",), ("o_proj",), ("up_proj",), ("down_proj",)]


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_linear_sites_and_what_is_left_of_a_packed_weight(tiny, tmp_path, caplog, precision):
    """Layer 1 gates q and k alike and leaves v to MatMulNBits; 176 columns have no whole groups of 32, so they are
    stored by rows, and that is said.
    """
    one = tiny("llama")
    own = linear_plan(one, {0: LINEARS, 1: LINEARS[:1]})
    with caplog.at_level(logging.WARNING, logger="sparsegate"):
        write(one, own, tmp_path / "out", precision)
    said = [record.message for record in caplog.records if "int8_row" in record.message]
    expected = [
        "model.layers.0.mlp.up_proj is stored as int8_row: int4_g32 needs rows of a multiple of 32 values, got 176."
    ]
    assert said == (expected if precision == "int4" else [])
    kinds = {name.split("/")[1] for name in variants(tmp_path / "out")}
    assert kinds == {"bf16": {"float"}, "int8": {"int8_row"}, "int4": {"int4_g32", "int8_row"}}[precision]
    difference = np.abs(onnx_logits(open_float(tmp_path / "out"), TOKENS) - torch_logits(one, own, precision))
    assert np.median(difference.max(-1)) < BOUND  # a value next to a threshold of all channels may fall on either side


def test_network_whose_rows_have_no_whole_groups_is_stored_by_rows(tmp_path, caplog):
    one = open_tiny(
        "llama",
        make_model("llama", tmp_path / "model", hidden_size=48, num_attention_heads=3, num_key_value_heads=3),
        tmp_path / "base",
    )
    own: Plan = {
        site: SitePlan(gate=Threshold("gate", uniform_tau(0.3, N), 0.5)) for site in one.arch.sites(one.config)
    }
    with caplog.at_level(logging.WARNING, logger="sparsegate"):
        proto = write(one, own, tmp_path / "out", "int4")
    assert [record.message for record in caplog.records] == [
        f"model.layers.{k}.mlp is stored as int8_row: int4_g32 needs rows of a multiple of 32 values, got 48."
        for k in (0, 1)
    ]
    assert [name.split("/")[3] for name in variants(tmp_path / "out")] == ["int8_row"]
    assert {
        a.i for node in proto.graph.node if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "bits"
    } == {4}
    difference = np.abs(onnx_logits(open_float(tmp_path / "out"), TOKENS) - torch_logits(one, own, "int4"))
    assert np.median(difference.max(-1)) < BOUND


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
def test_graph_for_cuda(tiny, plan, tmp_path, precision):
    """The graph's own floats are half precision and its provider is asked for CUDA graphs; what the CPU has kernels for
    also runs here.
    """
    one, own, form = tiny("llama"), plan("llama", "gate", False), PRECISIONS[precision]
    proto = write(one, own, tmp_path / "out", precision, tmp_path / "base", "cuda")
    half = "bfloat16" if precision == "bf16" else "float16"
    weights = {"float": half}.get(form.weights, "float32")
    assert all(
        f"/x={half},w={weights},p=float32/" in name and f"/{form.weights}/" in name
        for name in variants(tmp_path / "out")
    )
    options = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["decoder"]["session_options"][
        "provider_options"
    ]
    assert options == [{"cuda": {"enable_cuda_graph": "1"}}]
    products = [{a.name: a.i for a in node.attribute} for node in proto.graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == (5 if form.bits else 0) and all("accuracy_level" not in product for product in products)
    tensors = stored(proto, tmp_path / "out")
    assert tensors["model.layers.0.input_layernorm.weight"].dtype == half
    assert all(array.dtype == np.float32 for name, array in tensors.items() if name.endswith(".tau"))
    if form.bits:
        assert tensors["lm_head.MatMul.weight_scales"].dtype == np.float16
    if precision != "bf16":
        difference = np.abs(
            onnx_logits(open_session(tmp_path / "out" / "model.onnx"), TOKENS)
            - torch_logits(one, own, precision, "cuda")
        ).max(-1)
        assert np.median(difference) < 0.03


def test_quantising_streams_through_memory(tmp_path):
    """The Python memory that export allocates stays near one weight's share, although the model has twenty-four."""
    one = open_tiny(
        "llama", make_model("llama", tmp_path / "model", num_hidden_layers=8, intermediate_size=4096), tmp_path / "base"
    )
    own: Plan = {
        site: SitePlan(gate=Threshold("gate", uniform_tau(0.1, 4096), 0.5))
        for site in one.arch.sites(one.config)
        if site.layer % 2
    }
    weight = 4 * D * 4096  # bytes
    for precision in ("int8", "int4"):
        checkpoint = put_plan(one.checkpoint, own, tmp_path / precision)
        graph_header(open_source(checkpoint, sparse=True))  # its files are hashed once, 4 MB at a time
        tracemalloc.start()
        try:
            export(checkpoint, tmp_path / precision, precision, base=one.base)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 8 * weight, f"{precision}: {peak / weight:.1f} weights"


def test_shared_reader_of_an_output_weight_must_be_an_embedding(tiny, plan, tmp_path):
    one = tiny("qwen2")
    proto = onnx.load(one.base / "model.onnx", load_external_data=False)
    next(node for node in proto.graph.node if node.op_type == "Transpose").op_type = "Identity"
    onnx.save(proto, tmp_path / "model.onnx")
    shutil.copyfile(one.base / "model.onnx.data", tmp_path / "model.onnx.data")
    with pytest.raises(
        InputError, match=r"lm_head.MatMul.weight must be read by a product and an embedding, got Identity"
    ):
        gate_graph(ir.load(tmp_path / "model.onnx"), {}, one.arch, one.config, "int4")

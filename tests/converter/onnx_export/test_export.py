"""ONNX export on every architecture, against a torch forward written here by hand."""

from __future__ import annotations

import errno
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from gated_torch import (
    BOUND,
    TOKENS,
    D,
    Gated,
    N,
    R,
    gating,
    generate,
    library,
    linear_plan,
    open_tiny,
    put_plan,
    run,
    seen,
    sparse_logits,
)
from models import MODEL_TYPES, make_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Exact, Plan, Predictor, SitePlan, Swap, Threshold, uniform_tau
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.onnx_export import gated_graph as surgery
from sparsegate.converter.onnx_export.base_graph import compare_base
from sparsegate.converter.onnx_export.emit import emissions
from sparsegate.converter.onnx_export.export import export
from sparsegate.converter.onnx_export.float_graph import graph_header
from sparsegate.converter.onnx_export.gated_graph import METADATA
from sparsegate.converter.onnx_export.mlp_region import find_regions
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.library import executor, variants
from sparsegate.runtime_onnx.ops import sparse_linear
from sparsegate.runtime_onnx.ops.gated_mlp import Variant


@pytest.mark.parametrize("kind", ["threshold", "predictor"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_exported_model_equals_gated_torch(tiny, tmp_path, model_type, kind):
    one = tiny(model_type)
    gated = Gated(one, kind)
    out = one.export(gated.plan, tmp_path / "out")
    expected = gated.logits()
    density = float(np.mean([gate.keep.float().mean() for gate in gated.gates]))
    assert 0.3 < density < 0.7
    assert gated.dense_difference > 0.1  # the gating matters
    dropped = gated.logits(skip=gated.active_neuron())
    for native in {None, library()}:
        logits = run(out, native=native)
        assert np.abs(logits - expected).max() <= BOUND, native
        assert np.abs(logits - dropped).max() > 10 * BOUND, "a dropped neuron must be seen"
    tokens = generate(out, TOKENS[0, :12], 16)
    teacher = gated.logits(np.concatenate([TOKENS[0, :12], tokens])[None])[0]
    predicted = teacher[11 : 11 + len(tokens)]
    assert len(tokens) == 16 or tokens[-1] == one.config.eos_token_id
    assert (predicted[np.arange(len(tokens)), tokens] >= predicted.max(axis=1) - BOUND).all()


@pytest.mark.parametrize("model_type", ["llama", "phi"])
def test_open_gates_give_the_dense_model(tiny, tmp_path, model_type):
    one = tiny(model_type)
    open_tau = uniform_tau(-1e30, N)
    plan: Plan = {
        Site(0): SitePlan(gate=Threshold("gate", open_tau, 1.0)),
        Site(1): SitePlan(gate=Predictor(torch.randn(R, D), torch.randn(N, R), open_tau, 1.0)),
    }
    assert compare_base(one.export(plan, tmp_path / "out"), one.model, TOKENS) <= BOUND


@pytest.mark.parametrize(("kind", "roles"), [("predictor", ("p1", "p2", "res")), ("threshold", ("p1", "res"))])
def test_residual_and_biases(tmp_path, kind, roles):
    """A gated MLP with all three biases, and a residual beside a predictor or a threshold on the gate."""
    one = open_tiny("llama", make_model("llama", tmp_path / "model", mlp_bias=True), tmp_path / "base")
    gated = Gated(one, kind, residual=True)
    out = one.export(gated.plan, tmp_path / "out")
    names = [Variant.parse(name) for name in json.loads(onnx_metadata(out))]
    assert [variant.inputs for variant in names] == [
        ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down", "tau", *roles)
    ]
    for native in {None, library()}:
        assert np.abs(run(out, native=native) - gated.logits()).max() <= BOUND
        assert np.abs(run(out, native=native) - gated.logits(skip=gated.active_neuron())).max() > BOUND


def test_builder_leaves_out_a_zero_bias(tmp_path, tiny):
    checkpoint = make_model("phi", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.model.layers[0].mlp.fc2.bias.data.zero_()
    model.save_pretrained(checkpoint)
    one = open_tiny("phi", checkpoint, tmp_path / "base")
    regions = find_regions(ir.load(one.base / "model.onnx"), one.arch, one.config)
    assert [sorted(region.biases) for region in regions] == [["up"], ["down", "up"]]
    gated = Gated(one, "threshold")
    out = one.export(gated.plan, tmp_path / "out")
    assert len(json.loads(onnx_metadata(out))) == 2
    assert np.abs(run(out) - gated.logits()).max() <= BOUND


def onnx_metadata(folder: Path) -> str:
    return {
        entry.key: entry.value for entry in onnx.load(folder / "model.onnx", load_external_data=False).metadata_props
    }[METADATA]


def test_file_of_one_variant(tiny, tmp_path):
    """Names, functions, metadata and external data of the written folder."""
    one = tiny("llama")
    out = one.export(Gated(one, "threshold").plan, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {path.name for path in one.base.iterdir()} - {"header.json"}
    assert (out / "genai_config.json").read_bytes() == (one.base / "genai_config.json").read_bytes()
    assert all(path.stat().st_nlink == 1 and not path.is_symlink() for path in out.iterdir())
    proto = onnx.load(out / "model.onnx", load_external_data=False)
    assert {entry.domain: entry.version for entry in proto.opset_import}["ai.sparsegate"] == 1
    assert [(f.domain, f.name, f.overload) for f in proto.functions] == [("ai.sparsegate", "GatedMLP", "")]
    variant = Variant("silu", "gate", "float", ("w_gate", "w_up", "w_down", "tau"))
    assert json.loads(onnx_metadata(out)) == [variant.name]
    nodes = [node for node in proto.graph.node if "/mlp/" in node.name]
    prefixes = [f"model.layers.{layer}.mlp.GatedMLP." for layer in (0, 1)]
    assert [node.name for node in nodes] == ["/model/layers.0/mlp/GatedMLP", "/model/layers.1/mlp/GatedMLP"]
    assert [list(node.input[1:]) for node in nodes] == [
        [prefix + role for role in variant.inputs] for prefix in prefixes
    ]
    assert {a.name: a.s.decode() for a in nodes[0].attribute} == variant.attributes()
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in proto.graph.value_info
    }
    assert [shapes[node.output[0]] for node in nodes] == [["batch_size", "sequence_length", D]] * 2
    locations = {
        entry.value for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert locations == {"model.onnx.data"}
    large = [tensor for tensor in proto.graph.initializer if np.prod(tensor.dims) * 4 > 4096]
    assert large and all(
        int(entry.value) % 4096 == 0 for tensor in large for entry in tensor.external_data if entry.key == "offset"
    )
    assert not any("proj.MatMul.weight" in tensor.name and ".mlp." in tensor.name for tensor in proto.graph.initializer)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor, str(out)) for tensor in proto.graph.initializer}
    weights = load_file(one.checkpoint / "model.safetensors")
    for layer, prefix in enumerate(prefixes):
        assert np.array_equal(stored[prefix + "w_gate"], weights[f"model.layers.{layer}.mlp.gate_proj.weight"])
        assert np.array_equal(stored[prefix + "w_up"], weights[f"model.layers.{layer}.mlp.up_proj.weight"])
        assert np.array_equal(stored[prefix + "w_down"], weights[f"model.layers.{layer}.mlp.down_proj.weight"].T)


def test_two_variants_are_overloads_and_other_sites_stay(tiny, tmp_path):
    one = tiny("llama")
    threshold, predictor = Gated(one, "threshold"), Gated(one, "predictor")
    mixed = one.export({Site(1): predictor.plan[Site(1)], Site(0): threshold.plan[Site(0)]}, tmp_path / "mixed")
    proto = onnx.load(mixed / "model.onnx", load_external_data=False)
    assert [function.overload for function in proto.functions] == ["v0", "v1"]
    assert [(node.name, node.overload) for node in proto.graph.node if node.op_type == "GatedMLP"] == [
        ("/model/layers.0/mlp/GatedMLP", "v0"),
        ("/model/layers.1/mlp/GatedMLP", "v1"),
    ]
    threshold.gates[1] = replace(predictor.gates[1])
    assert np.abs(run(mixed) - threshold.logits()).max() <= BOUND
    half = one.export({Site(1): predictor.plan[Site(1)]}, tmp_path / "half")
    threshold.gates[0] = replace(threshold.gates[0], tau=uniform_tau(-float("inf"), N))
    assert np.abs(run(half) - threshold.logits()).max() <= BOUND
    assert "/model/layers.0/mlp/down_proj/MatMul" in {
        node.name for node in onnx.load(half / "model.onnx", load_external_data=False).graph.node
    }


# Linear sites


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_exported_linears_equal_sparse_torch(tiny, tmp_path, model_type):
    """Layer 0: q, k and v with one threshold and every linear of the network; layer 1: q and v with their own, k left
    dense, a gated network.
    """
    one = tiny(model_type)
    network = [(name,) for name in ("gate_proj", "up_proj", "down_proj") if name in one.arch.linears()]
    plan = linear_plan(
        one,
        {0: [("q_proj", "k_proj", "v_proj"), ("o_proj",), *network], 1: [("q_proj",), ("v_proj",), ("o_proj",)]},
        gated=(1,),
    )
    out = one.export(plan, tmp_path / "out")
    expected = sparse_logits(one, plan)
    assert (
        np.abs(expected - one.model(torch.from_numpy(TOKENS)).logits.detach().numpy()).max() > 0.1
    )  # the gating matters
    dropped = []
    for site in (
        Site(0, kind="linear:down_proj"),
        Site(1, kind="linear:v_proj"),
    ):  # a channel that is often kept, left out besides
        tau = plan[site].gating.tau
        with gating(one, plan) as model:
            x = seen(
                model, one.arch.block_prefix(site.layer) + one.arch.linears()[site.kind.removeprefix("linear:")][0]
            )
        kept = torch.where(x.abs() > tau, x.abs(), 0).sum(0)
        channel = kept.argsort()[3 * len(kept) // 4]
        dropped.append(
            sparse_logits(
                one, plan | {site: SitePlan(gate=Threshold("input", tau.index_fill(0, channel, float("inf")), 0.6))}
            )
        )
    for native in {None, library()}:
        logits = run(out, native=native)
        assert np.abs(logits - expected).max() <= BOUND, native
        assert all(np.abs(logits - other).max() > 10 * BOUND for other in dropped), "a dropped channel must be seen"
    tokens = generate(out, TOKENS[0, :12], 12)
    teacher = sparse_logits(one, plan, np.concatenate([TOKENS[0, :12], tokens])[None])[0]
    predicted = teacher[11 : 11 + len(tokens)]
    assert (predicted[np.arange(len(tokens)), tokens] >= predicted.max(axis=1) - BOUND).all()


def test_file_with_both_ops(tiny, tmp_path):
    """Names, functions, metadata and weights: qwen2 has biases on q, k and v and none on o."""
    one = tiny("qwen2")
    plan = linear_plan(
        one,
        {0: [("q_proj", "k_proj", "v_proj"), ("o_proj",)], 1: [("q_proj",), ("v_proj",), ("down_proj",)]},
        gated=(0,),
    )
    out = one.export(plan, tmp_path / "out")
    proto = onnx.load(out / "model.onnx", load_external_data=False)
    assert [(f.name, f.overload) for f in proto.functions] == [
        ("GatedMLP", ""),
        ("SparseLinear", "v0"),
        ("SparseLinear", "v1"),
    ]
    gate = Variant("silu", "gate", "float", ("w_gate", "w_up", "w_down", "tau"))
    linears = [sparse_linear.Variant("float", roles) for roles in (("w", "b", "tau"), ("w", "tau"))]
    assert json.loads(onnx_metadata(out)) == [variant.name for variant in (gate, *linears)]
    nodes = {node.name: node for node in proto.graph.node}
    ops = {name: node.overload for name, node in nodes.items() if node.op_type == "SparseLinear"}
    layer = "/model/layers.{}/{}/SparseLinear".format
    expected = {
        layer(0, "attn/qkv_proj"): "v0",
        layer(0, "attn/o_proj"): "v1",
        layer(1, "attn/q_proj"): "v0",
        layer(1, "attn/v_proj"): "v0",
    }
    assert ops == expected | {layer(1, "mlp/down_proj"): "v1"}
    join = nodes["/model/layers.1/attn/Concat"]
    assert list(join.input) == [f"/model/layers.1/attn/{name}_proj/output_0" for name in "qkv"]
    assert nodes["/model/layers.1/attn/k_proj/Add"].output[0] == join.input[1]
    assert nodes["/model/layers.1/attn/GroupQueryAttention"].input[0] == join.output[0]
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in proto.graph.value_info
    }
    assert [shapes[name][2] for name in (*join.input, join.output[0])] == [D, D // 2, D // 2, 2 * D]
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor, str(out)) for tensor in proto.graph.initializer}
    weights = load_file(one.checkpoint / "model.safetensors")
    attention = "model.layers.{}.self_attn.".format
    packed = [weights[attention(0) + f"{name}_proj.weight"].T for name in "qkv"]
    assert np.array_equal(stored[attention(0) + "qkv_proj.SparseLinear.w"], np.concatenate(packed, axis=1))
    for name, w, b in (
        ("q", "SparseLinear.w", "SparseLinear.b"),
        ("k", "MatMul.weight", "Add.bias"),
        ("v", "SparseLinear.w", "SparseLinear.b"),
    ):
        assert np.array_equal(stored[f"{attention(1)}{name}_proj.{w}"], weights[f"{attention(1)}{name}_proj.weight"].T)
        assert np.array_equal(stored[f"{attention(1)}{name}_proj.{b}"], weights[f"{attention(1)}{name}_proj.bias"])
    assert np.array_equal(
        stored["model.layers.1.mlp.down_proj.SparseLinear.w"], weights["model.layers.1.mlp.down_proj.weight"].T
    )
    assert not any(".attn.qkv_proj." in name for name in stored), "the packed weights are gone"
    assert executor(out).kernel and len(variants(out)) == 3
    newer = proto.metadata_props[[entry.key for entry in proto.metadata_props].index(METADATA)]
    newer.value = newer.value.replace(
        "SparseLinear.1/float/x=float32,w=float32/w+tau", "SparseLinear.1/int4_g32/x=float32,w=float32/w+tau"
    )
    onnx.save(proto, out / "model.onnx")
    assert (
        not executor(out).kernel
        and "no CPUExecutionProvider kernel for SparseLinear.1/int4_g32" in executor(out).reason
    )


def test_network_gated_as_a_whole_excludes_its_linears(tiny, tmp_path):
    plan: Plan = {
        Site(0): SitePlan(gate=Threshold("gate", uniform_tau(0.1, N), 0.5)),
        Site(0, kind="linear:up_proj"): SitePlan(gate=Threshold("input", uniform_tau(0.1, D), 0.5)),
    }
    with pytest.raises(InputError, match="must exclude the linear sites inside it, got up_proj"):
        tiny("llama").export(plan, tmp_path / "out")


Q = Site(0, kind="linear:q_proj")


@pytest.mark.parametrize(
    ("site", "entry", "match"),
    [
        (Site(0), SitePlan((Swap("relu"), Swap("relu")), Exact()), "got swap, swap, exact"),
        (Site(0), SitePlan((Swap("relu"),)), "got none"),
        (Site(0), SitePlan((Swap("silu"),), Exact()), "activation must have exact zeros .*, got silu"),
        (Site(0), SitePlan(), "got none"),
        (
            Site(0),
            SitePlan(gate=Threshold("magnitude", uniform_tau(0.1, N), 0.5)),
            "score must be gate or input to be exported, got magnitude",
        ),
        (
            Site(0),
            SitePlan(gate=Threshold("gate", uniform_tau(0.1, N - 1), 0.5)),
            r"tau must have shape \[176\], got \[175\]",
        ),
        (Site(0), SitePlan(gate=Threshold("gate", uniform_tau(float("nan"), N), 0.5)), "got NaN"),
        (
            Site(0),
            SitePlan(gate=Predictor(torch.zeros(R, D), torch.zeros(R, N), uniform_tau(0.1, N), 0.5)),
            r"p2 must have shape \[176, 8\]",
        ),
        (
            Site(2),
            SitePlan(gate=Threshold("gate", uniform_tau(0.1, N), 0.5)),
            "sites of layers.0 to layers.1, got layers.2.ffn",
        ),
        (Site(0, 3), SitePlan(gate=Threshold("gate", uniform_tau(0.1, N), 0.5)), "got layers.0.experts.3.ffn"),
        (Site(0, kind="attn"), SitePlan(gate=Threshold("gate", uniform_tau(0.1, 4), 0.5)), "got layers.0.attn"),
        (Q, SitePlan(gate=Threshold("input", uniform_tau(0.1, D + 1), 0.5)), r"tau must have shape \[64\], got \[65\]"),
        (
            Q,
            SitePlan(gate=Threshold("gate", uniform_tau(0.1, D), 0.5)),
            "score of layers.0.linear.q_proj must be input",
        ),
        (
            Site(0),
            SitePlan(gate=Threshold("input", uniform_tau(0.1, N), 0.5)),
            "score of layers.0.ffn must be of neurons",
        ),
        (
            Site(2, kind="linear:q_proj"),
            SitePlan(gate=Threshold("input", uniform_tau(0.1, D), 0.5)),
            "got layers.2.linear.q_proj",
        ),
    ],
)
def test_bad_plans_are_refused(tiny, site, entry, match):
    one = tiny("llama")
    with pytest.raises(InputError, match=match):
        emissions({site: entry}, one.arch, one.config)


def test_base_folder_is_never_overwritten(tiny):
    one = tiny("llama")
    with pytest.raises(InputError, match="another one than the base graph's"):
        one.export({}, one.base)


def test_full_disk_is_said(tiny, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(surgery.ir, "save", fail)
    with pytest.raises(InputError, match="Disk space"):
        tiny("llama").export({}, tmp_path / "out")


def test_weights_stream_through_memory(tmp_path, monkeypatch):
    """The Python memory that export allocates stays near one weight, although the model has twelve, and no weight stays
    mapped once it is written.
    """
    one = open_tiny(
        "llama", make_model("llama", tmp_path / "model", num_hidden_layers=4, intermediate_size=4096), tmp_path / "base"
    )
    plan: Plan = {
        site: SitePlan(gate=Threshold("gate", uniform_tau(0.1, 4096), 0.5)) for site in one.arch.sites(one.config)
    }
    weight = 4 * D * 4096  # bytes
    data = one.base / "model.onnx.data"
    assert data.stat().st_size > 12 * weight
    mapped = []
    monkeypatch.setattr(
        surgery, "_check", lambda _folder: mapped.append(Path("/proc/self/maps").read_text().count(str(data)))
    )
    checkpoint = put_plan(one.checkpoint, plan, tmp_path / "out")
    graph_header(open_source(checkpoint, sparse=True))  # its files are hashed once, 4 MB at a time
    tracemalloc.start()
    try:
        export(checkpoint, tmp_path / "out", base=one.base)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * weight, f"{peak / weight:.1f} weights"
    assert mapped == [0]

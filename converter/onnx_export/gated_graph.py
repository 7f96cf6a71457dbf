"""Replaces MLP regions of a base graph by `ai.sparsegate:GatedMLP` nodes, linears by `SparseLinear` nodes, and writes
the model that applications open.

Every weight is read from the base graph's data file, converted, and written to the new one tensor by tensor, so that
the memory in use does not grow with the model.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.ops import gated_mlp, sparse_linear
from ...runtime_onnx.ops.vocabulary import GROUP
from ..arch import Arch
from ..arch.site import Site
from ..checkpoint.stage import HEADER, disk_full, is_disk_full
from .base_graph import DATA, MODEL
from .emit import Emission
from .linear_region import LinearRegion, Part, find_linears
from .matmul_nbits import ACCURACY, initialiser, quantise_rest
from .mlp_region import MlpRegion, find_regions
from .names import ATTENTION, linear_node, linear_place, mlp_node
from .precision import PRECISIONS, Precision
from .stored_values import DTYPES, store_predictor
from .tensors import moved, quantised

METADATA = "ai.sparsegate.variants"
"""Key of the model's metadata: a JSON list of the names of the ops' variants in the file."""

_LOG = logging.getLogger("sparsegate")
Variant = gated_mlp.Variant | sparse_linear.Variant

# bytes; the native kernel reads rows straight from the mapped file, so tensors start on pages and rows on cache lines
_PAGE = 4096
_ROLES = {"gate": ("w_gate", "b_gate"), "up": ("w_up", "b_up"), "down": ("w_down", "b_down")}


def gate_graph(
    model: ir.Model, emissions: Mapping[Site, Emission], arch: Arch, config: Any, precision: str, target: str = "cpu"
) -> None:
    """Put the ops of a plan (`emit.emissions`) into the float graph of a model, which is changed in place; `precision`
    is a row of PRECISIONS.

    1. A feed-forward site gets one GatedMLP node, weights [n, d] neuron-major, with another activation where the plan
       swaps it.
    2. A linear site gets one SparseLinear node, weight [d_in, d_out] input-major. A packed weight is cut into one node
       per linear where their thresholds differ.
    3. Each variant of an op gets one model-local function, so that the graph runs with and without the native library.
    4. Sites that are not in the plan stay as they are.

    Raises InputError for a graph without closed MLP regions or without the linears' products.
    """
    form = PRECISIONS[precision]
    nodes: dict[ir.Node, Variant] = {}
    gated = [site for site in emissions if site.kind == "ffn"]
    regions = {region.layer: region for region in find_regions(model, arch, config)} if gated else {}
    for site in gated:
        node, variant = _replace(model.graph, regions[site.layer], arch, arch.activation(config), emissions[site], form)
        nodes[node] = variant
    for layer in sorted({site.layer for site in emissions}):
        tau = {
            site.kind.removeprefix("linear:"): emission.tensors["tau"]
            for site, emission in emissions.items()
            if site.layer == layer and site.kind != "ffn"
        }
        for linear in find_linears(model.graph, arch, config, layer, tau):
            nodes |= _replace_linear(model.graph, linear, arch, form)
    if form.bits is not None:
        quantise_rest(model, form.bits, ACCURACY[target])
    _declare(model, nodes)


def export_dense(base: Path, out: Path, precision: str, target: str = "cpu") -> None:
    """Write the dense graph of an integer precision into `out`: what the speed and the losses of a sparse one are
    compared with.
    """
    form = PRECISIONS[precision]
    assert form.bits is not None
    model = ir.load(base / MODEL)
    quantise_rest(model, form.bits, ACCURACY[target])
    save_graph(model, base, out)


def _replace(
    graph: ir.Graph, region: MlpRegion, arch: Arch, base: str, emission: Emission, form: Precision
) -> tuple[ir.Node, gated_mlp.Variant]:
    """Put one GatedMLP node in a region's place, of the activation `base` where the emission has no other."""
    stored, p = store_predictor(emission.tensors, form)
    tensors: dict[str, ir.TensorProtocol] = {role: ir.Tensor(array) for role, array in stored.items()}
    down = region.weights["down"].const_value
    assert down is not None
    weights = _format(form, int(down.shape.numpy()[1]), arch.ffn_module(region.layer))
    for part, value in region.weights.items():
        if weights == "float":
            tensors[_ROLES[part][0]] = moved(value, transpose=part != "down", dtype=DTYPES[form.w])
        else:
            tensors[_ROLES[part][0]], tensors[f"s_{part}"] = quantised(value, weights, transpose=part != "down")
    for part, value in region.biases.items():
        own = moved(value, dtype=ir.DataType.FLOAT)
        more = emission.tensors.get(_ROLES[part][1])
        tensors[_ROLES[part][1]] = own if more is None else ir.Tensor(own.numpy() + more)
    roles = tuple(role for role in gated_mlp.ROLES if role in tensors)
    try:
        variant = gated_mlp.Variant(
            emission.activation or base, emission.score, weights, roles, x=_dtype(region.x), w=form.w, p=p
        )
    except ValueError as error:
        raise InputError(f"The op must be able to compute layers.{region.layer}.ffn, got: {error}") from None
    inputs = [
        region.x,
        *(
            initialiser(graph, f"{arch.ffn_module(region.layer)}.{gated_mlp.NAME}.{role}", tensors[role])
            for role in roles
        ),
    ]
    y = ir.Value(name=region.y.name, shape=region.y.shape, type=region.y.type)
    attributes = ir.convenience.convert_attributes(variant.attributes())
    node = ir.Node(gated_mlp.DOMAIN, gated_mlp.NAME, inputs, attributes, outputs=[y], name=mlp_node(arch, region.layer))
    ir.convenience.replace_nodes_and_values(graph, region.nodes[-1], region.nodes, [node], [region.y], [y])
    _drop(graph, [*region.weights.values(), *region.biases.values()])
    return node, variant


def _replace_linear(graph: ir.Graph, region: LinearRegion, arch: Arch, form: Precision) -> dict[ir.Node, Variant]:
    """Put one SparseLinear node, or one dense product, per part in a product's place, and join them where there are
    several.
    """
    product, old = region.product, region.product.out
    y = ir.Value(name=old.name, shape=old.shape, type=old.type)
    variants: dict[ir.Node, Variant] = {}
    nodes: list[ir.Node] = []
    results: list[ir.Value] = []
    first = region.parts[0]
    for part in region.parts:
        out = y
        if len(region.parts) > 1:
            shape = None if old.shape is None else ir.Shape([*old.shape[:-1], part.columns.stop - part.columns.start])
            out = ir.Value(name=f"{linear_place(region.layer, part.names)}/output_0", shape=shape, type=old.type)
        made, variant = _part(graph, region, part, arch, out, form)
        nodes += made
        results.append(out)
        if variant is not None:
            variants[made[-1]] = variant
    if len(results) > 1:
        name = f"{linear_place(region.layer, first.names).rpartition('/')[0]}/Concat"
        nodes.append(ir.Node("", "Concat", results, [ir.AttrInt64("axis", -1)], outputs=[y], name=name))
    ir.convenience.replace_nodes_and_values(graph, product.nodes[-1], product.nodes, nodes, [old], [y])
    _drop(graph, [product.weight, *([] if product.bias is None else [product.bias])])
    return variants


def _part(
    graph: ir.Graph, region: LinearRegion, part: Part, arch: Arch, out: ir.Value, form: Precision
) -> tuple[list[ir.Node], Variant | None]:
    """The nodes that compute a part's columns, its op last, and the op's variant; a part without a threshold is a
    MatMul with the Add of its bias.
    """
    product, columns = region.product, part.columns if len(region.parts) > 1 else None
    module = arch.attn_module(region.layer) if part.names[0] in ATTENTION else arch.ffn_module(region.layer)
    prefix, name = f"{module}.{part.name}.", linear_place(region.layer, part.names)
    if part.tau is None:
        tensors = {"w": moved(product.weight, columns=columns)}
        if product.bias is not None:
            tensors["b"] = moved(product.bias, columns=columns)
        inputs = [
            initialiser(graph, f"{prefix}{op}", tensors[role])
            for role, op in (("w", "MatMul.weight"), ("b", "Add.bias"))
            if role in tensors
        ]
        if len(inputs) == 1:
            return [ir.Node("", "MatMul", [product.x, inputs[0]], outputs=[out], name=f"{name}/MatMul")], None
        inner = ir.Value(name=f"{name}/MatMul/output_0", shape=out.shape, type=out.type)
        matmul = ir.Node("", "MatMul", [product.x, inputs[0]], outputs=[inner], name=f"{name}/MatMul")
        return [matmul, ir.Node("", "Add", [inner, inputs[1]], outputs=[out], name=f"{name}/Add")], None
    weights = _format(form, part.columns.stop - part.columns.start, f"{module}.{part.name}")
    if weights == "float":
        tensors = {"w": moved(product.weight, columns=columns, dtype=DTYPES[form.w])}
    else:
        stored, scale = quantised(product.weight, weights, columns=columns)
        tensors = {"w": stored, "s_w": scale}
    if product.bias is not None:
        tensors["b"] = moved(product.bias, columns=columns, dtype=ir.DataType.FLOAT)
    tensors["tau"] = ir.Tensor(part.tau)
    roles = tuple(role for role in sparse_linear.ROLES if role in tensors)
    variant = sparse_linear.Variant(weights, roles, x=_dtype(product.x), w=form.w)
    inputs = [product.x, *(initialiser(graph, f"{prefix}{sparse_linear.NAME}.{role}", tensors[role]) for role in roles)]
    attributes = ir.convenience.convert_attributes(variant.attributes())
    return [
        ir.Node(
            sparse_linear.DOMAIN,
            sparse_linear.NAME,
            inputs,
            attributes,
            outputs=[out],
            name=linear_node(region.layer, part.names),
        )
    ], variant


def _format(form: Precision, width: int, where: str) -> str:
    """The weight format of an op, with a line where it is not the precision's own."""
    fitting = form.fitting(width)
    if fitting != form.weights:
        _LOG.warning(
            "%s is stored as %s: %s needs rows of a multiple of %d values, got %d.",
            where,
            fitting,
            form.weights,
            GROUP,
            width,
        )
    return fitting


def _dtype(x: ir.Value) -> str:
    """The name of an op's input dtype."""
    return (x.dtype or ir.DataType.FLOAT).numpy().name


def _drop(graph: ir.Graph, values: list[ir.Value]) -> None:
    """Take out initialisers that nothing reads any more."""
    for value in values:
        if not value.uses() and value.name is not None:
            graph.initializers.pop(value.name)


def _declare(model: ir.Model, nodes: Mapping[ir.Node, Variant]) -> None:
    """Add the ops' functions, one overload per variant of an op, their opset and the list of variants to the model."""
    variants = list(dict.fromkeys(nodes.values()))
    for op in (gated_mlp, sparse_linear):
        of_op = [variant for variant in variants if isinstance(variant, op.Variant)]
        overloads = {variant: f"v{index}" if len(of_op) > 1 else "" for index, variant in enumerate(of_op)}
        for variant, overload in overloads.items():
            function = ir.from_proto(op.function(variant, overload, model.opset_imports[""]))
            model.functions[function.identifier()] = function
        for node, variant in nodes.items():
            if variant in overloads:
                node.overload = overloads[variant]
        if of_op:
            model.opset_imports[op.DOMAIN] = op.VERSION
    model.metadata_props[METADATA] = json.dumps([variant.name for variant in variants])


def save_graph(model: ir.Model, base: Path, out: Path) -> None:
    """Write model.onnx and its one data file to `out`, which is made if missing, checked by onnx, and copy the other
    files of `base`, the folder that the graph was read from. Raises DiskFull.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        ir.save(model, out / MODEL, external_data=DATA, size_threshold_bytes=0, alignment=_PAGE, align_threshold=_PAGE)
        for path in sorted(base.iterdir()):
            if path.is_file() and path.name not in (MODEL, DATA, HEADER):
                shutil.copyfile(path, out / path.name)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(out) from error
        raise
    _check(out)


def _check(folder: Path) -> None:
    """Run onnx.checker on the folder's model, data file included.

    ONNX Runtime has one op of its own in ONNX's domain, SimplifiedLayerNormalization; the checker sees a copy in which
    it stands in ORT's domain.
    """
    proto = onnx.load(folder / MODEL, load_external_data=False)
    for node in proto.graph.node:
        if not node.domain and node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"
    copy = folder / f"{MODEL}.check"
    try:
        onnx.save(proto, copy, format="protobuf")
        onnx.checker.check_model(copy)
    finally:
        copy.unlink(missing_ok=True)

"""Replaces the MLP regions of a base graph by `ai.sparsegate:GatedMLP` nodes and writes the model that applications open.

Every weight is read from the base graph's data file and written to the new one tensor by tensor, so that the memory in use does not grow with the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from ...runtime_onnx.ops import gated_mlp
from ..arch import Arch
from ..artifact import InputError, disk_full, is_disk_full
from ..plans import Plan
from .base_graph import DATA, MODEL
from .emit import emit
from .mlp_region import MlpRegion, find_regions

METADATA = "ai.sparsegate.variants"
"""Key of the model's metadata: a JSON list of the names of the op's variants in the file."""

_PAGE = 4096  # bytes; the native kernel reads rows straight from the mapped file, so tensors start on pages and rows on cache lines
_ROLES = {"gate": ("w_gate", "b_gate"), "up": ("w_up", "b_up"), "down": ("w_down", "b_down")}


def export(base: Path, plan: Plan, arch: Arch, config: Any, out: Path) -> None:
    """Write the base graph in `base` with the plan's sites gated into `out`, with genai_config.json and the tokenizer's files; `out` is made if missing.

    The graph gets one GatedMLP node per site in the plan, weights [n, d] neuron-major, and one model-local function per variant of the op, so that it runs with
    and without the native library. Sites that are not in the plan stay as they are.

    Raises InputError for a plan that names no site of the model or that the op cannot express, for a base graph without closed MLP regions, for `out` equal to
    `base`, and when the disk is full.
    """
    if out.resolve() == base.resolve():
        raise InputError(f"The exported folder must be another one than the base graph's, got {out} for both. Choose another folder.")
    model = ir.load(base / MODEL)
    regions = {region.layer: region for region in find_regions(model, arch, config)}
    strangers = [site.key for site in plan if site.kind != "ffn" or site.expert is not None or site.layer not in regions]
    if strangers:
        raise InputError(
            f"A plan's sites must be layers.0.ffn to layers.{len(regions) - 1}.ffn, got {', '.join(strangers)}. The plan belongs to another model."
        )
    nodes: dict[ir.Node, gated_mlp.Variant] = {}
    for site in sorted(plan):
        emission = emit(site, plan[site], arch.size(config, "hidden"), arch.size(config, "units"))
        node, variant = _replace(model.graph, regions[site.layer], arch, emission.score, arch.activation(config), emission.tensors)
        nodes[node] = variant
    _declare(model, nodes)
    out.mkdir(parents=True, exist_ok=True)
    _save(model, base, out)


def _replace(
    graph: ir.Graph, region: MlpRegion, arch: Arch, score: str, activation: str, tensors: Mapping[str, NDArray[np.float32]]
) -> tuple[ir.Node, gated_mlp.Variant]:
    """Put one GatedMLP node in a region's place; tensors are the score's inputs by role."""
    prefix = f"{arch.ffn_module(region.layer)}.{gated_mlp.NAME}."
    given: dict[str, ir.TensorProtocol] = {role: ir.Tensor(array, name=prefix + role) for role, array in tensors.items()}
    for part, value in region.weights.items():
        given[_ROLES[part][0]] = _moved(value, prefix + _ROLES[part][0], transpose=part != "down")
    for part, value in region.biases.items():
        given[_ROLES[part][1]] = _moved(value, prefix + _ROLES[part][1], transpose=False)
    roles = tuple(role for role in gated_mlp.ROLES if role in given)
    x, w = (dtype.numpy().name for dtype in (region.x.dtype or ir.DataType.FLOAT, given["w_up"].dtype))
    variant = gated_mlp.Variant(activation, score, "float", roles, x=x, w=w)
    inputs = [region.x]
    for role in roles:
        value = ir.Value(name=prefix + role, shape=ir.Shape(given[role].shape.numpy()), type=ir.TensorType(given[role].dtype), const_value=given[role])
        graph.register_initializer(value)
        inputs.append(value)
    y = ir.Value(name=region.y.name, shape=region.y.shape, type=region.y.type)
    name = f"/model/layers.{region.layer}/{arch.ffn.module}/{gated_mlp.NAME}"
    node = ir.Node(gated_mlp.DOMAIN, gated_mlp.NAME, inputs, ir.convenience.convert_attributes(variant.attributes()), outputs=[y], name=name)
    ir.convenience.replace_nodes_and_values(graph, region.nodes[-1], region.nodes, [node], [region.y], [y])
    for value in (*region.weights.values(), *region.biases.values()):
        if not value.uses() and value.name is not None:
            graph.initializers.pop(value.name)
    return node, variant


def _moved(value: ir.Value, name: str, transpose: bool) -> ir.TensorProtocol:
    """An initialiser's tensor under a new name, read from the base graph's data file only while it is written."""
    source = value.const_value
    assert source is not None
    if not transpose and isinstance(source, ir.ExternalTensor):
        return ir.ExternalTensor(source.location, source.offset, source.length, source.dtype, shape=source.shape, name=name, base_dir=source.base_dir)

    def read() -> ir.Tensor:
        copy = np.ascontiguousarray(source.numpy().T) if transpose else source.numpy().copy()
        if isinstance(source, ir.ExternalTensor):
            source.release()
        return ir.Tensor(copy, dtype=source.dtype, name=name)

    shape = tuple(source.shape.numpy())
    return ir.LazyTensor(read, dtype=source.dtype, shape=ir.Shape(shape[::-1] if transpose else shape), name=name)


def _declare(model: ir.Model, nodes: Mapping[ir.Node, gated_mlp.Variant]) -> None:
    """Add the op's functions, one overload per variant, its opset and the list of variants to the model."""
    variants = list(dict.fromkeys(nodes.values()))
    overloads = {variant: f"v{index}" if len(variants) > 1 else "" for index, variant in enumerate(variants)}
    for variant, overload in overloads.items():
        function = ir.from_proto(gated_mlp.function(variant, overload, model.opset_imports[""]))
        model.functions[function.identifier()] = function
    for node, variant in nodes.items():
        node.overload = overloads[variant]
    if variants:
        model.opset_imports[gated_mlp.DOMAIN] = gated_mlp.VERSION
    model.metadata_props[METADATA] = json.dumps([variant.name for variant in variants])


def _save(model: ir.Model, base: Path, out: Path) -> None:
    """Write model.onnx and its one data file, checked by onnx, and copy the folder's other files."""
    try:
        ir.save(model, out / MODEL, external_data=DATA, size_threshold_bytes=0, alignment=_PAGE, align_threshold=_PAGE)
        for path in sorted(base.iterdir()):
            if path.is_file() and path.name not in (MODEL, DATA, "header.json"):
                shutil.copyfile(path, out / path.name)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(out) from error
        raise
    _check(out)


def _check(folder: Path) -> None:
    """Run onnx.checker on the folder's model, data file included.

    ONNX Runtime has one op of its own in ONNX's domain, SimplifiedLayerNormalization; the checker sees a copy in which it stands in ORT's domain.
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

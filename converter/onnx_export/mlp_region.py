"""Finds each layer's MLP in a base graph, by dataflow from the initialisers that the architecture names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import extract

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.ops import gated_mlp
from ..arch import Arch
from .product import Product, find_product


@dataclass(frozen=True)
class MlpRegion:
    """The nodes between one layer's MLP input x [..., d] and output y [..., d], and what they read.

    Attributes:
        layer: Layer number.
        x: The value that the gate and up products read.
        y: The value that the down product, or its bias, writes.
        nodes: The region's nodes in graph order; nothing outside reads a value that they write, except y.
        weights: Initialisers by role: gate [d, n] (absent in a plain MLP), up [d, n], down [n, d].
        biases: Initialisers by role: gate [n], up [n], down [d]; only those that exist.
    """

    layer: int
    x: ir.Value
    y: ir.Value
    nodes: tuple[ir.Node, ...]
    weights: dict[str, ir.Value]
    biases: dict[str, ir.Value]


def find_regions(model: ir.Model, arch: Arch, config: Any) -> list[MlpRegion]:
    """The MLP region of every layer, in layer order.

    Raises InputError, naming layer and node, when an initialiser is missing or has another shape, when a region is not
    closed, or when it does not compute act(x gate) * (x up) @ down with the configuration's activation.
    """
    order = {node: index for index, node in enumerate(model.graph)}
    activation = arch.activation(config)
    proven: set[tuple] = set()  # op sequences whose arithmetic was run; layers repeat them
    regions = []
    for site in arch.sites(config):
        region, g, u, z = _find(model.graph, arch, config, site.layer, order)
        inner = [node for node in region.nodes if node.op_type not in ("MatMul", "Add")]
        signature = tuple(
            (node.domain, node.op_type, *((name, attr.value) for name, attr in sorted(node.attributes.items())))
            for node in inner
        )
        if signature not in proven:
            _prove(model, region, g, u, z, activation)
            proven.add(signature)
        regions.append(region)
    return regions


def _find(
    graph: ir.Graph, arch: Arch, config: Any, layer: int, order: dict[ir.Node, int]
) -> tuple[MlpRegion, ir.Value | None, ir.Value, ir.Value]:
    """The region of a layer and its inner values: gate and up after their biases, and what the down product reads."""
    d, n = arch.size(config, "hidden"), arch.size(config, "units", layer)
    shapes = {"gate": (d, n), "up": (d, n), "down": (n, d)}
    products = {
        role: find_product(graph, layer, template.format(layer=layer), shapes[role])
        for role, template in arch.ffn.onnx.items()
    }
    up, down, gate = products["up"], products["down"], products.get("gate")
    if gate is not None and gate.x is not up.x:
        raise _error(layer, gate.nodes[0], f"gate and up must read one value, got {gate.x.name} and {up.x.name}")
    starts = [product.out for product in (gate, up) if product is not None]
    inner = _between(layer, starts, down)
    nodes = sorted(
        {node for product in products.values() for node in product.nodes} | set(inner), key=order.__getitem__
    )
    region = MlpRegion(
        layer=layer,
        x=up.x,
        y=down.out,
        nodes=tuple(nodes),
        weights={role: product.weight for role, product in products.items()},
        biases={role: product.bias for role, product in products.items() if product.bias is not None},
    )
    _check_closed(region)
    return region, gate.out if gate else None, up.out, down.x


def _between(layer: int, starts: list[ir.Value], down: Product) -> list[ir.Node]:
    """The nodes on the way from `starts` to the down product's input; they may read nothing else than constants."""
    reachable: set[ir.Node] = set()
    pending = list(starts)
    while pending:
        for node, _ in pending.pop().uses():
            if node not in reachable and node is not down.nodes[0]:
                reachable.add(node)
                pending.extend(node.outputs)
    between: set[ir.Node] = set()
    wanted = [down.x]
    while wanted:
        value = wanted.pop()
        if any(value is start for start in starts) or _is_constant(value):
            continue
        node = value.producer()
        if node is None or node not in reachable:
            raise _error(
                layer,
                node or down.nodes[0],
                f"the MLP must be computed from gate and up alone, got {value.name} as a further input",
            )
        if node not in between:
            between.add(node)
            wanted.extend(operand for operand in node.inputs if operand is not None)
    return list(between)


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return value.is_initializer() or (producer is not None and producer.op_type == "Constant")


def _check_closed(region: MlpRegion) -> None:
    inside = set(region.nodes)
    for node in region.nodes:
        if node.name and f"layers.{region.layer}/" not in node.name:
            raise _error(region.layer, node, "the MLP's nodes must be named after their layer, got another name")
        for value in node.outputs:
            if value is region.y:
                continue
            outside = [user.name for user, _ in value.uses() if user not in inside]
            if outside or value.is_graph_output():
                raise _error(
                    region.layer,
                    node,
                    f"the MLP must be closed, got {value.name} read by "
                    f"{', '.join(filter(None, outside)) or 'the graph output'}",
                )


def _error(layer: int, node: ir.Node, what: str) -> InputError:
    return InputError(
        f"Layer {layer}, node {node.name}: {what}. This base graph cannot be gated; another version of "
        "onnxruntime-genai may build it otherwise."
    )


def _prove(model: ir.Model, region: MlpRegion, g: ir.Value | None, u: ir.Value, z: ir.Value, activation: str) -> None:
    """Run the nodes between the products on random numbers and compare with the op's reference, so that another
    activation cannot pass unseen.
    """
    from .base_graph import open_session

    down = region.weights["down"].const_value
    assert down is not None
    n = int(down.shape.numpy()[0])
    random = np.random.default_rng(0)
    x = random.uniform(0.5, 2.0, (3, 1)).astype(np.float32)
    tensors = {role: (2 * random.standard_normal((n, 1))).astype(np.float32) for role in ("w_gate", "w_up", "w_down")}
    graph = extract(model.graph, [value for value in (g, u) if value is not None], [z])
    part = ir.Model(graph, ir_version=model.ir_version)
    graph.opset_imports.update(model.opset_imports)
    ir.external_data.load_to_model(part)
    _widen(graph)
    feeds = {u.name: x @ tensors["w_up"].T} | ({} if g is None else {g.name: x @ tensors["w_gate"].T})
    run = open_session(ir.to_proto(part).SerializeToString()).run(
        None, {name: value[None].astype(np.float32) for name, value in feeds.items()}
    )
    got = run[0][0].astype(np.float64) @ tensors["w_down"]
    roles = tuple(role for role in ("w_gate", "w_up", "w_down") if g is not None or role != "w_gate")
    expected = gated_mlp.reference(gated_mlp.Variant(activation, "all", "float", roles), x, tensors)
    error = float(np.abs(got - expected).max() / np.abs(expected).max())
    if not error <= 1e-5:
        raise _error(
            region.layer,
            region.nodes[-1],
            f"the MLP must compute {activation} of gate times up, got other numbers (relative error {error:.1e})",
        )


def _widen(graph: ir.Graph) -> None:
    """Make a graph of half precision float32, so that the CPU runs it: the arithmetic is judged, not its rounding."""
    half = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    for value in (*graph.inputs, *(out for node in graph for out in node.outputs)):
        if value.dtype in half:
            value.dtype = ir.DataType.FLOAT
    for value in graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in half:
            value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.dtype = ir.DataType.FLOAT

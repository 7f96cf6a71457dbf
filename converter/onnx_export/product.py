"""The products of a base graph: a MatMul that reads one initialiser, with the Add of its bias."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ...runtime_onnx.errors import InputError


@dataclass(frozen=True)
class Product:
    """out = x @ weight (+ bias): weight [d_in, d_out] and bias [d_out] are initialisers, nodes the MatMul and the
    bias's Add.
    """

    x: ir.Value
    out: ir.Value
    nodes: tuple[ir.Node, ...]
    weight: ir.Value
    bias: ir.Value | None


def find_product(graph: ir.Graph, layer: int, name: str, shape: tuple[int, int]) -> Product:
    """The MatMul that reads the initialiser `name` of shape [d_in, d_out], with the Add of a bias right after it.

    Raises InputError, naming the layer, when there is no such initialiser or another node reads it.
    """
    weight = graph.initializers.get(name)
    if weight is None or weight.const_value is None:
        raise InputError(
            f"Layer {layer} of the base graph must have the initialiser {name}, got none. The builder or the "
            "architecture file names it otherwise."
        )
    uses = list(weight.uses())
    if len(uses) != 1 or uses[0].idx != 1 or (uses[0].node.domain, uses[0].node.op_type) != ("", "MatMul"):
        readers = ", ".join(f"{node.op_type} {node.name}" for node, _ in uses) or "nothing"
        raise InputError(
            f"Layer {layer} of the base graph must read {name} in one MatMul, got {readers}. Export a float base graph."
        )
    if tuple(weight.const_value.shape.numpy()) != shape:
        raise InputError(
            f"Layer {layer}'s {name} must have shape {list(shape)}, got {weight.const_value.shape}. The graph belongs "
            "to another model."
        )
    matmul = uses[0].node
    x, out = matmul.inputs[0], matmul.outputs[0]
    assert x is not None
    readers = list(out.uses())
    if len(readers) == 1 and readers[0].node.op_type == "Add":
        add = readers[0].node
        bias = add.inputs[1 - readers[0].idx]
        if bias is not None and bias.const_value is not None and tuple(bias.const_value.shape.numpy()) == shape[1:]:
            return Product(x, add.outputs[0], (matmul, add), weight, bias)
    return Product(x, out, (matmul,), weight, None)

"""The rest of a graph in 8 or 4 bits: every product with a constant matrix becomes com.microsoft:MatMulNBits, as
onnxruntime-genai's builder writes it.

The builder itself hands its float graph to onnxruntime's quantiser; here the same quantiser gets one matrix at a time,
so that memory does not grow with the model. Blocks of 32 values along a product's input, symmetric; of a tied embedding
4 bits are shared with the output's product, with 8 bits it stays float.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from ...runtime_onnx.errors import InputError
from .tensors import matrix, moved, pair

BLOCK = 32
"""Values per scale."""
ACCURACY = {"cpu": 4, "cuda": 0}
"""MatMulNBits' accuracy level by target, as the builder chooses it: 4 rounds activations to 8 bits in blocks, 0 leaves
them in floating point.
"""
FOLDER_ENTRY = "session.model_external_initializers_file_folder_path"
"""Session option that says where the weights of a graph in memory lie."""
_MIDDLE = {4: 8, 8: 128}  # what stands for zero


def quantise_rest(model: ir.Model, bits: int, accuracy: int) -> None:
    """Replace every MatMul with a constant matrix [K, N]: weight uint8 [N, K / 32, 32 * bits / 8], scales [N, K / 32]
    in the matrix's dtype.
    """
    for node in list(model.graph):
        weight = node.inputs[1] if (node.domain, node.op_type) == ("", "MatMul") else None
        if weight is not None and weight.const_value is not None and len(weight.const_value.shape) == 2:
            _replace(model.graph, node, weight, bits, accuracy)


def _replace(graph: ir.Graph, node: ir.Node, weight: ir.Value, bits: int, accuracy: int) -> None:
    source = weight.const_value
    assert source is not None and weight.name is not None
    k, n = (int(size) for size in source.shape.numpy())
    blocks = -(-k // BLOCK)
    integers, scales = pair(
        lambda: _blocks(source, bits), (ir.DataType.UINT8, [n, blocks, BLOCK * bits // 8]), (source.dtype, [n, blocks])
    )
    packed = initialiser(graph, f"{weight.name}_Q{bits}", integers)
    scale = initialiser(graph, f"{weight.name}_scales", scales)
    attributes: dict[str, Any] = {
        "K": k,
        "N": n,
        "bits": bits,
        "block_size": BLOCK,
        **({"accuracy_level": accuracy} if accuracy else {}),
    }
    old = node.outputs[0]
    out = ir.Value(name=old.name, shape=old.shape, type=old.type)
    made = ir.Node(
        "com.microsoft",
        "MatMulNBits",
        [node.inputs[0], packed, scale],
        ir.convenience.convert_attributes(attributes),
        outputs=[out],
        name=f"{node.name}_Q{bits}",
    )
    ir.convenience.replace_nodes_and_values(graph, node, [node], [made], [old], [out])
    for user, _ in list(weight.uses()):
        _replace_embedding(graph, user, weight, packed, scale, bits, k % BLOCK == 0)
    graph.initializers.pop(weight.name)


def _replace_embedding(
    graph: ir.Graph, transpose: ir.Node, weight: ir.Value, packed: ir.Value, scale: ir.Value, bits: int, whole: bool
) -> None:
    """Give a tied embedding, which gathers columns of the output's matrix, what it reads: the output's own 4 bits, or
    floats of its own.
    """
    flat = transpose.outputs[0]
    (gather,) = flat.consumers()
    if (transpose.op_type, gather.op_type) != ("Transpose", "Gather"):
        raise InputError(
            f"{weight.name} must be read by a product and an embedding, got {transpose.op_type} {transpose.name}. "
            "Export in fp16 or fp32."
        )
    if bits == 4 and whole:
        n, blocks, width = (int(size) for size in packed.const_value.shape.numpy())  # type: ignore[union-attr]
        constant = ir.Node(
            "", "Constant", [], [ir.AttrInt64s("value_ints", [n, blocks * width])], name="/model/embed_tokens/Constant"
        )
        shape = constant.outputs[0]
        shape.name = "/model/embed_tokens/Constant/output_0"
        rows = ir.Value(
            name="/model/embed_tokens/Reshape/output_0",
            shape=ir.Shape([n, blocks * width]),
            type=ir.TensorType(ir.DataType.UINT8),
        )
        reshape = ir.Node("", "Reshape", [packed, shape], outputs=[rows], name="/model/embed_tokens/Reshape")
        old = gather.outputs[0]
        out = ir.Value(name=old.name, shape=old.shape, type=old.type)
        attributes = ir.convenience.convert_attributes(
            {"bits": bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        )
        made = ir.Node(
            "com.microsoft",
            "GatherBlockQuantized",
            [rows, gather.inputs[1], scale],
            attributes,
            outputs=[out],
            name="/model/embed_tokens/GatherBlockQuantized",
        )
        ir.convenience.replace_nodes_and_values(
            graph, gather, [gather, transpose], [constant, reshape, made], [old], [out]
        )
        return
    table = initialiser(graph, "model.embed_tokens.weight", moved(weight, transpose=True))
    gather.replace_input_with(0, table)
    graph.remove(transpose, safe=True)


def initialiser(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initialiser of a graph."""
    tensor.name = name
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _blocks(source: ir.TensorProtocol, bits: int) -> tuple[NDArray[np.uint8], NDArray]:
    kept = source.dtype if source.dtype == ir.DataType.FLOAT16 else ir.DataType.FLOAT
    packed, scales = block_quantise(matrix(source, dtype=kept), bits)
    return packed, scales.astype(source.dtype.numpy(), copy=False)


def block_quantise(weight: NDArray, bits: int) -> tuple[NDArray[np.uint8], NDArray]:
    """(packed uint8 [N, K / 32, 32 * bits / 8], scales [N, K / 32]) of a matrix [K, N] in float32 or float16, by
    onnxruntime's own quantiser.
    """
    packed, scales, _ = _quantiser(bits).qbits_block_quant(weight)
    return packed, scales


def block_rounded(weight: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """A matrix [N, K], as torch keeps it, with the values that MatMulNBits reads."""
    packed, scales = block_quantise(np.ascontiguousarray(weight.T), bits)
    q = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], BLOCK)
    values = (q.astype(np.float32) - _MIDDLE[bits]) * scales.astype(np.float32)[..., None]
    return values.reshape(len(values), -1)[:, : weight.shape[1]]


@cache
def _quantiser(bits: int) -> Any:
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )
    except ImportError as error:
        raise InputError(
            f"ONNX export in {bits} bits must find onnxruntime's quantiser, got {error}. Install it with: pip install "
            "'sparsegate[cpu]'"
        ) from None
    return DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits))


def keep_activations(proto: onnx.ModelProto) -> None:
    """Take the accuracy level off every MatMulNBits, so that activations stay in float32."""
    for node in proto.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend(kept)


def open_float(folder: Path) -> Any:
    """A plain CPU session of an ONNX folder, without the native library, in which MatMulNBits leaves its activations in
    float32.
    """
    import onnxruntime

    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    keep_activations(proto)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(FOLDER_ENTRY, str(folder))
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

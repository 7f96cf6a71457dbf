"""One-op models: the dense computation in ONNX Runtime's own ops, and the sparse op in every format, over weights that
are stored once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..ops import gated_mlp, sparse_linear

_PAGE = 4096
_OPSETS = {"": 21, gated_mlp.DOMAIN: 1, "com.microsoft": 1}
_BLOCK = 32  # values per scale of MatMulNBits

Variant = gated_mlp.Variant | sparse_linear.Variant


@dataclass(frozen=True)
class Baseline:
    """A dense product of ONNX Runtime's: MatMul in fp32, or MatMulNBits with blocks of 32, accuracy level 4."""

    name: str
    bits: int


BASELINES = {
    "fp32": Baseline("MatMul fp32", 32),
    "int8": Baseline("MatMulNBits 8 bits", 8),
    "int4": Baseline("MatMulNBits 4 bits", 4),
}


@dataclass(frozen=True)
class OpFormat:
    """How the sparse op stores weights and predictor, and which dense products it is compared with: the first is the
    one of the same precision.

    ONNX Runtime's CPU has no fp16 or bf16 product that is faster than fp32, so these stand against fp32, with the ratio
    to 8 bits beside it.
    """

    name: str
    weights: str
    w: str
    p: str
    baselines: tuple[str, ...]


FORMATS = {
    form.name: form
    for form in (
        OpFormat("fp32", "float", "float32", "float32", ("fp32",)),
        OpFormat("fp32, fp16 predictor", "float", "float32", "float16", ("fp32",)),
        OpFormat("fp16", "float", "float16", "float16", ("fp32", "int8")),
        OpFormat("bf16", "float", "bfloat16", "bfloat16", ("fp32", "int8")),
        OpFormat("int8", "int8_row", "float32", "int8", ("int8", "fp32")),
        OpFormat("int4", "int4_g32", "float32", "int8", ("int4", "fp32")),
    )
}


def store(folder: Path, stem: str, tensors: Mapping[str, NDArray]) -> dict[str, ir.TensorProtocol]:
    """Writes tensors to `folder`/`stem`.data, each from a page's start on, so that any number of models can read them
    from there; returns them by name.
    """
    stored: dict[str, ir.TensorProtocol] = {}
    with open(folder / f"{stem}.data", "wb") as file:
        for name, array in tensors.items():
            file.seek(-(-file.tell() // _PAGE) * _PAGE)
            offset, array = file.tell(), np.ascontiguousarray(array)
            file.write(array.view(np.uint8).data)
            dtype = ir.DataType.from_numpy(array.dtype)
            stored[name] = ir.ExternalTensor(
                f"{stem}.data", offset, array.nbytes, dtype, shape=ir.Shape(array.shape), name=name, base_dir=folder
            )
    return stored


def save(
    path: Path,
    nodes: Sequence[ir.Node],
    inputs: Mapping[str, ir.Value],
    tensors: Mapping[str, ir.TensorProtocol],
    y: ir.Value,
) -> Path:
    """Writes a model x [t, d] -> y whose nodes read `inputs` (x among them); tensors on disk stay where they are."""
    for name, tensor in tensors.items():
        inputs[name].const_value = tensor
    graph = ir.Graph(
        [inputs["x"]],
        [y],
        nodes=nodes,
        initializers=[inputs[name] for name in tensors],
        opset_imports=dict(_OPSETS),
        name=path.stem,
    )
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def tokens(name: str, width: int) -> ir.Value:
    """A float32 value [t, width]."""
    return ir.Value(name=name, shape=ir.Shape(["t", width]), type=ir.TensorType(ir.DataType.FLOAT))


def sparse_model(
    path: Path, op: str, variant: Variant, tensors: Mapping[str, ir.TensorProtocol], d: int, out: int
) -> Path:
    """Writes a model of one node of domain ai.sparsegate."""
    inputs = {"x": tokens("x", d)}
    for role in variant.inputs:
        dtype, shape = tensors[role].dtype, tensors[role].shape
        inputs[role] = ir.Value(name=role, shape=ir.Shape(shape.numpy()), type=ir.TensorType(dtype))
    y = tokens("y", out)
    node = ir.Node(
        gated_mlp.DOMAIN,
        op,
        list(inputs.values()),
        ir.convenience.convert_attributes(variant.attributes()),
        outputs=[y],
        name="op",
    )
    return save(path, [node], inputs, {role: tensors[role] for role in variant.inputs}, y)


class DenseGraph:
    """A graph of dense products of one baseline."""

    def __init__(self, baseline: str, d: int) -> None:
        self._bits = BASELINES[baseline].bits
        self._values = {"x": tokens("x", d)}
        self._arrays: dict[str, NDArray] = {}
        self._nodes: list[ir.Node] = []

    def product(self, role: str, x: str, out: str, matrix: NDArray[np.float32]) -> None:
        """Out = x @ matrix [k, m]."""
        k, m = matrix.shape
        self._values[out] = tokens(out, m)
        if self._bits == 32:
            self._given(role, matrix)
            self._node("MatMul", [x, role], out)
            return
        packed, scale = pack(matrix, self._bits)
        self._given(role, packed)
        self._given(f"{role}_scale", scale)
        attributes = {"K": k, "N": m, "bits": self._bits, "block_size": _BLOCK, "accuracy_level": 4}
        self._node("MatMulNBits", [x, role, f"{role}_scale"], out, "com.microsoft", attributes)

    def elementwise(self, op: str, inputs: Sequence[str], out: str) -> None:
        """Out = op(given), of the first one's shape."""
        self._values[out] = ir.Value(
            name=out, shape=self._values[inputs[0]].shape, type=ir.TensorType(ir.DataType.FLOAT)
        )
        self._node(op, inputs, out)

    def save(self, folder: Path, name: str) -> Path:
        """Writes the model; its output is y."""
        return save(
            folder / f"{name}.onnx", self._nodes, self._values, store(folder, name, self._arrays), self._values["y"]
        )

    def _given(self, name: str, array: NDArray) -> None:
        self._arrays[name] = array
        self._values[name] = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype))
        )

    def _node(
        self, op: str, inputs: Sequence[str], out: str, domain: str = "", attributes: Mapping[str, int] | None = None
    ) -> None:
        made = ir.convenience.convert_attributes(dict(attributes or {}))
        self._nodes.append(
            ir.Node(domain, op, [self._values[name] for name in inputs], made, outputs=[self._values[out]], name=out)
        )


def pack(matrix: NDArray[np.float32], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A matrix [k, m] as MatMulNBits reads it, zero point 2^(bits - 1): values [m, k / 32, 32 bits / 8], scales [m k /
    32].
    """
    k, m = matrix.shape
    blocks = np.ascontiguousarray(matrix.T).reshape(m, k // _BLOCK, _BLOCK)
    half = 1 << bits - 1
    scale = np.abs(blocks).max(2) / (half - 1)
    q = np.clip(np.rint(blocks / scale[..., None]) + half, 0, 2 * half - 1).astype(np.uint8)
    return q if bits == 8 else q[..., 0::2] | q[..., 1::2] << 4, scale.astype(np.float32).reshape(-1)

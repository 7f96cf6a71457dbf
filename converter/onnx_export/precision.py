"""What `--precision` means in the graph: the formats of the ops' weights and predictors, and the bits of the remaining
products.

| precision | op weights | predictor | rest, CPU | rest, CUDA |
|---|---|---|---|---|
| fp32 | float32 | float32 | float32 | float32 |
| fp16 | float16 | float16 | float32 | float16 |
| bf16 | bfloat16 | bfloat16 | float32 | bfloat16 |
| int8 | int8_row | int8, float16 with a residual | MatMulNBits 8 bits | MatMulNBits 8 bits, float16 |
| int4 | int4_g32 | int8, float16 with a residual | MatMulNBits 4 bits | MatMulNBits 4 bits, float16 |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import model_validator

from ...runtime_onnx.ops.quantisation import GROUP, dequantise, quantise
from ..checkpoint.fields import Strict

DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
"""dtype name of an op -> ONNX's."""
_SCALES = {"p1": "s_p1", "p2": "s_p2"}


@dataclass(frozen=True)
class Precision:
    """One row of PRECISIONS.

    Attributes:
        name: The word after `--precision`.
        weights: The ops' weight format: float, int8_row or int4_g32.
        w: dtype of the ops' float weights; float32 for integer weights, as in the ops' variants.
        predictor: Format of p1, p2 and res where it may be chosen: a dtype or int8.
        bits: Of MatMulNBits in the rest of the graph; None leaves the rest in floating point.
        cuda: The builder's precision of the floating-point part of a graph for CUDA.
    """

    name: str
    weights: str
    w: str
    predictor: str
    bits: int | None
    cuda: str

    def fitting(self, width: int) -> str:
        """The weight format for rows of `width` values: int8_row in place of int4_g32 where the groups do not fit."""
        return "int8_row" if self.weights == "int4_g32" and width % GROUP else self.weights

    def predictor_format(self, residual: bool) -> str:
        """Format of a predictor: int8 leaves no place for a residual, so it is float16 then."""
        return "float16" if self.predictor == "int8" and residual else self.predictor

    def predictor_share(self, residual: bool) -> float:
        """Bytes of a predictor's value relative to those of a gated weight, its scales included."""
        weight = {"int8_row": 1.0, "int4_g32": 0.5 + 2 / GROUP}.get(self.weights)
        return 1.0 if weight is None else {"float16": 2, "int8": 1}[self.predictor_format(residual)] / weight


PRECISIONS = {
    row.name: row
    for row in (
        Precision("fp32", "float", "float32", "float32", None, "fp32"),
        Precision("fp16", "float", "float16", "float16", None, "fp16"),
        Precision("bf16", "float", "bfloat16", "bfloat16", None, "bf16"),
        Precision("int8", "int8_row", "float32", "int8", 8, "fp16"),
        Precision("int4", "int4_g32", "float32", "int8", 4, "fp16"),
    )
}


def store_predictor(tensors: Mapping[str, NDArray[np.float32]], precision: Precision) -> tuple[dict[str, NDArray], str]:
    """(The score's inputs as they are stored, dtype of p1, p2 and res): tau stays float32, an int8 predictor brings its
    scales s_p1 [r] and s_p2 [n].

    A predictor whose values float16 cannot hold is stored in bfloat16.
    """
    if "p1" not in tensors:
        return dict(tensors), "float32"
    chosen = precision.predictor_format("res" in tensors)
    if chosen == "float16" and any(
        np.abs(array).max(initial=0) > np.finfo(np.float16).max for role, array in tensors.items() if role != "tau"
    ):
        chosen = "bfloat16"
    stored: dict[str, NDArray] = {}
    for role, array in tensors.items():
        if role == "tau":
            stored[role] = array
        elif chosen == "int8":
            stored[role], stored[_SCALES[role]] = quantise(array, "int8_row")
        else:
            stored[role] = array.astype(DTYPES[chosen].numpy())
    return stored, chosen


def load_predictor(stored: Mapping[str, NDArray]) -> dict[str, NDArray[np.float32]]:
    """The inverse of `store_predictor`, with what rounding lost: tau, p1, p2, res in float32."""
    found = {}
    for role, array in stored.items():
        scale = stored.get(_SCALES.get(role, ""))
        if role not in _SCALES.values():
            found[role] = (array if scale is None else dequantise(array, scale, "int8_row")).astype(np.float32)
    return found


def rounded(matrix: NDArray[np.float32], weights: str, w: str) -> NDArray[np.float32]:
    """A matrix [rows, columns] as an op's weight gives it back: rounded to `w`, or quantised by rows or groups."""
    if weights == "float":
        return matrix.astype(DTYPES[w].numpy()).astype(np.float32)
    return dequantise(*quantise(matrix, weights), weights).astype(np.float32)


class Export(Strict):
    """How the gated weights are stored in ONNX (`onnx_export.precision` has the table), and which execution provider
    the graph is for.
    """

    precision: Literal["fp32", "fp16", "bf16", "int8", "int4"] = "fp32"
    target: Literal["cpu", "cuda"] = "cpu"

    @model_validator(mode="after")
    def _check(self) -> Export:
        if self.target == "cuda" and self.precision == "fp32":
            raise ValueError("precision must be fp16, bf16, int8 or int4 for the target cuda")
        return self

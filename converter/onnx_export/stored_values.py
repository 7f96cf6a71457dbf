"""Values as the graph stores them: an op's dtypes, predictors, and weights with what rounding loses."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...runtime_onnx.ops.quantisation import dequantise, quantise
from .precision import Precision

DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
"""dtype name of an op -> ONNX's."""
_SCALES = {"p1": "s_p1", "p2": "s_p2"}
_WIDE = ("tau", "b_down")  # roles that are float32 in every precision


def store_predictor(tensors: Mapping[str, NDArray[np.float32]], precision: Precision) -> tuple[dict[str, NDArray], str]:
    """(The score's inputs as they are stored, dtype of p1, p2 and res): tau and b_down stay float32, an int8 predictor
    brings its scales s_p1 [r] and s_p2 [n].

    A predictor whose values float16 cannot hold is stored in bfloat16.
    """
    if "p1" not in tensors:
        return dict(tensors), "float32"
    chosen = precision.predictor_format("res" in tensors)
    if chosen == "float16" and any(
        np.abs(array).max(initial=0) > np.finfo(np.float16).max for role, array in tensors.items() if role not in _WIDE
    ):
        chosen = "bfloat16"
    stored: dict[str, NDArray] = {}
    for role, array in tensors.items():
        if role in _WIDE:
            stored[role] = array
        elif chosen == "int8":
            stored[role], stored[_SCALES[role]] = quantise(array, "int8_row")
        else:
            stored[role] = array.astype(DTYPES[chosen].numpy())
    return stored, chosen


def load_predictor(stored: Mapping[str, NDArray]) -> dict[str, NDArray[np.float32]]:
    """The inverse of `store_predictor`, with what rounding lost: all in float32."""
    tensors = {}
    for role, array in stored.items():
        scale = stored.get(_SCALES.get(role, ""))
        if role not in _SCALES.values():
            tensors[role] = (array if scale is None else dequantise(array, scale, "int8_row")).astype(np.float32)
    return tensors


def rounded(matrix: NDArray[np.float32], weights: str, w: str) -> NDArray[np.float32]:
    """A matrix [rows, columns] as an op's weight gives it back: rounded to `w`, or quantised by rows or groups."""
    if weights == "float":
        return matrix.astype(DTYPES[w].numpy()).astype(np.float32)
    return dequantise(*quantise(matrix, weights), weights).astype(np.float32)

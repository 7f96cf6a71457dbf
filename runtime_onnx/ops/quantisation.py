"""Integer formats of weights and activations that the ops share, and the arithmetic of their CPU kernels, in numpy.

Weights of a matrix [rows, columns]:

    int8_row   int8 [rows, columns] in -127..127, float32 scale [rows]: w = scale q
    int4_g32   uint8 [rows, columns / 2], low nibble first, float16 scale [rows, columns / 32]: w = scale (q - 8)

Where a kernel multiplies integers, it first rounds its activations to int8 in groups of 32 with one float32 scale each.
The groups are 32 consecutive channels of a product's input, or 32 consecutive rows of a sum of rows; they depend on
indices alone, never on the tokens beside or on what those keep.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .vocabulary import GROUP

TINY = np.float32(1e-30)
"""Groups whose largest magnitude lies below this are zeros: the inverse of the scale would overflow."""


def quantise(matrix: NDArray, weights: str) -> tuple[NDArray, NDArray]:
    """(stored, scale) of a float matrix [rows, columns], rounded to the nearest, in the format `weights` (not "float").

    int8_row scales a row by its largest magnitude / 127. int4_g32 scales a group by its value of largest magnitude /
    -8, so that this value is exact (as in llama.cpp's Q4_0 and ONNX Runtime's MatMulNBits). Raises InputError for
    another format, and for columns that int4_g32 cannot group.
    """
    matrix = np.asarray(matrix, np.float32)
    if weights == "int8_row":
        scale = np.abs(matrix).max(1) / np.float32(127)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > TINY)
        return np.clip(np.rint(matrix * inverse[:, None]), -127, 127).astype(np.int8), scale
    if weights != "int4_g32":
        raise InputError(f"weights must be int8_row or int4_g32 to be quantised, got {weights}. Choose one of them.")
    rows, columns = matrix.shape
    if columns % GROUP:
        raise InputError(f"columns of int4_g32 must be a multiple of {GROUP}, got {columns}. Use int8_row.")
    groups = matrix.reshape(rows, columns // GROUP, GROUP)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(2)[..., None], 2)[..., 0]
    scale = (largest / np.float32(-8)).astype(np.float16)
    wide = scale.astype(np.float32)
    inverse = np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)
    q = np.clip(np.rint(groups * inverse[..., None]) + 8, 0, 15).astype(np.uint8).reshape(rows, columns)
    return q[:, 0::2] | q[:, 1::2] << 4, scale


def integers(stored: NDArray, weights: str) -> NDArray[np.int64]:
    """The signed integers [rows, columns] that a stored matrix holds."""
    stored = np.asarray(stored)
    if weights == "int8_row":
        return stored.astype(np.int64)
    return np.stack([stored & 15, stored >> 4], 2).reshape(len(stored), -1).astype(np.int64) - 8


def dequantise(stored: NDArray, scale: NDArray, weights: str) -> NDArray[np.float64]:
    """The matrix [rows, columns] in float64."""
    q, scale = integers(stored, weights).astype(np.float64), np.asarray(scale).astype(np.float64)
    return q * (scale[:, None] if weights == "int8_row" else np.repeat(scale, GROUP, 1))


def round_activations(values: NDArray) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """float32 values [..., group], the last axis one group -> (integers of the same shape, scale [..., 1]), exactly as
    the kernels round.

    A group below TINY is zeros; a group with NaN or infinity has scale NaN.
    """
    values = np.asarray(values, np.float32)
    largest = np.abs(values).max(-1, keepdims=True, initial=np.float32(0))
    usable = (largest >= TINY) & np.isfinite(largest)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=usable)
    with np.errstate(invalid="ignore"):
        q = np.where(usable, np.rint(values * inverse), 0).astype(np.int64)
    scale = np.where(np.isfinite(largest), largest / np.float32(127) * usable, np.float32(np.nan)).astype(np.float32)
    return q, scale


def integer_product(x: NDArray, stored: NDArray, scale: NDArray, weights: str) -> NDArray[np.float64]:
    """Products [T, rows] of x [T, columns] with a stored matrix's rows: x rounded per 32 columns, integer sums per
    group, the rest in float64.
    """
    x, q = (
        np.asarray(x, np.float32),
        integers(stored, weights).astype(np.float64),
    )  # sums of 32 products of int8 are exact in float64
    scale = np.asarray(scale).astype(np.float64)
    total = np.zeros((len(x), len(q)))
    for group, start in enumerate(range(0, q.shape[1], GROUP)):
        part = slice(start, start + GROUP)
        rounded, step = round_activations(x[:, part])
        total += (
            (rounded.astype(np.float64) @ q[:, part].T)
            * step.astype(np.float64)
            * (scale[:, group] if weights == "int4_g32" else 1.0)
        )
    return total * scale if weights == "int8_row" else total


def integer_sum(
    z: NDArray, keep: NDArray[np.bool_], stored: NDArray, scale: NDArray, weights: str
) -> NDArray[np.float64]:
    """Sums [T, columns] of the rows that each token keeps: sum_i z[t, i] row_i, z [T, rows], keep [T, rows].

    The rows' scales are multiplied into z before it is rounded, per 32 rows (and per 32 columns where the scales are),
    over the kept ones only.
    """
    z, q, scale = (
        np.asarray(z, np.float32),
        integers(stored, weights).astype(np.float64),
        np.asarray(scale).astype(np.float32),
    )
    groups = scale.shape[1] if weights == "int4_g32" else 1
    columns = scale.reshape(len(q), groups)
    width = q.shape[1] // groups
    out = np.zeros((len(z), q.shape[1]))
    for start in range(0, len(q), GROUP):
        rows = slice(start, start + GROUP)
        scaled = np.where(keep[:, rows, None], z[:, rows, None] * columns[None, rows], np.float32(0))  # [T, 32, groups]
        rounded, step = round_activations(scaled.transpose(0, 2, 1))  # [T, groups, 32], [T, groups, 1]
        part = q[rows].reshape(-1, groups, width).transpose(1, 0, 2)  # [groups, 32, width]
        sums = (rounded.astype(np.float64).transpose(1, 0, 2) @ part).transpose(
            1, 0, 2
        )  # exact in float64, [T, groups, width]
        out += (sums * step.astype(np.float64)).reshape(len(z), -1)
    return out

"""Tensors of the written file, each read from the base graph's data file, and converted, only while it is written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.ops.quantisation import quantise
from ...runtime_onnx.ops.vocabulary import GROUP


def moved(
    value: ir.Value, transpose: bool = False, columns: slice | None = None, dtype: ir.DataType | None = None
) -> ir.TensorProtocol:
    """An initialiser's tensor, or some columns of it, in its own dtype or another one."""
    source = value.const_value
    assert source is not None
    dtype = dtype or source.dtype
    if not transpose and columns is None and dtype == source.dtype and isinstance(source, ir.ExternalTensor):
        return ir.ExternalTensor(
            source.location,
            source.offset,
            source.length,
            source.dtype,
            shape=source.shape,
            name=value.name or "",
            base_dir=source.base_dir,
        )
    shape = _shape(source, columns)
    return ir.LazyTensor(
        lambda: ir.Tensor(matrix(source, transpose, columns, dtype), dtype=dtype),
        dtype=dtype,
        shape=ir.Shape(shape[::-1] if transpose else shape),
        name=value.name,
    )


def quantised(
    value: ir.Value, weights: str, transpose: bool = False, columns: slice | None = None
) -> tuple[ir.TensorProtocol, ir.TensorProtocol]:
    """(Stored integers, scale) of an initialiser's matrix, or of some columns of it, in an op's format int8_row or
    int4_g32.
    """
    source = value.const_value
    assert source is not None
    shape = _shape(source, columns)
    rows, width = shape[::-1] if transpose else shape
    groups = weights == "int4_g32"
    return pair(
        lambda: quantise(matrix(source, transpose, columns), weights),
        (ir.DataType.UINT8 if groups else ir.DataType.INT8, [rows, width // 2 if groups else width]),
        (ir.DataType.FLOAT16 if groups else ir.DataType.FLOAT, [rows, width // GROUP] if groups else [rows]),
        value.name,
    )


Form = tuple[ir.DataType, list[int]]
"""dtype and shape."""


def pair(
    make: Callable[[], tuple[NDArray, NDArray]], first: Form, second: Form, name: str | None = None
) -> tuple[ir.TensorProtocol, ir.TensorProtocol]:
    """Two lazy tensors from one computation: whichever is asked for first computes both, and of these only the small
    second one is kept for its turn.
    """
    kept: list[NDArray] = []

    def integers() -> ir.Tensor:
        stored, scale = make()
        check_finite(name, scale, second[0])
        kept[:] = [scale]
        return ir.Tensor(stored, dtype=first[0])

    def scales() -> ir.Tensor:
        return ir.Tensor(kept.pop() if kept else make()[1], dtype=second[0])

    one, two = (
        ir.LazyTensor(read, dtype=form[0], shape=ir.Shape(form[1]))
        for read, form in ((integers, first), (scales, second))
    )
    return one, two


def matrix(
    source: ir.TensorProtocol,
    transpose: bool = False,
    columns: slice | None = None,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> NDArray:
    """A copy of a tensor, or of some columns of it, in C order; the source's memory is given back."""
    part = source.numpy()[..., columns or slice(None)]
    copy = np.array(part.T if transpose else part, order="C").astype(dtype.numpy(), copy=False)
    del part
    if isinstance(source, ir.ExternalTensor):
        source.release()
    check_finite(source.name, copy, dtype)
    return copy


def check_finite(name: str | None, stored: NDArray, dtype: ir.DataType) -> None:
    """Raise InputError where a weight does not fit into the half precision that it is stored in."""
    if dtype is ir.DataType.FLOAT16 and not np.isfinite(stored).all():
        raise InputError(
            f"{name} must hold finite values up to 65504 in half precision, got larger ones. Take the precision fp32, "
            "bf16 or int8."
        )


def _shape(source: ir.TensorProtocol, columns: slice | None) -> list[int]:
    shape = [int(size) for size in source.shape.numpy()]
    if columns is not None:
        shape[-1] = columns.stop - columns.start
    return shape

"""The container of PowerInfer's files, GGUF under another magic, and how a tensor lies in it."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ..checkpoint.stage import disk_full, is_disk_full
from ..checkpoint.tensor_files import first_line

MAGIC, VERSION = b"PWRI", 3
Precision = Literal["fp32", "fp16"]
Tensors = Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]
"""Name, shape and a function that gives the tensor, of every tensor of a file in its order."""


def gguf_package() -> Any:
    """The package gguf. Raises InputError without it."""
    try:
        import gguf
    except ImportError:
        raise InputError(
            "PowerInfer's files must be written and read with the package gguf, got none. Install sparsegate[bench]."
        ) from None
    return gguf


def to_file(name: str, values: Tensor, heads: int, kv_heads: int) -> Tensor:
    """A weight as the file holds it: down transposed; the rows of q and k from halves [x, y] of a head to pairs, as its
    rotary embedding takes them.
    """
    if "ffn_down_t" in name:
        return values.T.contiguous()
    count = {"attn_q": heads, "attn_k": kv_heads}.get(name.split(".")[-2])
    return values if count is None else values.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def from_file(name: str, values: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The inverse of `to_file`."""
    if "ffn_down_t" in name:
        return values.T.contiguous()
    count = {"attn_q": heads, "attn_k": kv_heads}.get(name.split(".")[-2])
    if count is not None and (values.ndim < 1 or not len(values) or len(values) % (2 * count)):
        raise InputError(
            f"{name} must have rows for {count} heads of an even width, got {list(values.shape)}. Fetch the file again."
        )
    return values if count is None else values.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def write_file(
    gguf: Any,
    writer: Any,
    path: Path,
    tensors: Tensors,
    precision: Precision | Literal["int32"],
) -> None:
    """Fill `writer` and store the file under PowerInfer's magic, one tensor in memory at a time."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    kinds = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "int32": np.dtype(np.int32)}
    loads: list[tuple[np.dtype[Any], Callable[[], Tensor]]] = []
    for name, shape, load in tensors:
        dtype = kinds["fp32" if precision != "int32" and len(shape) == 1 else precision]
        writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize)
        loads.append((dtype, load))
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for dtype, load in loads:
            writer.write_tensor_data(_array(load(), dtype))
        writer.close()
        with open(partial, "r+b") as file:
            file.write(MAGIC + struct.pack("<I", VERSION))
        os.replace(partial, path)
    except OSError as error:
        raise disk_full(path) from error if is_disk_full(error) else error
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _array(values: Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        array = values.numpy().astype(dtype)
    if not np.isfinite(array).all():
        raise InputError(
            f"Weights must be finite in {dtype.name}, got a larger one. Write the file with precision fp32."
        )
    return array


def open_reader(gguf: Any, path: Path) -> Any:
    """The gguf package's reader of a PowerInfer file. Raises InputError for a file of another kind and for a damaged
    one.
    """
    if not path.is_file():
        raise InputError(f"{path.name} must be a file, got nothing at {path}. Check the path.")
    with open(path, "rb") as file:
        start = file.read(8)
    if start != MAGIC + struct.pack("<I", VERSION):
        what = "llama.cpp's own GGUF" if start[:4] == b"GGUF" else f"{start!r}"
        raise InputError(
            f"{path.name} must start with {MAGIC.decode()} and version {VERSION}, got {what}. Take a file of "
            "PowerInfer."
        )

    class Reader(gguf.GGUFReader):
        """Reads the same layout under the other magic; the memory map is private, so the file stays as it is."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if offset == 0:
                self.data = np.asarray(self.data)  # slices of a memmap take three times as long
                self.data[:4] = np.frombuffer(b"GGUF", np.uint8)
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends too early")  # the package reads on, an array's count times
            return super()._get(offset, dtype, count, override_order)

    try:
        return Reader(path, "c")
    except Exception as error:  # the package indexes without checks
        raise InputError(
            f"{path.name} must be a complete PowerInfer file, got a damaged one ({first_line(error)}). Fetch it again."
        ) from None

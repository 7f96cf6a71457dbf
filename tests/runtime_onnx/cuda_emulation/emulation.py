"""Builds the CUDA kernels with the emulation and runs them on numpy arrays."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "runtime_onnx" / "csrc"
KERNELS = ("gated_mlp_decode.cu", "gated_mlp_prefill.cu", "row_sums.cu", "row_tiles.cu", "sparse_linear_kernels.cu")
SHARED = ("op.cc", "gated_mlp_variant.cc", "sparse_linear_variant.cc")

TYPES = {"float32": 1, "uint8": 2, "int8": 3, "float16": 10, "bfloat16": 16}
"""numpy dtype -> ONNX element type."""

_PAGE = mmap.PAGESIZE


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build(folder: Path) -> Path:
    """Compiles the emulation into `folder` and returns the library; RuntimeError with the compiler's words if that
    fails.
    """
    command = [
        compiler() or "g++",
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-w",
        "-fsanitize=bounds,alignment",
        "-fno-sanitize-recover=all",
        f"-I{HERE}",
        f"-I{SOURCES}",
    ]
    sources = [SOURCES / name for name in (*KERNELS, *SHARED)] + [HERE / "emulator.cc", HERE / "entry.cc"]

    def call(arguments: Iterable[str]) -> None:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)

    def compile_one(source: Path) -> str:
        out = str(folder / f"{source.name}.o")
        call(["-x", "c++", "-c", str(source), "-o", out])
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "cuda_emulation.so"
    call(["-shared", "-static-libubsan", *objects, "-o", str(library)])
    return library


class Guarded:
    """Bytes that end at a page which must not be touched (up to 15 bytes before it, so that the address is a multiple
    of 16).
    """

    def __init__(self, size: int, fill: int = 0xFF) -> None:
        pages = (size + 15) // _PAGE + 1
        self._map = mmap.mmap(-1, (pages + 1) * _PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None)
        if libc.mprotect(ctypes.c_void_p(start + pages * _PAGE), ctypes.c_size_t(_PAGE), 0):
            raise OSError("mprotect failed")
        self.address = start + pages * _PAGE - (size + 15) // 16 * 16
        self.size = size
        ctypes.memset(self.address, fill, size)

    @staticmethod
    def of(array: np.ndarray) -> Guarded:
        """A copy of the array."""
        array = np.ascontiguousarray(array)
        out = Guarded(array.nbytes)
        ctypes.memmove(out.address, array.ctypes.data, array.nbytes)
        return out

    def read(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """The bytes as an array."""
        return np.frombuffer(ctypes.string_at(self.address, self.size), dtype).reshape(shape).copy()


class Emulation:
    """The kernels of a built library."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def run(
        self,
        op: str,
        variant: str,
        roles: tuple[str, ...],
        tensors: Mapping[str, np.ndarray],
        x: np.ndarray,
        width: int,
        reverse: bool = False,
    ) -> np.ndarray:
        """y [T, width] of x [T, columns] for op "gated_mlp" or "sparse_linear"; `roles` are all roles of the op.
        RuntimeError with the library's words.

        Inputs, output and scratch memory end at pages that must not be touched; scratch memory and output hold NaN
        before. `reverse` runs threads and blocks in falling order.
        """
        held = {role: Guarded.of(value) for role, value in tensors.items()}
        count = len(roles)
        data = (ctypes.c_void_p * count)(*[held[role].address if role in held else None for role in roles])
        types = (ctypes.c_int * count)(*[TYPES[str(tensors[role].dtype)] if role in tensors else 0 for role in roles])
        dims = [(*tensors[role].shape, 0)[:2] if role in tensors else (0, 0) for role in roles]
        sizes = (ctypes.c_int64 * (2 * count))(*[size for pair in dims for size in pair])
        rows, y, needed = Guarded.of(x), Guarded(len(x) * width * x.dtype.itemsize), ctypes.c_int64()
        function = getattr(self._library, f"run_{op}")
        function.restype = ctypes.c_char_p
        self._library.set_reversed(ctypes.c_int(reverse))

        def call(scratch: ctypes.c_void_p) -> None:
            pointers = [
                ctypes.c_void_p(rows.address),
                ctypes.c_void_p(y.address),
                ctypes.c_int64(len(x)),
                scratch,
                ctypes.byref(needed),
                None,
            ]
            wrong = function(variant.encode(), data, types, sizes, *pointers)
            if wrong:
                raise RuntimeError(wrong.decode())

        call(ctypes.c_void_p(None))
        scratch = Guarded(-(-needed.value // 64) * 64)
        call(ctypes.c_void_p(scratch.address))
        return y.read(x.dtype, (len(x), width))

    def launches(self) -> int:
        """Kernels launched so far."""
        self._library.launches.restype = ctypes.c_int64
        return self._library.launches()

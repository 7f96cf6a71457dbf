"""The native library with the kernels of domain `ai.sparsegate`: where it is, what it supports, and whether a model
file may use it.

A registered library never falls back to a function body, so `executor` asks it about every op variant that a file names
before anything registers it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError
from .untrusted import inside, parse_json, read_bytes

if TYPE_CHECKING:
    import onnx

LIBRARY = "libsparsegate_onnx.so"  # file name and SONAME
VARIANTS = "ai.sparsegate.variants"  # metadata key of model.onnx: JSON list of variant names
LARGEST_MODEL = (1 << 31) - 1
"""Bytes that a protobuf message may have; larger weights lie beside it."""
DENSE = "a dense model: it has no op of ai.sparsegate"
PROVIDERS = (
    "CPUExecutionProvider",
    "CUDAExecutionProvider",
)  # those the library has kernels for, the second where it was built so
WITH_CUDA = "pip install --force-reinstall --no-deps -C cmake.define.SPARSEGATE_CUDA=ON sparsegate"  # needs nvcc


@dataclass(frozen=True)
class Executor:
    """Who runs the ai.sparsegate ops of a model: the native kernel, or the function body in standard ops; `reason` is
    one line for people.
    """

    kernel: bool
    reason: str

    def __str__(self) -> str:
        return f"{'native kernel' if self.kernel else 'standard ONNX ops'} ({self.reason})"


def library_path() -> Path:
    """The installed native library, for `SessionOptions.register_custom_ops_library`. Raises InputError when the
    installation has none.
    """
    from . import __path__ as folders  # more than one in an editable install: the sources and the built files

    for folder in folders:
        path = Path(folder) / LIBRARY
        if path.is_file():
            return path
    raise InputError(
        f"{LIBRARY} must lie in the installed package, got none in {', '.join(folders)}. Install again with: pip "
        "install --force-reinstall --no-deps sparsegate"
    )


def supports(variant: str, provider: str = PROVIDERS[0]) -> bool:
    """Whether the installed library has a kernel for the op variant of this name on this execution provider."""
    return bool(_open(library_path()).sparsegate_supports(variant.encode(), provider.encode()))


def has_cuda() -> bool:
    """Whether the installed library was built with the CUDA kernels: they are built on request alone."""
    from .ops.gated_mlp import Variant

    return supports(
        Variant("silu", "gate", "float", ("w_gate", "w_up", "w_down", "tau"), x="float16", w="float16").name,
        PROVIDERS[1],
    )


def version() -> str:
    """The version that the library reports, e.g. "0.1.0"."""
    return _open(library_path()).sparsegate_version().decode()


def isa() -> str:
    """The instruction set that the CPU kernels use on this machine: "avx512vnni", "avx512", "avx2" or "portable"."""
    return _open(library_path()).sparsegate_isa().decode()


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Every run inside uses this build of the CPU kernels: for tests and benchmarks. Raises InputError where there is
    none.
    """
    handle = _open(library_path())
    if not handle.sparsegate_force_isa(name.encode()):
        raise InputError(f"isa must be a build that this machine has, got {name}. The best one is {isa()}.")
    try:
        yield
    finally:
        handle.sparsegate_force_isa(b"auto")


def model_file(path: str | Path) -> Path:
    """The ONNX file that `path` means: the file itself, model.onnx in an ONNX folder, or onnx/model.onnx in a sparse
    checkpoint.

    Raises InputError when there is none.
    """
    path = Path(path)
    for file in (path, path / "model.onnx", path / "onnx" / "model.onnx"):
        if file.is_file() and file.suffix == ".onnx":
            return file
    actual = (
        "a folder without model.onnx or onnx/model.onnx"
        if path.is_dir()
        else "another kind of file"
        if path.exists()
        else "nothing there"
    )
    raise InputError(
        f"The model must be an ONNX folder, a sparse checkpoint or a .onnx file, got {path} ({actual}). Write one "
        "with: sparsegate convert MODEL -o OUT"
    )


def variants(path: str | Path) -> list[str]:
    """The names of the op variants that the metadata of a model lists; empty for a dense model. No weights are read.

    Raises InputError where there is no model, for a file that is no ONNX model, and when the metadata does not name
    each of the file's variants.
    """
    return _names(_read(model_file(path)))


def executor(path: str | Path, provider: str = PROVIDERS[0]) -> Executor:
    """Whether the native kernel can run every ai.sparsegate op of a model on `provider`, judged from the model's
    metadata alone.

    `path` is an ONNX folder, a sparse checkpoint (with onnx/ inside) or a .onnx file. Raises InputError when it is none
    of them.
    """
    model = _read(model_file(path))
    try:
        names = _names(model)
        missing = [name for name in names if not supports(name, provider)]
        tag = f"sparsegate {version()}, {'cuda' if provider == PROVIDERS[1] else isa()}" if names else ""
    except ValueError as error:
        return Executor(False, str(error))
    except (OSError, AttributeError) as error:  # no shared object, or not one of ours
        return Executor(False, f"{LIBRARY} cannot be opened: {error}")
    if not names:
        return Executor(False, DENSE)
    if missing:
        if provider == PROVIDERS[1] and not has_cuda():
            return Executor(
                False, f"sparsegate {version()} was built without CUDA kernels. With nvcc in PATH do: {WITH_CUDA}"
            )
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        return Executor(False, f"{tag} has no {provider} kernel for {missing[0]}{more}. Update sparsegate")
    return Executor(True, tag)


def _read(file: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(read_bytes(file, LARGEST_MODEL))
    except (DecodeError, ValueError) as error:
        raise InputError(
            f"{file} must be an ONNX model, got bytes that do not parse ({error}). Fetch or convert it again."
        ) from None
    tensors = [
        *model.graph.initializer,
        *_constants(model.graph.node),
        *(tensor for function in model.functions for tensor in _constants(function.node)),
    ]
    for place in {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}:
        inside(file.parent, place, str(file), link=True)
    return model


def _constants(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """The tensors in the attributes of nodes, those of the graphs inside them too."""
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for graph in (attribute.g, *attribute.graphs):
            yield from graph.initializer
            yield from _constants(graph.node)


def _names(model: onnx.ModelProto) -> list[str]:
    from .ops.gated_mlp import DOMAIN

    functions = sum(function.domain == DOMAIN for function in model.functions)
    text = next((entry.value for entry in model.metadata_props if entry.key == VARIANTS), "[]")
    try:
        names = parse_json(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) != functions:
        raise InputError(
            f"Metadata {VARIANTS} must name the {functions} op variants of the model, got {text[:200]!r}. Convert the "
            "model again."
        )
    return names


@cache
def _open(library: Path) -> ctypes.CDLL:
    handle = ctypes.CDLL(str(library))
    handle.sparsegate_supports.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    handle.sparsegate_supports.restype = ctypes.c_int
    for function in (handle.sparsegate_version, handle.sparsegate_isa):
        function.argtypes, function.restype = [], ctypes.c_char_p
    return handle

"""Safetensors from outside: one reader of headers, which no other reader can understand otherwise, and tensors that are
what a format says.

The format allows no name twice; Python's and Rust's JSON keep the last one, other readers the first.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import parse_json

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
"""Dtypes of weights, as safetensors names them -> bytes of a value."""
_LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
_METADATA = "__metadata__"


class Entry(NamedTuple):
    """A tensor in a header: its shape, and its dtype as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> dict[str, Entry]:
    """Name -> shape and dtype of every tensor of a safetensors file.

    Raises InputError for a file that is missing, damaged or truncated, and where a key of the header stands twice.
    """
    try:
        names = set(_header(path)) - {_METADATA}
        with safe_open(path, framework="np") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            entries = {name: Entry(tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from None
    if names != set(entries):
        raise damaged(path, ValueError("two readers find different names"))
    return entries


def load_tensors(path: Path, dtypes: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. Raises InputError as `read_header`, and for a dtype that is not among
    `dtypes` (None: any).
    """
    from safetensors.torch import load_file

    for name, entry in read_header(path).items():
        if dtypes is not None and entry.dtype not in dtypes:
            raise InputError(
                f"{name} in {path.name} must be {' or '.join(dtypes)}, got {entry.dtype}. Make the file again."
            )
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError) as error:  # KeyError: a dtype that torch lacks
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> InputError:
    """The error for a safetensors file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path.name} must be a safetensors file, got nothing at {path}. Fetch or write it again.")
    return InputError(
        f"{path.name} must be a complete safetensors file, got a damaged one at {path} ({first_line(error)}). Fetch it "
        "again."
    )


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its class where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _header(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():
        raise ValueError("no regular file")
    with open(path, "rb") as file:
        size, room = int.from_bytes(file.read(8), "little"), path.stat().st_size - 8
        if not 0 < size <= min(room, _LARGEST_HEADER):
            raise ValueError(f"a header of {size} bytes, with {max(0, room)} in the file")
        header = parse_json(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("a header that is no object")
    return header

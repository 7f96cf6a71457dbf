"""sparsegate.converter: a Hugging Face model becomes a sparse checkpoint that ONNX Runtime runs.

Public functions: convert, inspect, load, push, verify. They are imported when first used, so that importing the package stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversion import convert, verify
    from .hub import push
    from .inspection import inspect
    from .reference import load

__all__ = ["convert", "inspect", "load", "push", "verify"]
_HOMES = {"convert": ".conversion", "inspect": ".inspection", "load": ".reference", "push": ".hub", "verify": ".conversion"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)

"""sparsegate.converter: a Hugging Face model becomes a sparse checkpoint that ONNX Runtime runs.

Public functions: convert, evaluate, inspect, load, make_report, push, tune, verify. They are imported when first used, so that importing stays quick.
With the package imported, transformers' auto classes know models whose activation was swapped (`modeling`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .modeling import watch

if TYPE_CHECKING:
    from .conversion import convert, load, verify
    from .evaluation import evaluate
    from .hub import push
    from .inspection import inspect
    from .onnx_export import export
    from .report import make_report
    from .schedule import once as plan
    from .stats.collect import collect as calibrate
    from .tuning import tune
    from .writer import write_checkpoint as apply

__all__ = ["apply", "calibrate", "convert", "evaluate", "export", "inspect", "load", "make_report", "plan", "push", "tune", "verify"]
_HOMES = {
    "apply": (".writer", "write_checkpoint"),
    "calibrate": (".stats.collect", "collect"),
    "convert": (".conversion", "convert"),
    "evaluate": (".evaluation", "evaluate"),
    "export": (".onnx_export", "export"),
    "inspect": (".inspection", "inspect"),
    "load": (".conversion", "load"),
    "make_report": (".report", "make_report"),
    "plan": (".schedule", "once"),
    "push": (".hub", "push"),
    "tune": (".tuning", "tune"),
    "verify": (".conversion", "verify"),
}


watch()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, function = _HOMES[name]
    return getattr(import_module(module, __name__), function)

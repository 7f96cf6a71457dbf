"""sparsegate.converter: a Hugging Face model becomes a sparse checkpoint that ONNX Runtime runs.

Public functions: convert, evaluate, inspect, load, make_report, push, register, tune, verify. They are imported when
first used, so that importing stays quick and changes nothing. After `register()` transformers' auto classes know models
whose activation was swapped (`modeling.swapped`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.writer import write_checkpoint as apply
    from .modeling.swapped import register
    from .onnx_export.export import export
    from .pipeline.convert import convert
    from .pipeline.evaluate import evaluate
    from .pipeline.inspect import inspect
    from .pipeline.load import load
    from .pipeline.push import push
    from .pipeline.schedule import once as plan
    from .pipeline.tune import tune
    from .pipeline.verify import verify
    from .report.html import make_report
    from .stats.collect import collect as calibrate

__all__ = [
    "apply",
    "calibrate",
    "convert",
    "evaluate",
    "export",
    "inspect",
    "load",
    "make_report",
    "plan",
    "push",
    "register",
    "tune",
    "verify",
]
_HOMES = {
    "apply": (".checkpoint.writer", "write_checkpoint"),
    "calibrate": (".stats.collect", "collect"),
    "convert": (".pipeline.convert", "convert"),
    "evaluate": (".pipeline.evaluate", "evaluate"),
    "export": (".onnx_export.export", "export"),
    "inspect": (".pipeline.inspect", "inspect"),
    "load": (".pipeline.load", "load"),
    "make_report": (".report.html", "make_report"),
    "plan": (".pipeline.schedule", "once"),
    "push": (".pipeline.push", "push"),
    "register": (".modeling.swapped", "register"),
    "tune": (".pipeline.tune", "tune"),
    "verify": (".pipeline.verify", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, function = _HOMES[name]
    return getattr(import_module(module, __name__), function)

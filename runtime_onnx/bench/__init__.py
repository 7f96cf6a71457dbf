"""Measures speed so that it cannot flatter: two models or an op and its dense counterpart back to back, cold weights,
disturbed samples dropped.

`folders` times two ONNX folders, `op` one op at the sizes of a model; `samples` holds the rules that both follow. Torch
is not needed here.
"""

from __future__ import annotations

from .folders import BenchTiming, bench, precision
from .op import OpTiming, OpWorkload, bench_op
from .record import machine, versions

__all__ = ["OpTiming", "OpWorkload", "BenchTiming", "bench", "bench_op", "machine", "precision", "versions"]

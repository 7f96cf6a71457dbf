"""Checks of every op of runtime_onnx.ops.OPS in four modes: `python -m tests.op_harness test|perf|support|break [--op
STEM] [--isa NAME]`.

test     kernels against the float64 reference (integer weights: its emulation of their arithmetic), with a unit dropped
as negative control
    perf     times the op beside the dense computation: GB/s and the share of the stream bandwidth
    support  which variants the installed library runs on which execution provider
    break    broken input: an error that names it or the documented result, never a crash

An op is one file of cases, a mode one file; both are rows of the tables below.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

CASES = {"gated_mlp": ".gated_mlp", "sparse_linear": ".sparse_linear"}
"""Stem of an op -> module with its cases, which exports OP (the op's module in the package), SAMPLED and every_case()
(both of Case), make_variant, make_tensors, make_x, with_tau, expected, float_activations, without_one, sizes_of, grid()
and broken().
"""
MODES = {"test": ".testing", "perf": ".timing", "support": ".support", "break": ".breaking"}
"""Mode -> module with `main(ops, isas, full) -> int`, an exit status."""


def cases_of(stem: str) -> ModuleType:
    """The cases of an op."""
    return import_module(CASES[stem], __package__)


def mode_of(name: str) -> ModuleType:
    """The module of a mode."""
    return import_module(MODES[name], __package__)

"""Mode perf: the op beside the dense computation, as `sparsegate bench` measures it."""

from __future__ import annotations

from collections.abc import Sequence

from sparsegate.runtime_onnx.bench.op import OpTiming, OpWorkload, bench_op

from . import cases_of
from .case import ISAS
from .sessions import forced_isa, has_isa


def line(row: dict) -> str:
    """One row of a result of bench_op."""
    what = f"{row['format']:22} {row['tokens']:4} tokens, {row['score']} {row['asked']:.0%}"
    if row["status"] != "run":
        return f"{what}: {row['status']}"
    if "warm_ms" in row:
        return f"{what}: {row['warm_ms']:.3f} ms warm"
    speed = f"{row['ms']:.3f} ms, {row['gb_per_s']:.1f} GB/s, {row['share_of_stream']:.0%} of the stream"
    return ", ".join([f"{what}: {speed}", *(f"{dense['ratio']:.2f} x {dense['name']}" for dense in row["dense"])])


def main(ops: Sequence[str], isas: Sequence[str], full: bool) -> int:
    """Prints a row per format and density, on the best of the builds that are asked for; at the size of a real layer if
    `full`, else a small one; always 0.
    """
    isa = next(isa for isa in ISAS if isa in isas and has_isa(isa))
    timing = OpTiming() if full else OpTiming(patience=10.0)
    with forced_isa(isa):
        for stem in ops:
            load = OpWorkload(stem) if full else OpWorkload(stem, 1024, 2048, densities=(1.0, 0.2))
            print(f"{cases_of(stem).OP.NAME}, {isa}, {load.d} x {load.n}", flush=True)
            bench_op(load, timing, keep=lambda result: print("  " + line(result["rows"][-1]), flush=True))
    return 0

"""The roofline plot of op benchmarks: work per byte against work per second, below what memory and arithmetic of the
same run allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .speed import op_rows

_COLOURS = {
    "fp32": "#1f4e79",
    "fp32, fp16 predictor": "#4c8bc9",
    "fp16": "#2e7d32",
    "bf16": "#8bc34a",
    "int8": "#c77700",
    "int4": "#b3261e",
}


def points(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The points of the plot: by format, operations per byte, Gflop/s, tokens, and whether it is the sparse op or the
    dense one of the same precision.

    The dense op's operations are counted in full. Its bytes are those of the sparse op of the same format with
    everything kept and no predictor.
    """
    drawn = []
    for result in results:
        settings = result["settings"]
        full = (
            2.0 * 3 * settings["d"] * settings["n"]
            if settings["op"] == "gated_mlp"
            else 2.0 * settings["d"] * settings["n"]
        )
        width = {"int8": 1.125, "int4": 0.625}  # of the dense baseline, scales per 32 included; else that of fp32
        for row in op_rows(result):
            drawn.append(
                {
                    "kind": "sparse",
                    "format": row["format"],
                    "tokens": row["tokens"],
                    "x": row["operations"] / row["bytes"],
                    "y": row["gflop_per_s"],
                }
            )
            if row["score"] == "all" or row["asked"] == 1.0:
                dense = row["dense"][0]
                operations = full * row["tokens"]
                place = {
                    "x": operations / (full / 2 * width.get(row["format"], 4)),
                    "y": operations / dense["ms"] / 1e6,
                }
                drawn.append({"kind": "dense", "format": row["format"], "tokens": row["tokens"], **place})
    return drawn


def plot(path: Path, results: Sequence[Mapping[str, Any]]) -> Path:
    """Draws every measured point; the roofs are the highest of the results."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    panel = figure.subplots()
    memory = max(max(result["roofs"]["stream_gb_per_s"].values()) for result in results)
    memory = max([memory, *(row["stream_gb_per_s"] for result in results for row in op_rows(result))])
    compute = max(result["roofs"]["gemm_gflop_per_s"] for result in results)
    drawn = points(results)
    values = [point["x"] for point in drawn] or [1.0]
    x = np.geomspace(min(values) / 2, max([*values, compute / memory]) * 2, 200)
    panel.plot(
        x,
        np.minimum(x * memory, compute),
        color="#444444",
        linewidth=1.2,
        label=f"roofs measured: {memory:.0f} GB/s read, {compute:.0f} Gflop/s fp32 product",
    )
    seen: set[tuple[str, str]] = set()
    for point in drawn:
        key = (point["kind"], point["format"])
        label = (
            None
            if key in seen
            else f"{point['kind']} {point['format']}"
            if point["kind"] == "sparse"
            else f"ONNX Runtime beside {point['format']}"
        )
        seen.add(key)
        sparse = point["kind"] == "sparse"
        colour = _COLOURS.get(point["format"], "#666666")
        size = 18 + 6 * np.log2(point["tokens"])
        panel.scatter(
            point["x"],
            point["y"],
            s=size,
            marker="o" if sparse else "x",
            color=colour,
            linewidths=1.1,
            label=label,
            alpha=0.85,
        )
    panel.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte really needed",
        ylabel="Gflop/s achieved",
        title="Measured on the CPU; larger marks: more tokens per call",
    )
    panel.grid(alpha=0.25, which="both", linewidth=0.4)
    panel.legend(fontsize=7, loc="lower right")
    FigureCanvasAgg(figure)
    figure.savefig(path, metadata={"Software": None})
    return path

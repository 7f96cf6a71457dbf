"""Write the measured tables of README.md from the stored results: `python tests/bench/readme_tables.py` rewrites them in place."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sparsegate.converter.report import Report, quality_table

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[2] / "README.md"
FORMATS = ("fp32", "fp16", "int8_row")
DENSITIES = (0.5, 0.2, 0.1)


def quality(report: Report) -> str:
    """The table of the bundled model: dense and every method."""
    speed = report.speed
    assert speed is not None and report.evaluation is not None
    note = " Other load disturbed every pair of runs: the speeds are not to be quoted." if speed.disturbed else ""
    return (
        f"**Quality**, the bundled model {report.model} (2.4 M parameters, code), {report.evaluation.tokens} held-out tokens, `{report.command}`, "
        f"{report.machine.cpu}, {report.machine.cores} cores:\n\n{quality_table(report)}\n\n"
        "NLL and KL in nats per token; density is the share of neurons computed; cost the MLP bytes touched per token, predictor and residual included. "
        f"This model fits in a cache, so its speed says nothing about a real one's.{note}"
    )


def speed(result: dict) -> str:
    """The table of the op on real shapes: how many times as fast as the dense model's MLP in ONNX Runtime."""

    def row(name: str, density: float) -> dict:
        (found,) = (row for row in result["rows"] if row["format"] == name and abs(row["density"] - density) < 0.01)
        return found

    lines = ["| MLP weights | " + " | ".join(f"{density:.0%} of the neurons" for density in DENSITIES) + " |", "|---|" + "---|" * len(DENSITIES)]
    lines.append("| dense (ONNX Runtime fp32) | " + " | ".join("1" for _ in DENSITIES) + " |")
    for name in FORMATS:
        cells = [row(name, density) for density in DENSITIES]
        lines.append(f"| sparse {name} | " + " | ".join(f"{cell['ratio']:.1f} ({cell['gb_per_s']:.0f} GB/s)" for cell in cells) + " |")
    return (
        f"**Speed** of the op against ONNX Runtime's dense fp32 MLP, back to back: d = {result['d']}, n = {result['n']}, "
        f"predictor of rank {result['r']} inside, one token, {result['threads']} threads, cold weights, a new selection at every call, "
        f"{result['machine']}:\n\n" + "\n".join(lines) + "\n\n"
        "Quartiles, other densities, shares of the stream bandwidth and the ratio to ONNX Runtime's own 8-bit op: [op_cpu.md](tests/bench/results/op_cpu.md)."
    )


def fill(text: str) -> str:
    """README's text with its tables made anew."""
    tables = {
        "quality": quality(Report.load(RESULTS / "bundled.json")),
        "speed": speed(json.loads((RESULTS / "op_cpu.json").read_text(encoding="utf-8"))),
    }
    for name, table in tables.items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text(encoding="utf-8")), encoding="utf-8")

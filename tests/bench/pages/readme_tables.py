"""Write the measured tables of README.md from the stored results, in place.

python tests/bench/pages/readme_tables.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from sparsegate.converter.evaluation.records import Report
from sparsegate.converter.evaluation.recovery_record import RecoveryRecord
from sparsegate.converter.report.recovery import before_after_table
from sparsegate.converter.report.speed import op_rows
from sparsegate.converter.report.tables import quality_table

sys.path.insert(0, str(Path(__file__).parents[1]))
from pages.real_model_page import load, readme
from records.folders import README, RESULTS

FORMATS = ("fp32", "fp16", "bf16", "int8", "int4")
DENSITIES = (0.5, 0.2, 0.1)


def speed(result: dict) -> str:
    """The table of the op on real shapes: how many times as fast as ONNX Runtime's dense product of the
    same precision.
    """
    rows = {
        (row["format"], row["asked"]): row
        for row in op_rows(result)
        if row["tokens"] == 1 and row["score"] == "predictor"
    }
    lines = [
        "| MLP weights | against ONNX Runtime's | "
        + " | ".join(f"{density:.0%} of the neurons" for density in DENSITIES)
        + " |"
    ]
    lines.append("|---|---|" + "---|" * len(DENSITIES))
    lines.append("| dense (ONNX Runtime, each precision's own) | itself |" + " 1 |" * len(DENSITIES))
    for name in FORMATS:
        cells = [rows[name, density] for density in DENSITIES if (name, density) in rows]
        if len(cells) < len(DENSITIES):
            continue
        against = cells[0]["dense"][0]["name"].removeprefix("ONNX Runtime ")
        said = (
            f"{cell['dense'][0]['ratio']:.1f} ({cell['gb_per_s']:.0f} "
            f"GB/s){'' if cell['dense'][0]['ratio'] > 1 else ', not faster'}"
            for cell in cells
        )
        lines.append(f"| {name} | {against} | " + " | ".join(said) + " |")
    settings = result["settings"]
    return (
        "**Speed** of the op, times ONNX Runtime's dense MLP of the same precision (its CPU has no faster fp16 than "
        f"fp32), back to back: d = {settings['d']}, "
        f"n = {settings['n']}, predictor of rank {settings['r']} inside, one token, {settings['threads']} threads, "
        "cold weights, a new selection every call, "
        f"{result['machine']['cpu']}, {result['isa']}:\n\n" + "\n".join(lines) + "\n\n"
        "Every row with quartiles, shares of the stream bandwidth, prompts, a whole model beside llama.cpp and torch, "
        "and where sparsegate loses: "
        "[performance](docs/performance.md)."
    )


def recovery(record: RecoveryRecord, report: Report) -> str:
    """The bundled model before and after recovery, and what was made of it."""
    after, minutes = record.recovered, (record.text.seconds + record.seconds) / 60
    cores = f"{record.machine.cores} core{'s' if record.machine.cores > 1 else ''}"
    return (
        f"The bundled model, {minutes:.0f} minutes on {record.machine.cpu}, {cores}, text sampling included: "
        f"{1 - after.density:.1%} of the products exactly zero, held-out NLL "
        f"{record.rise:+.2%}.\n\n{before_after_table(record)}\n\n"
        f"As `{report.command}` wrote it, predictor cost included:\n\n{quality_table(report)}\n\n"
        "Curves, layers, speeds and dReLU from scratch: [turbosparse](docs/turbosparse.md)."
    )


def fill(text: str) -> str:
    """README's text with its tables made anew."""
    tables = {
        "quality": readme(load()),
        "recovery": recovery(RecoveryRecord.load(RESULTS / "recovery.json"), Report.load(RESULTS / "recovered.json")),
        "speed": speed(json.loads((RESULTS / "op_cpu.json").read_text(encoding="utf-8"))),
    }
    for name, table in tables.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda found, table=table: f"{found[1]}{table}\n{found[2]}",
            text,
            flags=re.DOTALL,
        )
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text(encoding="utf-8")), encoding="utf-8")

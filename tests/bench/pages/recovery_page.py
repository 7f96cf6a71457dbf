"""Write docs/turbosparse.md and its pictures from the stored results.

    python tests/bench/pages/recovery_page.py

`benchmarks/recovery.py` stores them.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from sparsegate.converter.evaluation.records import Report
from sparsegate.converter.evaluation.recovery_record import RecoveryRecord
from sparsegate.converter.report.plots import plot_recovery, plot_zeros
from sparsegate.converter.report.recovery import before_after_table, heldout_cells, spent_table, zeros_table
from sparsegate.converter.report.tables import quality_table, table

sys.path.insert(0, str(Path(__file__).parents[1]))
from records.folders import DOCS, RESULTS

PAGE = DOCS / "turbosparse.md"
RECORD, RECOVERED = "recovery.json", "recovered.json"
PREDICTORS_RECORD, PREDICTORS = "recovery_predictors.json", "recovered_predictors.json"
SCRATCH = "scratch.json"
INTRODUCTION = """# dReLU: exact zeros by recovery training

Turbo Sparse (arXiv 2406.05955) replaces a model's SwiGLU by dReLU, relu(gate x) * relu(up x), and trains it until it is
as good as before; most products are then exactly zero. Everything on this page is written by `python
tests/bench/pages/recovery_page.py` from the JSON files in `tests/bench/results/`.

The bundled model, on CPU cores alone and without any text but what the dense model writes itself: neurons are turned so
that dReLU drops the weaker sign, then all weights are trained on the divergence from the dense model, its blocks'
outputs, and a count of open units that a controller leads to the wished density. `sparsegate convert --recipe
turbosparse -o out` does it again."""


def load(name: str) -> dict[str, Any]:
    """A stored result."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def scratch_lines(stored: dict[str, Any]) -> list[str]:
    """The table of the trainings from scratch and, by seed, how much higher dReLU's loss is."""
    rows, bits = [], {}
    for run in stored["runs"]:
        last = run["curve"][-1]
        bits[run["activation"], run["seed"]] = last["heldout_bits_per_byte"]
        minutes = "-" if run["cpu_seconds"] is None else f"{run['cpu_seconds'] / 60:.1f}"
        rows.append(
            [run["activation"], str(run["seed"]), str(run["steps"]), minutes, f"{last['heldout_bits_per_byte']:.4f}"]
        )
    found = table((["activation", "seed", "steps", "CPU minutes", "held-out bits per byte"], rows))
    seeds = sorted({seed for _, seed in bits})
    changes = [
        f"seed {seed}: {bits['drelu', seed] / bits['silu', seed] - 1:+.2%}"
        for seed in seeds
        if {("drelu", seed), ("silu", seed)} <= set(bits)
    ]
    return [found, "", f"dReLU's loss against SwiGLU's: {', '.join(changes)}."]


def speed_lines() -> list[str]:
    """What `bench` measured of recovered models and of the op with dReLU, where it did."""
    from sparsegate.converter.report.speed import page as bench_page

    found: list[str] = []
    for path in sorted(RESULTS.glob("drelu_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found += ["", bench_page(result) if result.get("kind") else folder_lines(result, path.stem)]
    return found


def folder_lines(result: dict[str, Any], name: str) -> str:
    """A recovered folder beside the graph of its dense source's sizes; the stored file's `name` ends with that of the
    recipe.
    """
    body = []
    for phase in ("prefill", "decode"):
        base, own = (result[role][f"{phase}_tokens_per_s"] for role in ("baseline", "candidate"))
        body.append([phase, f"{base:.1f}", f"{own:.1f}", f"{result[phase]['ratio']:.2f}", result[phase]["verdict"]])
    settings = result["settings"]
    said = (
        f"{settings['prompt_tokens']} prompt and {settings['new_tokens']} new tokens, "
        f"{settings['threads'] or 'all'} threads, {len(result['samples'])} pairs"
    )
    quiet = "" if result["quiet"] else " Other load disturbed every pair: not to be quoted."
    cells = ([name.removeprefix("drelu_"), "dense tok/s", "tok/s", "ratio", "verdict"], body)
    return f"{table(cells)}\n\n{said}. Written by `{result['command']}`. The model fits in a cache.{quiet}"


def page() -> str:
    """The page."""
    record, report = RecoveryRecord.model_validate(load(RECORD)), Report.model_validate(load(RECOVERED))
    after = record.recovered
    parts = [
        INTRODUCTION,
        "",
        "## Before and after",
        "",
        f"Held out: {record.evaluation.name}, {record.evaluation.tokens} tokens. Exact zeros after recovery: "
        f"{1 - after.density:.1%} of the units, NLL "
        f"{record.rise:+.2%} of the dense model's (perplexity {math.exp(after.nll - record.dense.nll) - 1:+.1%}).",
        "",
        before_after_table(record),
        "",
        "By layer:",
        "",
        zeros_table(record),
        "",
        "What it cost:",
        "",
        spent_table(record),
        "",
        "![loss and density against tokens](recovery.png)",
        "",
        "![exact zeros by layer](recovery_zeros.png)",
        "",
        "On every fourth of the held-out windows while it was trained:",
        "",
        table(heldout_cells(record)),
        "",
        "## The checkpoint",
        "",
        f"`{report.command}`; cost is the bytes of the feed-forward networks touched per token, predictor included.",
        "",
        quality_table(report),
        "",
    ]
    if (RESULTS / PREDICTORS).is_file():
        other = Report.model_validate(load(PREDICTORS))
        said = f"`{other.command}`: predictors trained with the weights; `exact` are the same weights without them."
        parts += ["With predictors:", "", said, "", quality_table(other), ""]
        spent = RecoveryRecord.model_validate(load(PREDICTORS_RECORD))
        parts += [spent_table(spent), "", "Held out as above:", "", table(heldout_cells(spent)), ""]
    speed = speed_lines()
    if speed:
        parts += ["## Speed against its own dense source", *speed, ""]
    if (RESULTS / SCRATCH).is_file():
        parts += [
            "## dReLU from scratch",
            "",
            "`examples/pretrain.py train --steps 1000`, everything else equal:",
            "",
            *scratch_lines(load(SCRATCH)),
            "",
        ]
    return "\n".join(parts)


def write_page() -> None:
    """The page and its pictures."""
    PAGE.write_text(page(), encoding="utf-8")
    record = RecoveryRecord.model_validate(load(RECORD))
    plot_recovery(DOCS / "recovery.png", record)
    plot_zeros(DOCS / "recovery_zeros.png", record)


if __name__ == "__main__":
    write_page()

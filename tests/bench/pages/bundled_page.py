"""Write docs/bundled.md, what the main job measures on the bundled model.

python tests/bench/pages/bundled_page.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from sparsegate.converter.evaluation.records import Report
from sparsegate.converter.report.tables import quality_table

sys.path.insert(0, str(Path(__file__).parents[1]))
from records.folders import DOCS, RESULTS

STORED = RESULTS / "bundled.json"
PAGE = DOCS / "bundled.md"


def page(report: Report) -> str:
    """The whole page: dense and every method."""
    speed = report.speed
    assert speed is not None and report.evaluation is not None
    note = " Other load disturbed every pair of runs: the speeds are not to be quoted." if speed.disturbed else ""
    return (
        f"# The bundled model, measured\n\n{report.model} (2.4 M parameters, code), {report.evaluation.tokens} "
        "held-out tokens, "
        f"`{report.command}`, {report.machine.cpu}, {report.machine.cores} cores. Written by `python "
        "tests/bench/pages/bundled_page.py`.\n\n"
        f"{quality_table(report)}\n"
        "KL in nats per token; density is the share of neurons computed; cost the MLP bytes touched per token, "
        "predictor and residual "
        f"included. This model fits in a cache, so its speed says nothing about a real one's.{note} For one that does "
        "not, see "
        "[a real model](real_model.md).\n"
    )


def write_page() -> None:
    """The page of the stored report."""
    PAGE.write_text(page(Report.load(STORED)), encoding="utf-8")


if __name__ == "__main__":
    write_page()

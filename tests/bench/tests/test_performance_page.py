"""docs/performance.md is what the stored results give; what it calls a loss is one, and every loss is named."""

from __future__ import annotations

import json
from pathlib import Path

from pages.performance_page import DOCS, OP, PAGE, PLOT, RESULTS, losses, models, page
from sparsegate.converter.report.speed import op_rows


def test_page_is_that_of_the_stored_results() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page() == text, "run python tests/bench/pages/performance_page.py"
    assert (DOCS / PLOT.name).read_bytes()[:4] == b"\x89PNG" and "CUDA" in text and "## How to repeat it" in text
    assert "sparsegate bench --op gated_mlp" in text and "sparsegate bench --shape llama-1b" in text


def test_losses_are_named() -> None:
    op = json.loads((RESULTS / OP).read_text(encoding="utf-8"))
    slow = sum(dense["ratio"] <= 1 for row in op_rows(op) for dense in row["dense"])
    assert len(losses(op, None, [])) == slow
    whole = models()
    worse = sum(
        row[phase]["ratio"] <= 1 for result in whole for row in result["ratios"] for phase in ("prefill", "decode")
    )
    assert len(losses(None, None, whole)) == worse and whole
    changed = json.loads(json.dumps(op))
    first = next(row for row in changed["rows"] if row.get("dense"))
    first["dense"][0] |= {"ratio": 0.5, "verdict": "not faster"}
    assert f"{first['format']}, 1 token" in " ".join(losses(changed, None, [])) and "0.50 times" in " ".join(
        losses(changed, None, [])
    )


def test_rows_are_quotable() -> None:
    """At least 15 clean pairs a comparison, and a density within a point of what was asked."""
    for path in sorted(Path(RESULTS).glob("*_cpu.json")):
        for row in op_rows(json.loads(path.read_text(encoding="utf-8"))):
            assert all(dense["pairs"] >= 15 for dense in row["dense"]) and abs(row["density"] - row["asked"]) < 0.01

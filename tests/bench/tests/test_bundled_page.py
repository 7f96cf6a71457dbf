"""docs/bundled.md is what the stored report gives."""

from __future__ import annotations

from pages.bundled_page import PAGE, STORED, page
from sparsegate.converter.evaluation.records import Report


def test_page_is_that_of_the_stored_report() -> None:
    report = Report.load(STORED)
    assert page(report) == PAGE.read_text(encoding="utf-8"), "run python tests/bench/pages/bundled_page.py"
    worse = report.model_copy(update={"rows": [row.model_copy(update={"kl": row.kl + 0.01}) for row in report.rows]})
    assert page(worse) != page(report)

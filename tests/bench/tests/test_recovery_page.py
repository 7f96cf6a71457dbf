"""docs/turbosparse.md is what the stored results give, and says what they say."""

from __future__ import annotations

import re

import pytest

from pages.recovery_page import DOCS, PAGE, load, page, scratch_lines
from sparsegate.converter.evaluation.records import Report
from sparsegate.converter.evaluation.recovery_record import RecoveryRecord


def test_page_is_that_of_the_stored_results() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page() == text, "run python tests/bench/pages/recovery_page.py"
    for picture in re.findall(r"!\[.*?\]\((.+?)\)", text):
        assert (DOCS / picture).read_bytes()[:4] == b"\x89PNG"


def test_the_checkpoint_is_the_recovered_model() -> None:
    record, report = RecoveryRecord.model_validate(load("recovery.json")), Report.model_validate(load("recovered.json"))
    dense, *rows = report.rows
    assert dense.nll == pytest.approx(record.dense.nll, abs=1e-6) and any(row.selected for row in rows)
    assert rows[0].nll == pytest.approx(record.recovered.nll, abs=2e-3)
    assert record.text.sampled and record.evaluation.tokens == record.dense.tokens
    sites = record.recovered.sites
    assert record.recovered.density == pytest.approx(sum(site.density for site in sites) / len(sites), abs=1e-9)


def test_losses_from_scratch_are_compared_by_seed() -> None:
    def run(activation: str, seed: int, bits: float) -> dict:
        return {
            "activation": activation,
            "seed": seed,
            "steps": 10,
            "cpu_seconds": 90.0,
            "curve": [{"step": 10, "heldout_bits_per_byte": bits}],
        }

    table, _, said = scratch_lines(
        {
            "runs": [
                run("silu", 0, 2.0),
                run("drelu", 0, 2.02),
                run("silu", 1, 4.0),
                run("drelu", 1, 3.9),
                run("silu", 2, 1.0),
            ]
        }
    )
    assert said == "dReLU's loss against SwiGLU's: seed 0: +1.00%, seed 1: -2.50%."
    assert "| drelu" in table and "1.5" in table and "2.0200" in table

"""What is lost over long windows, in the card and on the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from test_report import make_base, make_report, write

from sparsegate.converter.evaluation.long_record import LongContext
from sparsegate.converter.report.html import html
from sparsegate.converter.report.long_context import long_tables
from sparsegate.converter.report.plots import plot_positions
from sparsegate.converter.report.tables import table

LONG: dict[str, Any] = {
    "length": 32,
    "windows": 2,
    "positions": [
        {"first": 1, "last": 15, "tokens": 30, "nll_dense": 4.0, "nll": 4.25, "nll_error": 0.0312, "kl": 0.2}
        | {"kl_error": 0.04, "agreement": 0.7},
        {"first": 16, "last": 31, "tokens": 32, "nll_dense": 3.0, "nll": 3.125, "kl": 0.1, "agreement": 0.8},
    ],
    "repetitions": [
        {"kind": "random", "distance": 8, "sequences": 2, "tokens": 14, "nll_dense": 0.5, "nll": 1.5, "kl": 0.75}
        | {"accuracy_dense": 0.9, "accuracy": 0.6}
    ],
    "needles": [
        {"depth": 0.5, "prompts": 2, "log_probability_dense": -0.25, "log_probability": -3.5}
        | {"exact_dense": 1.0, "exact": 0.5}
    ],
}
POSITIONS = """\
tokens before  tokens  dense NLL  change  ± of it      KL  ± of KL  agreement
-------------  ------  ---------  ------  -------  ------  -------  ---------
1 to 15            30     4.0000  0.2500   0.0312  0.2000   0.0400     70.0 %
16 to 31           32     3.0000  0.1250        -  0.1000        -     80.0 %"""
COPIES = ["random", "8", "14", "0.5000", "1.5000", "0.7500", "90.0 %", "60.0 %"]
NEEDLE = ["50.0 %", "2", "-0.25", "-3.50", "100.0 %", "50.0 %"]


def test_the_tables_have_the_golden_text() -> None:
    positions, copies, recalled = (cells for _, cells in long_tables(LongContext.model_validate(LONG)))
    assert table(positions, "text") == POSITIONS
    assert copies[1] == [COPIES] and recalled[1] == [NEEDLE]
    alone = LongContext.model_validate(LONG | {"repetitions": [], "needles": []})
    assert [title for title, _ in long_tables(alone)] == ["By position"]


def test_card_and_page_show_it_where_it_was_measured(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    long = LongContext.model_validate(LONG)
    picture = plot_positions(tmp_path / "positions.png", long)
    assert picture.read_bytes() == plot_positions(tmp_path / "again.png", long).read_bytes()
    for measured in (None, LONG):
        report = make_report(long=measured)
        _, card = write(tmp_path, report, base)
        page = html(report, None, None, {} if measured is None else {"positions": picture})
        for text, row in ((card, "| 16 to 31 | 32 | 3.0000 | 0.1250 |"), (page, "16 to 31")):
            assert ("Long context" in text) == (row in text) == (measured is not None)
        assert page.count("data:image/png") == (measured is not None)

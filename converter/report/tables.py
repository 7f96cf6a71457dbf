"""Tables from a report, as Markdown for cards and as aligned text for terminals. The dense model always stands first."""

from __future__ import annotations

import math
from typing import Literal

from .results import Report, Row

ABSENT = "-"
Form = Literal["markdown", "text"]  # a pipe table for cards, or aligned columns for terminals
Cells = tuple[list[str], list[list[str]]]


def quality_table(report: Report, form: Form = "markdown") -> str:
    """One row per method: what it loses and what it costs, with speed columns where speed was measured."""
    return _FORMS[form](*_quality(report))


def layer_table(report: Report, form: Form = "markdown") -> str:
    """One row per site: densities asked for, calibrated and realised, the predictor's recall and rank, and the cost."""
    return _FORMS[form](*_layers(report))


def check_table(report: Report, form: Form = "markdown") -> str:
    """One row per check: the value, its bound, whether it holds, and what was compared."""
    body = [
        [check.name, f"{check.value:.3g}", f"{'≥' if check.at_least else '≤'} {check.bound:.3g}", "passed" if check.passed else "FAILED", check.note]
        for check in report.checks
    ]
    return _FORMS[form](["check", "value", "bound", "result", "compared"], body)


def ratio_text(ratio: float) -> str:
    """A speed ratio such as `1.42`; one below 1 never rounds up to 1."""
    text = f"{ratio:.2f}"
    return f"{math.floor(ratio * 1000) / 1000:.3f}" if ratio < 1 and text == "1.00" else text


def _quality(report: Report) -> Cells:
    rows = [report.dense, *(row for row in report.rows if row.method != "dense")]
    header = ["method", "NLL", "perplexity", "KL to dense", "agreement", "density", "cost"]
    body = [
        [_method(row), f"{row.nll:.4f}", f"{row.perplexity:.4g}", _small(row.kl), _percent(row.agreement), _percent(row.density), _percent(row.cost)]
        for row in rows
    ]
    if report.speed is not None:
        header += ["prefill tok/s", "decode tok/s", "decode / dense"]
        for cells, row in zip(body, rows, strict=True):
            cells += [_number(row.prefill_tokens_per_second), _number(row.decode_tokens_per_second), _speed(row)]
    return header, body


def _layers(report: Report) -> Cells:
    header = ["site", "target", "held-out", "realised", "recall", "rank", "cost"]
    body = [
        [
            layer.site,
            _percent(layer.density_target),
            _percent(layer.density_calibrated),
            _percent(layer.density_realised),
            _percent(layer.recall),
            ABSENT if layer.rank is None else str(layer.rank),
            _percent(layer.cost),
        ]
        for layer in report.layers
    ]
    return header, body


def _method(row: Row) -> str:
    return f"{row.method} (selected)" if row.selected else row.method


def _speed(row: Row) -> str:
    if row.method == "dense":
        return "baseline"
    if row.decode_ratio is None:
        return ABSENT
    return f"{ratio_text(row.decode_ratio)}{', not faster' if row.decode_ratio < 1 else ''}"


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1f}"


def _small(value: float) -> str:
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-4 else f"{value:.1e}"


def _markdown(header: list[str], body: list[list[str]]) -> str:
    """A pipe table whose first column is left-aligned and the others right-aligned. Ends with a newline."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (header, *body)]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], rule, *rows[1:]))


def _aligned(header: list[str], body: list[list[str]]) -> str:
    """Columns padded with spaces, without a newline at the end."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    rows = [header, ["-" * width for width in widths], *body]
    lines = ("  ".join(cell.rjust(w) if k else cell.ljust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


_FORMS = {"markdown": _markdown, "text": _aligned}

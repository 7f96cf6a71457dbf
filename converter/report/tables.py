"""Tables from a report, as Markdown for cards and as aligned text for terminals. The dense model always
stands first.
"""

from __future__ import annotations

import math
import textwrap
from typing import Literal

from ..evaluation.records import OnnxRow, Report, Row, StageTime
from .change import Change, perplexity_change
from .markdown import inline

ABSENT = "-"
TableStyle = Literal["markdown", "text"]  # a pipe table for cards, or aligned columns for terminals
Cells = tuple[list[str], list[list[str]]]
"""Header and body of a table."""


class Number(str):
    """A cell's text together with the exact value that it shows, for forms that can carry both."""

    value: float

    def __new__(cls, text: str, value: float) -> Number:
        """The text that shows a value."""
        number = super().__new__(cls, text)
        number.value = value
        return number


def quality_table(report: Report, style: TableStyle = "markdown") -> str:
    """One row per method: what it loses and what it costs, with its speed where that was measured."""
    return table(quality_cells(report), style)


def detail_table(report: Report, style: TableStyle = "markdown") -> str:
    """One row per method: quality that `quality_table` leaves out."""
    return table(detail_cells(report), style)


def speed_table(report: Report, style: TableStyle = "markdown") -> str:
    """One row per method that was timed: tokens per second, and ratios to dense."""
    return table(speed_cells(report), style)


def onnx_table(report: Report, style: TableStyle = "markdown") -> str:
    """What the ONNX files lose in their own precision, beside torch in fp32."""
    return table(onnx_cells(report), style)


def onnx_detail_table(report: Report, style: TableStyle = "markdown") -> str:
    """What `onnx_table` leaves out."""
    return table(onnx_detail_cells(report), style)


def layer_table(report: Report, style: TableStyle = "markdown") -> str:
    """One row per site: densities asked for, calibrated and realised, the predictor's recall and rank, and the cost."""
    return table(layer_cells(report), style)


def check_table(report: Report, style: TableStyle = "markdown") -> str:
    """One row per check: the value, its bound, whether it holds, and what was compared."""
    return table(check_cells(report), style)


def stage_text(report: Report, width: int = 120) -> str:
    """The seconds of every stage, beside what was expected where something was and all of it was done now, and of all,
    in lines of at most `width` columns.
    """
    compared = [stage for stage in report.stages if stage.expected_seconds is not None]
    parts = [_stage_time(stage) for stage in report.stages]
    whole = StageTime(name="in all", seconds=sum(stage.seconds for stage in report.stages))
    if any(stage.resumed for stage in report.stages):
        parts.append(_stage_time(whole))
        whole = StageTime(
            name="without what was found done",
            seconds=sum(stage.seconds for stage in report.stages if not stage.resumed),
        )
    if compared:
        whole = whole.model_copy(update={"expected_seconds": sum(stage.expected_seconds or 0.0 for stage in compared)})
    expected = " (expected)" if compared else ""
    return textwrap.fill(f"seconds{expected}: {', '.join([*parts, _stage_time(whole)])}", width)


def _stage_time(stage: StageTime) -> str:
    if stage.resumed:
        return f"{stage.name} {f'{stage.seconds:.1f} for the rest' if stage.seconds else 'found done'}"
    return (
        f"{stage.name} "
        f"{stage.seconds:.1f}{'' if stage.expected_seconds is None else f' ({stage.expected_seconds:.1f})'}"
    )


def table(cells: Cells, style: TableStyle = "markdown") -> str:
    """Header and body in one of the forms."""
    return _STYLES[style](*cells)


def check_cells(report: Report) -> Cells:
    """The cells of `check_table`."""
    body = [
        [
            check.name,
            Number(f"{check.value:.3g}", check.value),
            Number(f"{'≥' if check.at_least else '≤'} {check.bound:.3g}", check.bound),
            "passed" if check.passed else "FAILED",
            check.note,
        ]
        for check in report.checks
    ]
    return ["check", "value", "bound", "result", "compared"], body


def ratio_text(ratio: float) -> str:
    """A speed ratio such as `1.42`; one below 1 never rounds up to 1."""
    text = f"{ratio:.2f}"
    return f"{math.floor(ratio * 1000) / 1000:.3f}" if ratio < 1 and text == "1.00" else text


def quality_cells(report: Report) -> Cells:
    """The cells of `quality_table`. The change of perplexity is relative to the first row, with the standard error of
    the paired difference.
    """
    rows = _dense_first(report)
    header = ["method", "perplexity", "change", "KL", "density", "cost"]
    body = [
        [
            _method(row, report),
            Number(f"{row.perplexity:.4g}", row.perplexity),
            ABSENT
            if row is report.dense
            else _change_cell(perplexity_change(row.nll, report.dense.nll, row.nll_error)),
            nats(row.kl, small=True),
            percent(row.density),
            percent(row.cost),
        ]
        for row in rows
    ]
    if report.speed is not None:
        header.append("decode / dense")
        for cells, row in zip(body, rows, strict=True):
            cells.append(_speed(row))
    return header, body


def detail_cells(report: Report) -> Cells:
    """Quality that `quality_cells` leaves out of every row; a column in which nothing was measured is left out."""
    header = ["method", "NLL", "± of its change", "agreement", "block cost", "read"]
    body = [
        [
            _method(row, report),
            nats(row.nll),
            ABSENT if row.nll_error is None else nats(row.nll_error, small=True),
            percent(row.agreement),
            percent(row.block_cost),
            percent(row.read_share),
        ]
        for row in _dense_first(report)
    ]
    return without_absent(header, body)


def speed_cells(report: Report) -> Cells:
    """Tokens per second of every row that was timed, and the medians of their ratios to dense over
    back-to-back pairs.
    """
    body = [
        [
            _method(row, report),
            _rate(row.prefill_tokens_per_second),
            _rate(row.decode_tokens_per_second),
            ratio_cell(row.prefill_ratio),
            ratio_cell(row.decode_ratio),
        ]
        for row in _dense_first(report)
        if row.decode_tokens_per_second is not None
    ]
    return without_absent(["method", "prefill tok/s", "decode tok/s", "prefill / dense", "decode / dense"], body)


def without_absent(header: list[str], body: list[list[str]]) -> Cells:
    """The table without columns in which nothing stands."""
    keep = [k for k, _ in enumerate(header) if not body or any(row[k] != ABSENT for row in body)]
    return [header[k] for k in keep], [[row[k] for k in keep] for row in body]


def _dense_first(report: Report) -> list[Row]:
    return [report.dense, *(row for row in report.rows if row.method != "dense")]


def _change_cell(change: Change) -> str:
    return Number(change.cell, change.value)


def onnx_change(row: Row | OnnxRow, report: Report) -> Change:
    """The change of perplexity of a file, or of torch, against the dense model in fp32: on the file's own tokens where
    that is stored.
    """
    nll_dense = row.nll_dense if isinstance(row, OnnxRow) and row.nll_dense is not None else report.dense.nll
    return perplexity_change(row.nll, nll_dense, row.nll_error)


def onnx_cells(report: Report) -> Cells:
    """The cells of `onnx_table`: the dense model in fp32 and the sparse one in torch, then the ONNX files. The change
    is relative to the first row.
    """
    body = [
        [
            name,
            precision,
            runner,
            size,
            Number(f"{row.perplexity:.4g}", row.perplexity),
            ABSENT if row is report.dense else _change_cell(onnx_change(row, report)),
            nats(row.kl, small=True),
        ]
        for name, precision, runner, size, row in _onnx_rows(report)
    ]
    return ["model", "weights", "executor", "size", "perplexity", "change", "KL"], body


def onnx_detail_cells(report: Report) -> Cells:
    """What `onnx_cells` leaves out of every row."""
    body = [
        [
            name,
            precision,
            nats(row.nll),
            ABSENT if row.nll_error is None else nats(row.nll_error, small=True),
            percent(row.agreement),
            percent(row.cost),
            percent(row.read_share) if isinstance(row, OnnxRow) else ABSENT,
        ]
        for name, precision, _, _, row in _onnx_rows(report)
    ]
    return without_absent(["model", "weights", "NLL", "± of its change", "agreement", "cost", "read"], body)


def _onnx_rows(report: Report) -> list[tuple[str, str, str, str, Row | OnnxRow]]:
    """Name, weights, executor, size and numbers of every model."""
    chosen = report.chosen
    torch: list[tuple[str, str, str, str, Row | OnnxRow]] = [
        ("ungated torch" if report.swapped else "dense torch", "fp32", "torch", ABSENT, report.dense),
        (f"{chosen.method} torch", "fp32", "torch", ABSENT, chosen),
    ]
    files = [
        (
            f"{'dense' if row.model == 'dense' else chosen.method} ONNX",
            row.precision,
            row.executor,
            megabytes(row.bytes),
            row,
        )
        for row in report.onnx
    ]
    return [*torch, *files]


def megabytes(count: int) -> str:
    """Bytes as `12.3 MB`."""
    return Number(f"{count / 1e6:.1f} MB", count)


def layer_cells(report: Report) -> Cells:
    """The cells of `layer_table`."""
    header = ["site", "target", "held-out", "realised", "recall", "rank", "cost"]
    body = [
        [
            layer.site,
            percent(layer.density_target),
            percent(layer.density_calibrated),
            percent(layer.density_realised),
            percent(layer.recall),
            ABSENT if layer.rank is None else Number(str(layer.rank), layer.rank),
            percent(layer.cost),
        ]
        for layer in report.layers
    ]
    return header, body


def _method(row: Row, report: Report) -> str:
    if row.method == "dense" and report.swapped:
        return "ungated"
    return f"{row.method} (selected)" if row.selected else row.method


def _speed(row: Row) -> str:
    if row.method == "dense":
        return "baseline"
    if row.decode_ratio is None:
        return ABSENT
    return Number(f"{ratio_text(row.decode_ratio)}{', not faster' if row.decode_ratio < 1 else ''}", row.decode_ratio)


def ratio_cell(ratio: float | None) -> str:
    """A ratio of speeds."""
    return ABSENT if ratio is None else Number(ratio_text(ratio), ratio)


def percent(share: float | None) -> str:
    """A share as `50.1 %`."""
    return ABSENT if share is None else Number(f"{100 * share:.1f} %", share)


def nats(value: float, small: bool = False) -> str:
    """Nats per token with four decimals; `small` writes what they cannot show as `2.0e-05`."""
    return Number(f"{value:.1e}" if small and 0 < abs(value) < 1e-4 else f"{value:.4f}", value)


def _rate(value: float | None) -> str:
    return ABSENT if value is None else Number(f"{value:.1f}", value)


def _markdown(header: list[str], body: list[list[str]]) -> str:
    """A pipe table whose first column is left-aligned and the others right-aligned. Ends with a newline."""
    rows = [[inline(cell) for cell in row] for row in (header, *body)]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], rule, *rows[1:]))


def _aligned(header: list[str], body: list[list[str]]) -> str:
    """Columns padded with spaces, without a newline at the end."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    rows = [header, ["-" * width for width in widths], *body]
    lines = (
        "  ".join(cell.rjust(w) if k else cell.ljust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


_STYLES = {"markdown": _markdown, "text": _aligned}

"""The chosen model beside the dense one in fp32 and in fewer bits, as it was measured in the same run."""

from __future__ import annotations

from ..evaluation.records import Report
from .change import Change
from .tables import ABSENT, Cells, Number, TableStyle, nats, percent, ratio_cell, table
from .verdict import fp32_change, fp32_decode_ratio, onnx_row, reference_change


def reference_table(report: Report, style: TableStyle = "markdown") -> str:
    """`reference_cells` in one of the forms."""
    return table(reference_cells(report), style)


def reference_cells(report: Report) -> Cells:
    """The dense model in fp32, in fewer bits, and the chosen one as it is shipped: loss, bytes read per token and
    decoding speed, relative to the first.
    """
    precision = (
        report.speed.precision if report.speed else str(report.recipe.get("export", {}).get("precision", "fp32"))
    )
    sparse = onnx_row(report, "sparse")
    body = [["dense", "fp32", ABSENT, ABSENT, percent(1.0), ratio_cell(1.0 if report.speed else None)]]
    for dense in report.references:
        ratio = None if dense.disturbed else dense.decode_ratio
        body.append(
            [
                "dense",
                dense.precision,
                _change(reference_change(dense)),
                nats(max(dense.kl, 0.0), small=True),
                percent(dense.read_share),
                ratio_cell(ratio),
            ]
        )
    chosen = report.chosen
    share = sparse.read_share if sparse is not None else chosen.read_share if precision == "fp32" else None
    quiet = report.speed is not None and not report.speed.disturbed
    kl = sparse.kl if sparse is not None else chosen.kl
    ratio = fp32_decode_ratio(report) if quiet else None
    body.append(
        [
            f"{chosen.method} (selected)",
            precision,
            _change(fp32_change(report)),
            nats(kl, small=True),
            percent(share),
            ratio_cell(ratio),
        ]
    )
    return ["model", "weights", "change", "KL", "read", "decode / fp32"], body


def _change(change: Change) -> str:
    return Number(change.cell, change.value)

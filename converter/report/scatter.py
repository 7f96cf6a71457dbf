"""One picture of all candidates: the change of perplexity over the weights that a token reads, dense models of fewer
bits among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, SymmetricalLogLocator

from ..evaluation.records import Report, Row
from .change import Change, perplexity_change
from .tables import ratio_text
from .verdict import fp32_change, fp32_decode_ratio, onnx_row, reference_change

_LINEAR = 0.01
"""Changes of perplexity up to here are drawn to scale, larger ones by their logarithm, where they range wide."""
_WIDE = 0.2


@dataclass(frozen=True)
class PlotPoint:
    """One model of the picture: what a token of it reads, relative to dense in fp32, the change of perplexity, its
    decoding speed relative to dense in fp32 where it was timed, and what it is.
    """

    name: str
    share: float
    change: Change
    decode_ratio: float | None = None
    dense: bool = False
    selected: bool = False

    @property
    def label(self) -> str:
        """The name, with the speed where it was measured."""
        return self.name if self.decode_ratio is None else f"{self.name}, decodes {ratio_text(self.decode_ratio)}×"


def candidate_points(report: Report) -> list[PlotPoint]:
    """The dense models, then every candidate, in the order of the report.

    1. Where the chosen one's file was measured in another precision, it has a point of its own as it is shipped.
    2. A report without shares of the whole model has those of the MLPs, and no dense models of fewer bits.
    """
    rows = [row for row in report.rows if row.method != "dense"]
    if not rows:
        return []
    whole = all(row.read_share is not None for row in rows)
    quiet, shipped = report.speed is not None and not report.speed.disturbed, onnx_row(report, "sparse")
    timed = fp32_decode_ratio(report) if quiet else None
    points = [
        PlotPoint(
            "ungated" if report.swapped else "dense fp32",
            1.0,
            Change(0.0),
            1.0 if timed is not None else None,
            dense=True,
        )
    ]
    for dense in report.references if whole else ():
        ratio = None if dense.disturbed else dense.decode_ratio
        points.append(
            PlotPoint(f"dense {dense.precision}", dense.read_share, reference_change(dense), ratio, dense=True)
        )
    as_shipped = whole and shipped is not None and shipped.read_share is not None
    for row in rows:
        chosen = row is report.chosen
        change = perplexity_change(row.nll, report.dense.nll, row.nll_error)
        name = f"{row.method} (selected)" if chosen and not as_shipped else row.method
        points.append(
            PlotPoint(
                name,
                _share(row, whole),
                change,
                timed if chosen and not as_shipped else None,
                selected=chosen and not as_shipped,
            )
        )
    if as_shipped:
        assert shipped is not None and shipped.read_share is not None
        name = f"{report.chosen.method} {shipped.precision} (selected)"
        points.append(PlotPoint(name, shipped.read_share, fp32_change(report), timed, selected=True))
    return points


def _share(row: Row, whole: bool) -> float:
    return row.read_share if whole and row.read_share is not None else row.cost


def draw_candidates(points: Sequence[PlotPoint], report: Report) -> Figure:
    """The points with bars of one standard error, each named at the right edge; the selected one is a star, dense
    models are squares.
    """
    figure = Figure(figsize=(7.3, max(4.0, 1.2 + 0.27 * len(points))), layout="constrained")
    panel = figure.subplots()
    for point in points:
        marker, colour = ("s", "0.35") if point.dense else ("*", "tab:red") if point.selected else ("o", "tab:blue")
        panel.errorbar(
            100 * point.share,
            100 * point.change.value,
            yerr=None if point.change.error is None else 100 * point.change.error,
            marker=marker,
            markersize=13 if point.selected else 6,
            color=colour,
            linestyle="none",
            capsize=3,
            zorder=3 if point.selected else 2,
        )
    _scale(panel, points)
    _name(panel, points)
    whole = any(row.read_share is not None for row in report.rows)
    panel.set_xlabel(f"weights that a token reads, % of {'dense fp32' if whole else 'the dense MLPs'}")
    panel.set_ylabel(f"perplexity against {'ungated' if report.swapped else 'dense fp32'}, %")
    panel.grid(alpha=0.3)
    bars = "; bars: one standard error" if any(point.change.error for point in points) else ""
    speeds = (
        "\n×: times the decoding speed of dense fp32 on this machine"
        if any(point.decode_ratio is not None for point in points)
        else ""
    )
    panel.set_title(f"lower and further left is better{bars}{speeds}", fontsize=9, loc="left")
    return figure


def _scale(panel: Axes, points: Sequence[PlotPoint]) -> None:
    """Shares from 0, changes to scale or, where they range wide, by their logarithm above 1 %."""
    changes = [point.change.value for point in points]
    panel.set_xlim(0, 105 * max(1.0, *(point.share for point in points)))
    errors = [point.change.error or 0.0 for point in points]
    low = min(change - error for change, error in zip(changes, errors, strict=True))
    high = max(change + error for change, error in zip(changes, errors, strict=True))
    if high <= _WIDE:
        panel.set_ylim(100 * min(1.3 * low, -0.1 * high, -0.001), 100 * max(1.15 * high, 0.002))
        panel.yaxis.set_major_locator(MaxNLocator(8))
    else:
        panel.set_yscale("symlog", linthresh=100 * _LINEAR, linscale=0.5)
        panel.set_ylim(100 * min(1.5 * low, -_LINEAR / 3), 180 * high)
        panel.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=100 * _LINEAR, subs=(1.0, 3.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value == 0 else f"{value:+g}"))


def _name(panel: Axes, points: Sequence[PlotPoint]) -> None:
    """Dense models' labels at their points; every candidate's right of the axes, in the order of their heights, with a
    thin line to the point.
    """
    for point in points:
        if point.dense:
            end = point.share > 0.5
            panel.annotate(
                point.label,
                (100 * point.share, 100 * point.change.value),
                (-8, -3) if end else (7, 7),
                textcoords="offset points",
                fontsize=8.5,
                color="0.35",
                ha="right" if end else "left",
            )
    to_axes = panel.transData + panel.transAxes.inverted()
    order = sorted((point for point in points if not point.dense), key=lambda point: (point.change.value, -point.share))
    wanted = [float(to_axes.transform((0.0, 100 * point.change.value))[1]) for point in order]
    for point, height in zip(order, spread(wanted, min(0.06, 1.0 / max(1, len(order) - 1))), strict=True):
        panel.annotate(
            point.label,
            (100 * point.share, 100 * point.change.value),
            (1.02, height),
            textcoords="axes fraction",
            fontsize=8.5,
            va="center",
            fontweight="bold" if point.selected else "normal",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3},
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights in 0 to 1, moved as little as it takes (least squares) for each to lie `gap` or more above the
    one before; all of them must fit.

    Heights less the gaps below them have to ascend, which is isotonic regression by pooling adjacent violators.
    """
    pools: list[tuple[float, int]] = []
    for k, height in enumerate(heights):
        mean, count = height - k * gap, 1
        while pools and pools[-1][0] > mean:
            below, members = pools.pop()
            mean, count = (below * members + mean * count) / (members + count), members + count
        pools.append((mean, count))
    bases = [mean for mean, count in pools for _ in range(count)]
    most = 1.0 - gap * (len(bases) - 1)
    return [min(max(base, 0.0), most) + k * gap for k, base in enumerate(bases)]

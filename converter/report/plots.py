"""PNG plots from stored results, drawn without a display and byte for byte the same for the same report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..evaluation.long_record import LongContext
from ..evaluation.records import Report
from ..evaluation.recovery_record import RecoveryRecord
from .curves import Correlations, Curves, summarise
from .long_context import draw_positions
from .scatter import candidate_points, draw_candidates

CANDIDATES = "report/candidates.png"
_DPI = 110
_MARKERS = "osD^vP*Xpdh<>"
_COLOURS = (
    "tab:blue",
    "tab:orange",
    "tab:green",
    "tab:red",
    "tab:purple",
    "tab:brown",
    "tab:pink",
    "tab:olive",
    "tab:cyan",
    "black",
)
_ORACLE_COLOURS = ("0.2", "darkgoldenrod", "slateblue", "0.5", "firebrick", "teal", "0.7", "darkolivegreen")
_SHOWN = 4.0
"""NLL is drawn up to this many times the smallest method's worst rise over dense: one collapsed method must not flatten
all others.
"""


def plot_candidates(folder: Path, report: Report) -> Path | None:
    """Draw what every candidate loses over what a token of it reads into `folder`/report/candidates.png and return the
    file; None without a sparse row.
    """
    points = candidate_points(report)
    if not points:
        return None
    return _save(folder / CANDIDATES, draw_candidates(points, report))


def plot_layers(folder: Path, report: Report) -> Path | None:
    """Draw density and recall per site into `folder`/report/layers.png and return the file; None when the report has no
    sites.
    """
    if not report.layers:
        return None
    return _save(folder / "report" / "layers.png", _draw_layers(report))


def plot_positions(path: Path, long: LongContext) -> Path:
    """Draw what is lost over the tokens before a token. Returns the file."""
    return _save(path, draw_positions(long))


def plot_curves(path: Path, curves: Curves) -> Path:
    """Draw NLL and KL of every method over density and over cost, with the dense line; oracles are dashed and say so.
    Returns the file.
    """
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    methods = [*enumerate(curves.methods(oracle=False)), *enumerate(curves.methods(oracle=True))]
    for number, name in methods:
        points = summarise(curves, name)
        colours = _ORACLE_COLOURS if points[0].oracle else _COLOURS
        style = {
            "color": colours[number % len(colours)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "linestyle": "--" if points[0].oracle else "-",
            "label": f"{name} (oracle)" if points[0].oracle and "oracle" not in name else name,
        }
        for value, row in zip(("nll", "kl"), panels, strict=True):
            for axis, panel in zip(("density", "cost"), row, strict=True):
                _line(
                    panel,
                    [point.mean[axis] for point in points],
                    [point.mean[value] for point in points],
                    [point.spread[value] for point in points],
                    style,
                )
    for panel in panels[0]:
        panel.axhline(curves.dense.nll, color="0.4", linewidth=1, linestyle=":", label="dense")
    worst = [
        max(point.mean["nll"] for point in summarise(curves, name)) - curves.dense.nll
        for name in curves.methods(oracle=False) or curves.methods()
    ]
    if worst:
        lowest = min(row.nll for row in curves.rows)
        rise = max(_SHOWN * min(worst), 0.05)
        panels[0, 0].set_ylim(
            lowest - 0.05 * rise, min(curves.dense.nll + rise, max(row.nll for row in curves.rows) + 0.05 * rise)
        )
    panels[0, 0].set_ylabel("NLL, nats per token")
    panels[1, 0].set_ylabel("KL to dense, nats per token")
    panels[1, 0].set_yscale("log")
    panels[1, 0].set_xlabel("density: share of units kept")
    panels[1, 1].set_xlabel("cost: bytes touched relative to the dense MLPs")
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return _save(path, figure)


def plot_correlations(path: Path, correlations: Correlations) -> Path:
    """Draw the rank correlations of scores as a heat map with its numbers. Returns the file."""
    names = [f"{name} (oracle)" if name in correlations.oracles else name for name in correlations.scores]
    size = 2.5 + 0.45 * len(names)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(np.asarray(correlations.matrix), vmin=-1, vmax=1, cmap="RdBu_r")
    panel.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    for i, row in enumerate(correlations.matrix):
        for j, value in enumerate(row):
            panel.text(
                j,
                i,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if abs(value) > 0.6 else "black",
            )
    figure.colorbar(image, label="Spearman correlation")
    return _save(path, figure)


def plot_recovery(path: Path, record: RecoveryRecord) -> Path | None:
    """Draw a recovery over the tokens trained on: the loss and its parts, NLL on held-out text, and density. Returns
    the file; None without a curve.
    """
    panels = [
        draw
        for draw, points in ((_draw_loss, record.curve), (_draw_heldout, record.heldout), (_draw_density, record.curve))
        if points
    ]
    if not panels:
        return None
    figure = Figure(figsize=(7, 2.8 * len(panels)), layout="constrained")
    for draw, panel in zip(panels, figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], strict=True):
        draw(panel, record)
        panel.set_xscale("log")
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    figure.axes[-1].set_xlabel("tokens trained on")
    return _save(path, figure)


def plot_zeros(path: Path, record: RecoveryRecord) -> Path | None:
    """Draw the share of exact zeros per site before and after a recovery. Returns the file; None when the record has no
    sites.
    """
    before, after = record.swapped.sites, record.recovered.sites
    if not after:
        return None
    figure = Figure(figsize=(7, 3), layout="constrained")
    panel = figure.subplots()
    lines = [
        ("before recovery", "o", [1 - site.density for site in before]),
        ("recovered", "s", [1 - site.density for site in after]),
    ]
    lines.append(("recovered, closed gates", "^", [1 - site.opened for site in after]))
    predicted = [(k, 1 - site.predicted) for k, site in enumerate(after) if site.predicted is not None]
    for name, marker, values in lines:
        panel.plot(range(len(values)), values, marker=marker, label=name)
    if predicted:
        panel.plot([k for k, _ in predicted], [value for _, value in predicted], marker="D", label="predicted closed")
    panel.set_ylim(0, 1.02)
    panel.set_ylabel("share of units that are zero")
    panel.set_xlabel("site, from the first block to the last")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return _save(path, figure)


def _draw_loss(panel: Axes, record: RecoveryRecord) -> None:
    values: list[float] = []
    for name, label in (
        ("loss", "loss"),
        ("kl", "KL to dense"),
        ("lm", "cross-entropy"),
        ("hidden", "hidden states"),
        ("penalty", "penalty"),
    ):
        points = [
            (point.tokens, value)
            for point in record.curve
            if point.tokens and (value := getattr(point, name)) is not None
        ]
        if points:
            panel.plot(
                [tokens for tokens, _ in points],
                [value for _, value in points],
                label=label,
                linewidth=1.8 if name == "loss" else 1,
            )
            values += [value for _, value in points]
    if values and min(values) > 0:
        panel.set_yscale("log")
    panel.set_ylabel("training loss")


def _draw_heldout(panel: Axes, record: RecoveryRecord) -> None:
    points = [point for point in record.heldout if point.tokens]
    panel.plot(
        [point.tokens for point in points], [point.nll for point in points], marker="o", markersize=4, label="held out"
    )
    dense = [(point.tokens, point.nll_dense) for point in points if point.nll_dense is not None]
    if dense:
        panel.plot(
            [tokens for tokens, _ in dense], [nll for _, nll in dense], color="0.4", linestyle=":", label="dense"
        )
    panel.set_ylabel("NLL, nats per token")


def _draw_density(panel: Axes, record: RecoveryRecord) -> None:
    for points, marker, where in ((record.curve, "", "while training"), (record.heldout, "o", "held out")):
        for name, label in (("density", "density"), ("predicted", "predicted")):
            shares = [
                (point.tokens, share)
                for point in points
                if point.tokens and (share := getattr(point, name)) is not None
            ]
            if shares:
                panel.plot(
                    [tokens for tokens, _ in shares],
                    [share for _, share in shares],
                    marker=marker,
                    markersize=4,
                    label=f"{label}, {where}",
                )
    panel.set_ylim(bottom=0)
    panel.set_ylabel("share of units")


def _line(panel: Axes, x: list[float], y: list[float], spread: list[float], style: dict[str, str]) -> None:
    """Points in the order of x, with bars of one standard deviation where there are several seeds."""
    order = np.argsort(x)
    panel.plot(np.asarray(x)[order], np.asarray(y)[order], markersize=4, linewidth=1.2, **style)  # type: ignore[arg-type]
    if any(spread):
        panel.errorbar(x, y, yerr=spread, fmt="none", ecolor=style["color"], capsize=2, linewidth=0.8)


def _save(path: Path, figure: Figure) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    return path


def _draw_layers(report: Report) -> Figure:
    layers = report.layers
    recalls = [(k, layer.recall) for k, layer in enumerate(layers) if layer.recall is not None]
    figure = Figure(figsize=(7, 5 if recalls else 3), layout="constrained")
    panels = figure.subplots(2 if recalls else 1, 1, sharex=True, squeeze=False)[:, 0]
    places = range(len(layers))
    targets = [(k, layer.density_target) for k, layer in enumerate(layers) if layer.density_target is not None]
    if targets:
        panels[0].plot(
            [k for k, _ in targets], [target for _, target in targets], linestyle="--", color="0.5", label="target"
        )
    panels[0].plot(places, [layer.density_calibrated for layer in layers], marker="o", label="held-out calibration")
    panels[0].plot(places, [layer.density_realised for layer in layers], marker="s", label="evaluation text")
    panels[0].set_ylabel("density")
    panels[0].legend(fontsize=8)
    if recalls:
        panels[1].plot([k for k, _ in recalls], [recall for _, recall in recalls], marker="o", color="tab:green")
        panels[1].set_ylabel("recall")
    for panel in panels:
        panel.set_ylim(0, 1.02)
        panel.grid(alpha=0.3)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("site, from the first block to the last")
    return figure

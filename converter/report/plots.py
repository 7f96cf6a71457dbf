"""PNG plots from a report, drawn without a display and byte for byte the same for the same report."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .results import Report

_DPI = 110


def plot_layers(folder: Path, report: Report) -> Path | None:
    """Draw density and recall per site into `folder`/report/layers.png and return the file; None when the report has no sites."""
    if not report.layers:
        return None
    path = folder / "report" / "layers.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = _draw(report)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    return path


def _draw(report: Report) -> Figure:
    layers = report.layers
    recalls = [(k, layer.recall) for k, layer in enumerate(layers) if layer.recall is not None]
    figure = Figure(figsize=(7, 5 if recalls else 3), layout="constrained")
    panels = figure.subplots(2 if recalls else 1, 1, sharex=True, squeeze=False)[:, 0]
    places = range(len(layers))
    targets = [(k, layer.density_target) for k, layer in enumerate(layers) if layer.density_target is not None]
    if targets:
        panels[0].plot([k for k, _ in targets], [target for _, target in targets], linestyle="--", color="0.5", label="target")
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

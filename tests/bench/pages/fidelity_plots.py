"""The pictures of docs/fidelity.md, drawn from the stored benchmark alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from records.fidelity_results import Fidelity, Loss, Scores
from sparsegate.converter.scores import score_title


def has_curves(scores: Scores) -> bool:
    """Whether several sparsities were measured."""
    return len({row.sparsity_target for row in scores.rows}) > 1


def draw(folder: Path, result: Fidelity) -> list[str]:
    """Every picture of a result into `folder`; returns the files' names."""
    pictures = {
        "fidelity_kinds.png": _kinds(result),
        "fidelity_positions.png": _positions(result),
    }
    if any(kind.blocks for kind in result.kinds):
        pictures["fidelity_blocks.png"] = _blocks(result)
    if result.scores is not None and has_curves(result.scores):
        pictures["fidelity_scores.png"] = _scores(result.scores)
    for name, figure in pictures.items():
        FigureCanvasAgg(figure)
        figure.savefig(folder / name, dpi=110, metadata={"Software": None})
    return list(pictures)


def _figure(columns: int, height: float = 3.6) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.2 * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def _kinds(result: Fidelity) -> Figure:
    figure, axes = _figure(2)
    for axis, measure, what in zip(axes, ("nll", "kl"), ("NLL over dense", "KL from dense"), strict=True):
        for kind in dict.fromkeys(row.kind for row in result.rows):
            rows = [row for row in result.rows if row.kind == kind]
            values = [getattr(row.loss, measure) for row in rows]
            errors = [getattr(row.loss, f"{measure}_error") for row in rows]
            axis.errorbar([row.cost for row in rows], values, errors, marker="o", markersize=3, capsize=2, label=kind)
        axis.set(
            xlabel="bytes of the networks touched, share of dense", ylabel=f"{what} (nats per token)", yscale="log"
        )
    axes[0].legend(fontsize=8)
    return figure


def _blocks(result: Fidelity) -> Figure:
    figure, axes = _figure(2)
    titles = ("one block masked, the others dense", "all blocks masked, less all but one")
    for axis, form, title in zip(axes, ("alone", "gain"), titles, strict=True):
        for kind in result.kinds:
            found: list[tuple[int, Loss]] = [(row.layer, getattr(row, form)) for row in kind.blocks]
            found = [(layer, loss) for layer, loss in found if loss is not None]
            values, errors = [loss.kl for _, loss in found], [loss.kl_error for _, loss in found]
            axis.errorbar([layer for layer, _ in found], values, errors, marker="o", markersize=3, label=kind.kind)
        axis.set(title=title, xlabel="block", ylabel="KL from dense (nats per token)")
    axes[0].legend(fontsize=8)
    axes[0].set_yscale("log")
    return figure


def _positions(result: Fidelity) -> Figure:
    figure, axes = _figure(2)
    for kind in result.kinds:
        centres = [(band.first + band.last) / 2 + 1 for band in kind.bands]
        values, errors = [band.kl for band in kind.bands], [band.kl_error for band in kind.bands]
        axes[0].errorbar(centres, values, errors, marker="o", markersize=3, capsize=2, label=kind.kind)
    axes[0].set(xscale="log", xlabel="position, from 1", ylabel="KL from dense (nats per token)")
    axes[0].set_title("all blocks masked")
    axes[0].legend(fontsize=8)
    centres = [(row.first + row.last) / 2 + 1 for row in result.peaks]
    axes[1].plot(centres, [row.median for row in result.peaks], marker="o", markersize=3, label="median")
    axes[1].plot(centres, [row.largest for row in result.peaks], marker="o", markersize=3, label="largest")
    axes[1].set(xscale="log", yscale="log", xlabel="position, from 1", ylabel="largest entry of hidden states")
    axes[1].set_title("dense model")
    axes[1].legend(fontsize=8)
    return figure


def _scores(scores: Scores) -> Figure:
    kinds = list(dict.fromkeys(row.kinds for row in scores.rows))
    names = list(dict.fromkeys(row.score for row in scores.rows))
    figure, axes = _figure(len(kinds), 4.2)
    for axis, kind in zip(axes, kinds, strict=True):
        for number, name in enumerate(names):
            rows = sorted(
                (row for row in scores.rows if (row.kinds, row.score) == (kind, name)),
                key=lambda row: row.sparsity_target,
            )
            if rows:
                style = "--" if rows[0].oracle else "-"
                at, values = [row.sparsity_target for row in rows], [row.kl for row in rows]
                axis.plot(at, values, style, color=f"C{number}", marker="o", markersize=3, label=score_title(name))
        axis.set(title=kind, xlabel="sparsity", yscale="log")
    axes[0].set_ylabel("KL from dense (nats per token)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure

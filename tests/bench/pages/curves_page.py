"""The page and pictures of results/curves.json: `python tests/bench/pages/curves_page.py` writes them anew.

What it says about one method against another is computed from the stored rows, at equal cost or equal density, never
written by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev

from sparsegate.converter.report.curves import Curves, Point, at_cost, curves_page, summarise, summary_cells
from sparsegate.converter.report.plots import plot_correlations, plot_curves
from sparsegate.converter.report.tables import ABSENT, Cells, percent, table
from sparsegate.runtime_onnx.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1]))
from pages.paragraphs import page_text
from records.folders import RESULTS, repeatable

PAGE, PLOT, MATRIX = RESULTS / "curves.md", "curves.png", "curves_correlations.png"
OURS, CHEAP, ORACLE = "predictor end to end", "predictor cross-entropy", "magnitude"
RIVALS = (CHEAP, "gate", "chess", "cett", "teal MLP", "wina MLP")
HALF = 0.5


def loss(curves: Curves, point: Point, value: str = "nll") -> float:
    """What a row loses: nats per token above the dense model, or KL from it."""
    return getattr(point, value) - getattr(curves.dense, value)


def rows_of(curves: Curves, method: str, target: float | None = None) -> list[Point]:
    """A method's rows, of every seed."""
    return [row for row in curves.rows if row.method == method and target in (None, row.density_target)]


def other_at(
    curves: Curves, method: str, where: float, seed: int | None, over: str, value: str = "nll"
) -> float | None:
    """What another method loses at the same cost (or density), of the same seed where it has seeds; None where it was
    not measured around it.
    """
    seeds = {row.seed for row in rows_of(curves, method)}
    if not seeds or (seed not in seeds and None not in seeds):
        return None
    try:
        return at_cost(curves, method, where, value, seed if seed in seeds else None, over) - getattr(
            curves.dense, value
        )
    except InputError:
        return None


def pairs(
    curves: Curves, ours: str, other: str, target: float, over: str, value: str = "nll"
) -> list[tuple[float, float]]:
    """(Loss of ours, loss of the other at the same place), one pair a seed of ours at a target density."""
    found = [
        (loss(curves, row, value), other_at(curves, other, getattr(row, over), row.seed, over, value))
        for row in rows_of(curves, ours, target)
    ]
    return [(own, at) for own, at in found if at is not None]


def spread(values: list[float], digits: int = 4) -> str:
    """Mean, and sample standard deviation where there are several."""
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def equal_cost_cells(curves: Curves, ours: str = OURS, rivals: tuple[str, ...] = RIVALS) -> Cells:
    """Losses of ours at every target, and of its rivals at the same cost."""
    rivals = tuple(name for name in rivals if rows_of(curves, name))
    body = []
    for target in [point.density_target for point in summarise(curves, ours)]:
        rows = rows_of(curves, ours, target)
        cells = [percent(target), percent(fmean(row.cost for row in rows)), spread([loss(curves, row) for row in rows])]
        for name in rivals:
            at = [value for _, value in pairs(curves, ours, name, target, "cost")]
            cells.append((spread(at) if name == CHEAP else f"{fmean(at):.4f}") if at else ABSENT)
        body.append(cells)
    return ["target", "cost", ours, *rivals], body


def wins(
    curves: Curves, ours: str, other: str, over: str = "cost", value: str = "nll"
) -> tuple[list[float], list[float]]:
    """Targets where ours loses less than the other at the same place with every seed, and targets that can
    be compared.
    """
    compared = {
        point.density_target: pairs(curves, ours, other, point.density_target, over, value)
        for point in summarise(curves, ours)
    }
    compared = {target: found for target, found in compared.items() if found}
    return [target for target, found in compared.items() if all(own < at for own, at in found)], list(compared)


def verdict(curves: Curves, ours: str, other: str, over: str = "cost", value: str = "nll") -> str:
    """One sentence: where ours loses less than the other, seed by seed."""
    better, compared = wins(curves, ours, other, over, value)
    place = ("density" if over == "density" else "cost") + (", in KL" if value == "kl" else "")
    if not compared:
        return f"{other} was not measured at the {place} of {ours}."
    if set(better) == set(compared):
        where = (
            "at every target"
            if len(compared) == len(summarise(curves, ours))
            else f"at {_list(compared)}, where they can be compared,"
        )
        return f"Against {other} at equal {place}: **loses less** {where} with every seed."
    if not better:
        return f"Against {other} at equal {place}: at **none** of {_list(compared)} it loses less with every seed."
    return (
        f"Against {other} at equal {place}: loses less at {_list(better)} with every seed, **not** at "
        f"{_list([t for t in compared if t not in better])}."
    )


def verdicts(curves: Curves, ours: str, rivals: Iterable[str]) -> str:
    """A list of verdicts at equal cost, in NLL and in KL."""
    return "\n".join(f"- {verdict(curves, ours, name, value=value)}" for name in rivals for value in ("nll", "kl"))


def beyond(curves: Curves, ours: str, other: str) -> list[float]:
    """Targets at which the two have no common cost, yet ours both costs and loses less than the other's row of the same
    target, with every seed of both.
    """
    compared = wins(curves, ours, other)[1]
    found = []
    for target in (point.density_target for point in summarise(curves, ours) if point.density_target not in compared):
        own, rows = rows_of(curves, ours, target), rows_of(curves, other, target)
        if rows and all(
            max(getattr(row, name) for row in own) < min(getattr(row, name) for row in rows)
            for name in ("cost", "nll", "kl")
        ):
            found.append(target)
    return found


def _list(targets: list[float]) -> str:
    return ", ".join(f"{target:g}" for target in targets)


def oracle_cells(curves: Curves, ours: str = OURS) -> Cells:
    """Ours beside the oracle magnitude top-k of the same realised density, seed by seed: loss and KL."""
    body = []
    for row in sorted(rows_of(curves, ours), key=lambda row: (-row.density_target, row.seed or 0)):
        at = [other_at(curves, ORACLE, row.density, row.seed, "density", value) for value in ("nll", "kl")]
        if None not in at:
            cells = [percent(row.density_target), str(row.seed), f"{100 * row.density:.2f} %", percent(row.cost)]
            body.append([*cells, f"{loss(curves, row):.4f}", f"{at[0]:.4f}", f"{row.kl:.4f}", f"{at[1]:.4f}"])
    return ["target", "seed", "realised density", "cost", "loss", "the oracle's", "KL", "the oracle's KL"], body


def half_cells(curves: Curves) -> Cells:
    """Every deployable method at half density: its loss over what gate thresholds lose at the same cost of the blocks,
    the least first.
    """
    found = []
    for name in curves.methods(oracle=False):
        rows = rows_of(curves, name, HALF)
        at = pairs(curves, name, "gate", HALF, "block_cost")
        if rows:
            ratios = [own / gate for own, gate in at]
            costs = [percent(fmean(row.cost for row in rows)), percent(fmean(row.block_cost or 0 for row in rows))]
            cells = [name, *costs, spread([loss(curves, row) for row in rows])]
            cells += [f"{fmean(gate for _, gate in at):.4f}", spread(ratios, 3)] if at else [ABSENT, ABSENT]
            found.append((fmean(ratios) if ratios else float("inf"), cells))
    return ["method", "cost", "block cost", "loss", "gate at that block cost", "ratio"], [
        cells for _, cells in sorted(found, key=lambda item: item[0])
    ]


def comparisons(curves: Curves) -> str:
    """The section on methods at equal cost and equal density."""
    parts = [
        "## Compared at equal cost",
        "Losses are nats per token above the dense model. The other method's loss is linear between its measured "
        "points, which is a little too high where its "
        "curve is convex; methods with seeds are compared seed by seed. A dash: not measured around that cost, or "
        "impossible there, as thresholds on the "
        "gate never cost less than a third of the network.",
    ]
    if rows_of(curves, OURS):
        rivals = [name for name in RIVALS if rows_of(curves, name)]
        parts += [f"### {OURS}", table(equal_cost_cells(curves)), verdicts(curves, OURS, rivals)]
        if further := beyond(curves, OURS, CHEAP):
            parts[-1] += (
                f"\n- At {_list(further)}, where no cost is common to both, it costs less than {CHEAP} and loses less, "
                "with every seed."
            )
        if rows_of(curves, CHEAP):
            parts[-1] += f"\n- {verdict(curves, OURS, CHEAP, 'density')}"
    if rows_of(curves, "gate end to end"):
        rivals = tuple(
            name for name in ("gate", "chess", "cett", "teal MLP", "wina MLP", OURS) if rows_of(curves, name)
        )
        parts += ["### gate end to end", table(equal_cost_cells(curves, "gate end to end", rivals))]
        parts += [verdicts(curves, "gate end to end", rivals)]
    for ours in (f"{OURS} + ridge", "gate end to end + ridge"):
        plain = ours.removesuffix(" + ridge")
        rivals = tuple(
            name for name in dict.fromkeys((plain, "gate", "chess", "teal MLP", OURS)) if rows_of(curves, name)
        )
        if rows_of(curves, ours) and rivals:
            parts += [f"### {ours}", table(equal_cost_cells(curves, ours, rivals)), verdicts(curves, ours, rivals)]
    for ours in (OURS, "gate end to end", "gate end to end + ridge"):
        if rows_of(curves, ours) and rows_of(curves, ORACLE):
            parts += [
                f"### {ours} against the oracle {ORACLE} top-k of the same realised density",
                table(oracle_cells(curves, ours)),
            ]
            parts += ["\n".join(f"- {verdict(curves, ours, ORACLE, 'density', value)}" for value in ("nll", "kl"))]
    parts += [
        "### Half of the units kept",
        "Every deployable method at target 50 %, beside gate thresholds of the same cost over all linear maps of the "
        "blocks.",
        table(half_cells(curves)),
    ]
    return page_text(parts)


def prompt_section(prompt: Curves) -> str:
    """Selections that a prompt fixes, on the positions after it."""
    parts = [
        "## Chosen once by the prompt",
        f"The first 128 positions of a window run dense; measured are the {prompt.tokens} after them, so these numbers "
        "stand beside one another only. GRIFFIN "
        "keeps the neurons that took part most in the prompt, for the whole rest: an analysis, which `convert` does "
        "not offer. Dense NLL there: "
        f"{prompt.dense.nll:.4f}.",
        table(summary_cells(prompt, "kl")),
        "KL to dense in nats per token. The oracle, per token:",
        table(summary_cells(prompt, "kl", oracle=True)),
    ]
    return page_text(parts)


def page(curves: Curves, prompt: Curves | None) -> str:
    """The whole page."""
    text = curves_page(curves.model_copy(update={"command": repeatable(curves.command)}), PLOT)
    head, rows, rest = text.partition("## All rows")
    text = head + comparisons(curves) + ("\n" + prompt_section(prompt) if prompt else "") + "\n" + rows + rest
    if curves.correlations:
        text = text.replace(
            "## How it was measured", f"![Rank correlations of scores]({MATRIX})\n\n## How it was measured"
        )
    return text


def load() -> tuple[Curves, Curves | None]:
    """The stored results."""
    prompt = RESULTS / "curves_prompt.json"
    return Curves.load(RESULTS / "curves.json"), Curves.load(prompt) if prompt.is_file() else None


def write_page() -> None:
    """Page and pictures from the stored results."""
    curves, prompt = load()
    PAGE.write_text(page(curves, prompt), encoding="utf-8")
    plot_curves(RESULTS / PLOT, curves)
    if curves.correlations:
        plot_correlations(RESULTS / MATRIX, curves.correlations)


if __name__ == "__main__":
    write_page()

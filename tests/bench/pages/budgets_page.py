"""Write docs/budgets.md and its plot: what a real model loses at shares of its bytes.

python tests/bench/pages/budgets_page.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sparsegate.converter.evaluation.records import read_stored
from sparsegate.converter.report.tables import ABSENT, megabytes, nats, percent, table

sys.path.insert(0, str(Path(__file__).parents[1]))
from pages import paragraphs
from records.budgets_results import PLACE, Budgets, Row
from records.folders import DOCS
from records.model_results import Loss, TextFile

PAGE, PLOT = DOCS / "budgets.md", DOCS / "budgets.png"
_MARKERS = "osD^vP*Xpdh<>"
_LINEAR = 0.005  # nats: losses below it are drawn on a linear scale
WHAT = {"networks": "feed-forward networks", "blocks": "all linear maps of the blocks"}


def load() -> Budgets:
    """The stored benchmark."""
    return read_stored(
        Budgets, PLACE, "The benchmark of budgets", "Run python tests/bench/benchmarks/budgets.py again."
    )


# Tables


def rise_cell(loss: Loss) -> str:
    """NLL over dense with its standard error, as `+0.0531 ± 0.0012`."""
    return f"{loss.rise:+.4f} ± {loss.nll_error:.4f}"


def best_table(result: Budgets, of: str = "networks") -> str:
    """The best row without training and the best trained one at every share, on every text."""
    header = ["bytes"]
    for kind in ("without training", "trained"):
        header += [kind, *(f"{kind}: {judge}" for judge in result.judges)]
    body = []
    for share in result.shares:
        cells = [f"{share:g}"]
        for trained in (False, True):
            row = result.best(share, of, trained)
            losses = [ABSENT] * len(result.judges) if row is None else [rise_cell(row.losses[j]) for j in result.judges]
            cells += [ABSENT if row is None else row.name, *losses]
        if set(cells[1:]) != {ABSENT}:
            body.append(cells)
    return table((header, body))


def loss_table(rows: Sequence[Row], judge: str) -> str:
    """What rows lose on a text."""
    names = ["row", "bytes", "density", "NLL over dense", "perplexity", "KL to dense", "agreement"]
    body = []
    for row in rows:
        loss = row.losses[judge]
        cells = [row.name, f"{row.share:g}", f"{row.density_target:g}", rise_cell(loss)]
        cells += [f"{100 * loss.change.value:+.1f} %", nats(loss.kl), percent(loss.agreement), percent(loss.density)]
        body.append([*cells, percent(loss.cost), ABSENT if loss.block_cost is None else percent(loss.block_cost)])
    return table(([*names, "realised", "cost", "block cost"], body))


def ablation_table(result: Budgets) -> str:
    """Every ablation beside the row that it varies, on every text."""
    body = []
    for row in result.rows:
        if row.varies is None:
            continue
        whole = next((other for other in result.rows if (other.name, other.share) == (row.varies, row.share)), None)
        cells = [row.name, f"{row.share:g}"]
        for judge in result.judges:
            cells += [rise_cell(row.losses[judge]), ABSENT if whole is None else rise_cell(whole.losses[judge])]
        body.append(cells)
    header = ["row", "bytes", *(name for judge in result.judges for name in (judge, f"{judge}: nothing left out"))]
    return table((header, body)) if body else ""


def cost_table(result: Budgets) -> str:
    """What every row took."""
    header = ["row", "bytes", "calibration s", "the rest s", "steps", "s a step", "tokens trained", "peak memory"]
    body = []
    for row in result.rows:
        made = row.making
        times = [f"{made.calibration_seconds:.0f}", f"{made.seconds:.0f}"]
        step = ABSENT if made.step_seconds is None else f"{made.step_seconds:.2f}"
        steps = [str(made.steps), step, str(made.tokens)] if made.steps else [ABSENT] * 3
        body.append([row.name, f"{row.share:g}", *times, *steps, megabytes(made.peak_bytes)])
    return table((header, body))


# Sentences


def _text(text: TextFile) -> str:
    return paragraphs.text_name(text, tokens=True)


def head_line(result: Budgets) -> str:
    """Texts, machine, versions, commit and date."""
    judges = "; ".join(f"{name}: {_text(text)}" for name, text in result.judges.items())
    details = [", ".join(result.features), paragraphs.versions_text(result.versions, ["torch"])]
    return (
        f"Calibrated on {_text(result.calibration)}. Trained on {', '.join(map(_text, result.training))}. Measured on "
        f"{judges}. Windows of {result.length} tokens, drawn by seed {result.seed}. "
        f"{paragraphs.machine_line(result, details, result.threads)}."
    )


def training_lines(result: Budgets) -> str:
    """How the trained rows were trained."""
    lines = []
    for name in dict.fromkeys(row.name for row in result.rows if row.trained):
        rows = [row for row in result.rows if row.name == name]
        how = "one training through all shares" if rows[0].making.descended else "a training of its own at every share"
        settings = ", ".join(f"{key} {value}" for key, value in (rows[0].making.tune or {}).items())
        lines.append(f"- {name}: {how}; {settings}.")
    return "\n".join(lines)


def _section(result: Budgets, of: str, title: str) -> list[str]:
    rows = [row for row in result.rows if row.of == of and row.varies is None]
    if not rows:
        return []
    first = next(iter(result.judges))
    said = (
        f"Bytes are the share of the {WHAT[of]} that a token reads, predictors included. At every share stand the row "
        f"without training and the trained one that lose least on {first}. Numbers are nats per token over the dense "
        "model, with the standard error of the paired difference over windows."
    )
    return [f"## {title}", said, best_table(result, of)]


def page(result: Budgets) -> str:
    """The whole page."""
    parts = [
        f"# {result.model} at shares of its bytes",
        paragraphs.written_line("budgets_page.py", PLACE),
        f"{paragraphs.weights_line(result.parameters, result.origin)} All losses are measured in torch in fp32.",
        head_line(result),
        *_section(result, "networks", "The best at every share"),
        f"![Losses against bytes]({PLOT.name})",
        *_section(result, "blocks", "Whole blocks"),
    ]
    if ablations := ablation_table(result):
        parts += ["## What each part of the training gains", ablations]
    parts.append("## All rows")
    parts.append(
        "Density is the one that a row was made for, realised the measured one. Cost is the share of the networks' "
        "bytes that a token reads, block cost that of all linear maps of the blocks."
    )
    for judge in result.judges:
        parts += [f"### {judge}", loss_table(result.rows, judge)]
    parts += [
        "## What a row costs",
        "Statistics are shared by the rows of methods that need the same ones. Seconds of a training that went through "
        "all shares are shared out alike: a share has those of the shares above too. Peak memory is that of the "
        "process that made the row, earlier rows included.",
        cost_table(result),
        training_lines(result),
        *paragraphs.missing_part(result.missing),
        *paragraphs.repeat_part(result),
    ]
    return paragraphs.page_text(parts)


# The plot


def plot(result: Budgets, path: Path) -> None:
    """NLL over dense against the bytes of the networks that are read, one line a row and a panel a text."""
    figure = Figure(figsize=(5.5 * len(result.judges), 5), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(row.name for row in result.rows if row.of == "networks" and row.varies is None))
    for number, judge in enumerate(result.judges):
        panel = figure.add_subplot(1, len(result.judges), number + 1)
        for at, name in enumerate(names):
            losses = [row.losses[judge] for row in result.rows if row.name == name]
            trained = any(row.trained for row in result.rows if row.name == name)
            panel.errorbar(
                [loss.cost for loss in losses],
                [loss.rise for loss in losses],
                [loss.nll_error for loss in losses],
                label=name,
                marker=_MARKERS[at % len(_MARKERS)],
                linestyle="-" if trained else "--",
                capsize=2,
            )
        panel.set_yscale("symlog", linthresh=_LINEAR)
        panel.set_title(judge)
        panel.set_xlabel("bytes of the networks that a token reads, relative to dense")
        panel.set_ylabel("NLL over dense, nats per token")
        panel.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def write_page() -> None:
    """Page and plot of the stored result."""
    result = load()
    PAGE.write_text(page(result), encoding="utf-8")
    plot(result, PLOT)


if __name__ == "__main__":
    write_page()

"""Write docs/budgets*.md and their plots: what models lose at shares of their bytes.

python tests/bench/pages/budgets_page.py
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sparsegate.converter.evaluation.records import read_stored
from sparsegate.converter.report.tables import ABSENT, megabytes, nats, percent, table

sys.path.insert(0, str(Path(__file__).parents[1]))
from pages import paragraphs
from records.budgets_results import PLACE, Budgets, Row, Shipped
from records.folders import DOCS, RESULTS
from records.model_results import Loss, TextFile

_MARKERS = "osD^vP*Xpdh<>"
_LINEAR = 0.005  # nats: losses below it are drawn on a linear scale
WHAT = {"networks": "feed-forward networks", "blocks": "all linear maps of the blocks"}


def places() -> list[Path]:
    """The stored benchmarks: of the model that budgets were made for, and others beside it."""
    return sorted(RESULTS.glob(f"{PLACE.stem}*.json"))


def is_stored(place: Path) -> bool:
    """Whether a page is made from a file."""
    return place.parent == RESULTS and place.match(f"{PLACE.stem}*.json")


def load(place: Path = PLACE) -> Budgets:
    """A stored benchmark."""
    return read_stored(
        Budgets, place, "The benchmark of budgets", "Run python tests/bench/benchmarks/budgets.py again."
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
    """What rows lose on a text, below the dense model."""
    names = ["row", "bytes", "density", "NLL over dense", "perplexity", "KL to dense", "agreement"]
    everything, own = percent(1.0), rows[0].losses[judge].nll_dense
    dense = ["dense", "1", ABSENT, f"0 ({own:.4f})", f"0 ({math.exp(own):.2f})", nats(0), everything]
    body = [[*dense, everything, everything, everything]]
    for row in rows:
        loss = row.losses[judge]
        cells = [row.name, f"{row.share:g}", f"{row.density_target:g}", rise_cell(loss)]
        cells += [f"{100 * loss.change.value:+.1f} %", nats(loss.kl), percent(loss.agreement), percent(loss.density)]
        body.append([*cells, percent(loss.cost), ABSENT if loss.block_cost is None else percent(loss.block_cost)])
    return table(([*names, "realised", "cost", "block cost"], body))


LEVERS = (
    ("bytes shared out greedily", "teal greedy", "teal"),
    ("bytes shared out greedily, gates", "chess greedy", "chess"),
    ("residual stream rotated", "teal rotated", "teal"),
    ("scores that see the weights", "wina", "teal"),
    ("the same, rotated", "wina rotated", "teal rotated"),
    ("CHESS in place of gate", "chess", "gate"),
    ("input channels in place of neurons", "teal", "chess"),
    ("training of thresholds and weights", "trained_input rotated", "teal rotated"),
    ("training, thresholds alone", "trained_input thresholds alone", "teal rotated"),
    ("training, weights alone", "trained_input weights alone", "teal rotated"),
    ("rotation below a training", "trained_input rotated", "trained_input"),
    ("offsets in a training", "trained_input rotated", "trained_input without offsets"),
    ("whole weights of the networks", "trained_input rotated", "trained_input low rank"),
    ("training of gates", "trained_gate", "chess"),
    ("training of gates, thresholds alone", "trained_gate thresholds alone", "chess"),
    ("offsets in a training of gates", "trained_gate", "trained_gate without offsets"),
    ("predictors begun from an SVD", "predictor from svd", "predictor"),
)
"""What a lever is called, the row with it and the row without it."""


def gain_cell(loss: Loss, without: Loss) -> str:
    """The change of KL, and that of the bytes of the networks in points, as `-0.0474, +0.6`."""
    return f"{loss.kl - without.kl:+.4f}, {100 * (loss.cost - without.cost):+.1f}"


def lever_table(result: Budgets) -> str:
    """What every lever gains at every share where both of its rows are measured, on every text. Trained rows are
    compared where they had equally many steps.
    """
    rows = {(row.name, row.share): row for row in result.rows}
    body = []
    for lever, name, without in LEVERS:
        for share in result.shares:
            pair = [rows.get((each, share)) for each in (name, without)]
            if pair[0] is None or pair[1] is None or 0 < pair[1].making.steps != pair[0].making.steps:
                continue
            pairs = [(pair[0].losses[judge], pair[1].losses[judge]) for judge in result.judges]
            body.append([lever, f"{share:g}", name, without, *(gain_cell(*pair) for pair in pairs)])
    return table((["lever", "bytes", "with it", "without", *result.judges], body)) if body else ""


def file_table(result: Budgets) -> str:
    """What rows lose as files in their own precision, beside the dense graph in the same one."""
    header = [
        "row",
        "bytes",
        "precision",
        "NLL over dense fp32",
        "KL",
        "agreement",
        "dense in it: NLL",
        "dense in it: KL",
    ]
    body = []
    for file in result.shipped:
        cells = [file.name, f"{file.share:g}", file.precision, f"{file.rise:+.4f} ± {file.rise_error:.4f}"]
        cells += [nats(file.kl), percent(file.agreement)]
        dense = file.dense
        cells += (
            [nats(0), nats(0)] if dense is None else [f"{dense.rise:+.4f} ± {dense.rise_error:.4f}", nats(dense.kl)]
        )
        speeds = [ABSENT if ratio is None else f"{ratio:.2f}" for ratio in (file.decode_ratio, file.prefill_ratio)]
        body.append([*cells, *speeds, f"{file.pairs}" if file.quiet else f"{file.pairs}, disturbed", _passed(file)])
    header += ["decode", "prefill", "pairs", "checks"]
    return table((header, body)) if body else ""


def _passed(file: Shipped) -> str:
    return f"{sum(check.passed for check in file.checks)} of {len(file.checks)} passed"


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


def page(result: Budgets, place: Path = PLACE) -> str:
    """The whole page of a result."""
    parts = [
        f"# {result.model} at shares of its bytes",
        paragraphs.written_line("budgets_page.py", place),
        f"{paragraphs.weights_line(result.parameters, result.origin)} All losses are measured in torch in fp32.",
        head_line(result),
        *_section(result, "networks", "The best at every share"),
        f"![Losses against bytes]({place.stem}.png)",
        *_section(result, "blocks", "Whole blocks"),
    ]
    if files := file_table(result):
        parts += [
            "## As files",
            "The ONNX file of a row in a precision, on the first text, beside the dense graph in the same precision. "
            "Checks compare torch, the graph's body and the kernel token by token. Speeds are ratios to the dense "
            "graph, medians of pairs back to back.",
            files,
        ]
    if levers := lever_table(result):
        parts += [
            "## What each lever gains",
            "The difference of KL to the dense model between the row with a lever and the one without it, nats per "
            "token: below 0 it pays. Beside it the difference of the bytes of the networks, in points: thresholds "
            "keep more or less on another text than on the one they were set on. Trained rows are compared where they "
            "had equally many steps.",
            levers,
        ]
    parts.append("## All rows")
    parts.append(
        "Density is the one that a row was made for, realised the measured one. Cost is the share of the networks' "
        "bytes that a token reads, block cost that of all linear maps of the blocks. In brackets stand the dense "
        "model's own NLL and perplexity."
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


def write_page(place: Path = PLACE) -> None:
    """Page and plot of a stored result."""
    result = load(place)
    (DOCS / f"{place.stem}.md").write_text(page(result, place), encoding="utf-8")
    plot(result, DOCS / f"{place.stem}.png")


if __name__ == "__main__":
    for stored_result in places():
        write_page(stored_result)

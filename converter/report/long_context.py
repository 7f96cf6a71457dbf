"""Tables and the picture of what is lost over long windows."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from ..evaluation.long_record import LongContext
from .tables import ABSENT, Cells, Number, nats, percent


def position_cells(long: LongContext) -> Cells:
    """One row per bin of the tokens before a token, the shortest first."""
    body = []
    for row in long.positions:
        change = [nats(row.nll - row.nll_dense, small=True), _error(row.nll_error)]
        divergence = [nats(row.kl, small=True), _error(row.kl_error)]
        cells = [f"{row.first} to {row.last}", _count(row.tokens), nats(row.nll_dense)]
        body.append([*cells, *change, *divergence, percent(row.agreement)])
    return ["tokens before", "tokens", "dense NLL", "change", "± of it", "KL", "± of KL", "agreement"], body


def repetition_cells(long: LongContext) -> Cells:
    """One row per kind and distance of repetitions."""
    body = []
    for row in long.repetitions:
        losses = [nats(row.nll_dense), nats(row.nll), nats(row.kl, small=True)]
        shares = [percent(row.accuracy_dense), percent(row.accuracy)]
        body.append([row.kind, _count(row.distance), _count(row.tokens), *losses, *shares])
    return ["repeated", "distance", "tokens", "dense NLL", "NLL", "KL", "dense copies", "copies"], body


def needle_cells(long: LongContext) -> Cells:
    """One row per depth of needles."""
    body = [
        [
            percent(row.depth),
            _count(row.prompts),
            Number(f"{row.log_probability_dense:.2f}", row.log_probability_dense),
            Number(f"{row.log_probability:.2f}", row.log_probability),
            percent(row.exact_dense),
            percent(row.exact),
        ]
        for row in long.needles
    ]
    return ["depth", "prompts", "dense log-probability", "log-probability", "dense recalls", "recalls"], body


def long_tables(long: LongContext) -> tuple[tuple[str, Cells], ...]:
    """Title and cells of everything that was measured."""
    tables = [("By position", position_cells(long))]
    tables += [("The second copy of what was read", repetition_cells(long))] if long.repetitions else []
    tables += [("A key asked for at the window's end", needle_cells(long))] if long.needles else []
    return tuple(tables)


def long_sentence(long: LongContext) -> str:
    """What was measured."""
    said = (
        f"{long.windows} windows of {long.length} tokens of the held-out text, in torch: NLL and KL to dense in nats "
        "per token by the tokens before one in its window, ± the standard error over windows."
    )
    if long.repetitions:
        said += " Copies is the share of tokens of a second copy that are the most likely ones."
    if long.needles:
        said += " A log-probability is that of the whole key, in nats; recalls are keys that greedy decoding gives."
    return said


def draw_positions(long: LongContext) -> Figure:
    """The change of NLL and the KL over the tokens before a token, with bars of one standard error."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    panel = figure.subplots()
    places = [(row.first * row.last) ** 0.5 for row in long.positions]
    for name, values, errors, marker in (
        ("KL to dense", [row.kl for row in long.positions], [row.kl_error for row in long.positions], "o"),
        (
            "change of NLL",
            [row.nll - row.nll_dense for row in long.positions],
            [row.nll_error for row in long.positions],
            "s",
        ),
    ):
        panel.errorbar(places, values, yerr=[error or 0.0 for error in errors], marker=marker, capsize=3, label=name)
    panel.axhline(0.0, color="0.4", linewidth=1, linestyle=":")
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.set_xlabel("tokens before a token in its window")
    panel.set_ylabel("nats per token")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return figure


def _count(count: int) -> str:
    return Number(str(count), count)


def _error(error: float | None) -> str:
    return ABSENT if error is None else nats(error, small=True)

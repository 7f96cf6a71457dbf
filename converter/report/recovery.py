"""Tables of what a recovery training cost and gave."""

from __future__ import annotations

import math

from ..evaluation.recovery_record import RecoveryRecord, SwappedQuality
from .tables import ABSENT, Cells, Number, nats, percent, table, without_absent


def before_after_table(record: RecoveryRecord) -> str:
    """`before_after_cells` as Markdown."""
    return table(before_after_cells(record))


def zeros_table(record: RecoveryRecord) -> str:
    """`zeros_cells` as Markdown."""
    return table(zeros_cells(record))


def spent_table(record: RecoveryRecord) -> str:
    """`spent_cells` as Markdown."""
    return table(spent_cells(record))


def before_after_cells(record: RecoveryRecord) -> Cells:
    """The dense model, the one whose activation was swapped, and the recovered one on the evaluation text. The change
    is that of NLL, relative to dense.
    """
    header = [
        "model",
        "NLL",
        "change",
        "perplexity",
        "KL to dense",
        "agreement",
        "density",
        "gate open",
        "predicted",
        "cost",
    ]
    dense = SwappedQuality(nll=record.dense.nll, kl=0, agreement=1, density=1, opened=1, cost=1)
    body = []
    rows = [("dense", dense), (f"{record.activation}, before recovery", record.swapped)]
    rows += [] if record.exact is None else [(f"{record.activation}, recovered, exact zeros", record.exact)]
    rows.append((f"{record.activation}, recovered{'' if record.exact is None else ', predictors'}", record.recovered))
    for name, row in rows:
        change = row.nll / record.dense.nll - 1
        body.append(
            [
                name,
                nats(row.nll),
                ABSENT if row is dense else Number(f"{100 * change:+.1f} %", change),
                perplexity(row.nll),
                nats(row.kl, small=True),
                percent(row.agreement),
                percent(row.density),
                percent(row.opened),
                percent(row.predicted),
                percent(row.cost),
            ]
        )
    return without_absent(header, body)


def zeros_cells(record: RecoveryRecord) -> Cells:
    """By site, before and after: the share of units whose product is exactly zero, and after it that of closed gates
    and of units that the predictor skips.
    """
    header = ["site", "zeros before", "zeros recovered", "closed gates", "predicted closed"]
    body = [
        [after.site, _rest(before.density), _rest(after.density), _rest(after.opened), _rest(after.predicted)]
        for before, after in zip(record.swapped.sites, record.recovered.sites, strict=True)
    ]
    return without_absent(header, body)


def spent_cells(record: RecoveryRecord) -> Cells:
    """What the recovery took: text, tokens, minutes and the machine."""
    text, machine = record.text, record.machine
    rate = record.tokens_trained / record.seconds if record.seconds else None
    body = [
        ["text", text.name],
        ["tokens of it", _count(text.tokens, f" in {text.windows} windows")],
        ["minutes to make it", _minutes(text.seconds)],
        ["tokens trained on", _count(record.tokens_trained)],
        ["minutes of training", _minutes(record.seconds)],
        ["CPU minutes of training", _minutes(record.cpu_seconds)],
        ["tokens per second", ABSENT if rate is None else Number(f"{rate:.0f}", rate)],
        ["machine", f"{machine.cpu}, {machine.cores} cores, {machine.os}{f', {machine.gpu}' if machine.gpu else ''}"],
    ]
    return ["recovery", "spent"], body


def heldout_cells(record: RecoveryRecord) -> Cells:
    """The model while it was trained, on the evaluation text or a part of it."""
    header = ["step", "tokens", "NLL", "dense", "KL to dense", "agreement", "density", "predicted"]
    body = [
        [
            _count(row.step),
            _count(row.tokens),
            nats(row.nll),
            ABSENT if row.nll_dense is None else nats(row.nll_dense),
            ABSENT if row.kl is None else nats(row.kl, small=True),
            percent(row.agreement),
            percent(row.density),
            percent(row.predicted),
        ]
        for row in record.heldout
    ]
    return without_absent(header, body)


def perplexity(nll: float) -> str:
    """exp(nll); one of an untrained model may be beyond floats."""
    value = math.exp(min(nll, 700.0))
    return Number(f"{value:.4g}", value)


def _rest(share: float | None) -> str:
    return percent(None if share is None else 1 - share)


def _minutes(seconds: float) -> Number:
    return Number(f"{seconds / 60:.1f}", seconds / 60)


def _count(value: int, text: str = "") -> Number:
    return Number(f"{value:,}{text}", value)

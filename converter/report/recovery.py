"""What a recovery training cost and gave, as the one stored JSON, and its tables."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from .results import Machine, Strict, Text, read_stored
from .tables import ABSENT, Cells, Number, nats, percent, table, without_absent

RECOVERY = "report/recovery.json"
"""The record's place in a checkpoint folder."""


class TrainingText(Strict):
    """What was trained on: `windows` windows of `tokens` tokens in all, whether the dense model `sampled` them itself, and the `seconds` that it took to make
    them.
    """

    name: str
    windows: int = Field(ge=1)
    tokens: int = Field(ge=1)
    sampled: bool
    seconds: float = Field(ge=0)
    hash: str | None = None


class CurvePoint(Strict):
    """Training after `step` steps and `tokens` tokens: the `loss` minimised and its unweighted parts `kl`, `lm` (nats per token), `hidden` and `penalty`, the
    mean share of non-zeros `density` and of units that predictors open, `predicted`; None where a part is not minimised or not measured.
    """

    step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    seconds: float = Field(ge=0)
    loss: float | None = None
    kl: float | None = None
    lm: float | None = None
    hidden: float | None = None
    penalty: float | None = None
    density: float | None = Field(default=None, ge=0, le=1)
    predicted: float | None = Field(default=None, ge=0, le=1)


class HeldoutPoint(Strict):
    """The model after `step` steps and `tokens` tokens on the evaluation text or the same part of it: `nll`, `kl` from the dense model (nats per token), share
    of equal argmax tokens; `nll_dense` is the dense model's on these very tokens.
    """

    step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    nll: float
    nll_dense: float | None = None
    kl: float | None = None
    agreement: float | None = Field(default=None, ge=0, le=1)
    density: float | None = Field(default=None, ge=0, le=1)
    predicted: float | None = Field(default=None, ge=0, le=1)


class DenseQuality(Strict):
    """The source model on `tokens` evaluation tokens."""

    nll: float
    tokens: int = Field(ge=1)


class SiteDensity(Strict):
    """One site on the evaluation text: the share of units whose product is not exactly 0, of those whose gate is not (`opened`), and of those that a predictor
    opens.
    """

    site: str
    density: float = Field(ge=0, le=1)
    opened: float = Field(ge=0, le=1)
    predicted: float | None = Field(default=None, ge=0, le=1)


class SwappedQuality(Strict):
    """A model with the new activation on the evaluation text: `nll` and `kl` from the dense model in nats per token, share of equal argmax tokens; means over
    sites of what SiteDensity says; `cost` the bytes that the networks touch per token relative to dense ones, predictors included.
    """

    nll: float
    kl: float
    agreement: float = Field(ge=0, le=1)
    density: float = Field(ge=0, le=1)
    opened: float = Field(ge=0, le=1)
    predicted: float | None = Field(default=None, ge=0, le=1)
    cost: float = Field(ge=0)
    sites: list[SiteDensity] = []


class RecoveryRecord(Strict):
    """One recovery: `swapped` is the model before it, `recovered` after it, with predictors where they
    were trained, and then `exact` without them, all on the tokens of `evaluation`; `settings` are the recipe's
    (`recipe.Recovery`).

    `seconds` is the wall time of training without the making of text, `cpu_seconds` the processor time of all processes over it; `tokens_trained` counts a
    token once per pass.
    """

    version: Literal[1] = 1
    activation: str
    text: TrainingText
    settings: dict[str, Any]
    tokens_trained: int = Field(ge=0)
    seconds: float = Field(ge=0)
    cpu_seconds: float = Field(ge=0)
    machine: Machine
    versions: dict[str, str]
    curve: list[CurvePoint] = []
    heldout: list[HeldoutPoint] = []
    dense: DenseQuality
    swapped: SwappedQuality
    recovered: SwappedQuality
    exact: SwappedQuality | None = None
    evaluation: Text

    @model_validator(mode="after")
    def _check(self) -> RecoveryRecord:
        for name, points in (("curve", self.curve), ("heldout", self.heldout)):
            if any(after.step <= before.step or after.tokens < before.tokens for before, after in pairwise(points)):
                raise ValueError(f"{name} must go forward in steps and tokens")
        if [site.site for site in self.swapped.sites] != [site.site for site in self.recovered.sites]:
            raise ValueError("swapped and recovered must name the same sites in the same order")
        return self

    @classmethod
    def load(cls, path: Path) -> RecoveryRecord:
        """Read a record. Raises InputError when the file is missing or has another form."""
        return read_stored(cls, path, "The record of the recovery", "Convert again.")

    @property
    def rise(self) -> float:
        """The recovered model's NLL above the dense one's, relative to it."""
        return self.recovered.nll / self.dense.nll - 1


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
    """The dense model, the one whose activation was swapped, and the recovered one on the evaluation text. The change is that of NLL, relative to dense."""
    header = ["model", "NLL", "change", "perplexity", "KL to dense", "agreement", "density", "gate open", "predicted", "cost"]
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
    """By site, before and after: the share of units whose product is exactly zero, and after it that of closed gates and of units that the predictor skips."""
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

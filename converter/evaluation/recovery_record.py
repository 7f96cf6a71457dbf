"""The record of a recovery: texts, curves, quality before and after."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ..checkpoint.fields import Strict
from .records import Machine, Record, Text, read_stored

RECOVERY = "report/recovery.json"
"""The record's place in a checkpoint folder."""


class TrainingText(Strict):
    """What was trained on: `windows` windows of `tokens` tokens in all, whether the dense model `sampled` them itself,
    and the `seconds` that it took to make them.
    """

    name: str
    windows: int = Field(ge=1)
    tokens: int = Field(ge=1)
    sampled: bool
    seconds: float = Field(ge=0)
    hash: str | None = None


class CurvePoint(Strict):
    """Training after `step` steps and `tokens` tokens: the `loss` minimised and its unweighted parts `kl`, `lm` (nats
    per token), `hidden` and `penalty`, the mean share of non-zeros `density` and of units that predictors open,
    `predicted`; None where a part is not minimised or not measured.
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
    """The model after `step` steps and `tokens` tokens on the evaluation text or the same part of it: `nll`, `kl` from
    the dense model (nats per token), share of equal argmax tokens; `nll_dense` is the dense model's on these very
    tokens.
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
    """One site on the evaluation text: the share of units whose product is not exactly 0, of those whose gate is not
    (`opened`), and of those that a predictor opens.
    """

    site: str
    density: float = Field(ge=0, le=1)
    opened: float = Field(ge=0, le=1)
    predicted: float | None = Field(default=None, ge=0, le=1)


class SwappedQuality(Strict):
    """A model with the new activation on the evaluation text: `nll` and `kl` from the dense model in nats per token,
    share of equal argmax tokens; means over sites of what SiteDensity says; `cost` the bytes that the networks touch
    per token relative to dense ones, predictors included.
    """

    nll: float
    kl: float
    agreement: float = Field(ge=0, le=1)
    density: float = Field(ge=0, le=1)
    opened: float = Field(ge=0, le=1)
    predicted: float | None = Field(default=None, ge=0, le=1)
    cost: float = Field(ge=0)
    sites: list[SiteDensity] = []


class RecoveryRecord(Record):
    """One recovery: `swapped` is the model before it, `recovered` after it, with predictors where they
    were trained, and then `exact` without them, all on the tokens of `evaluation`; `settings` are the recipe's
    (`settings.Recovery`).

    `seconds` is the wall time of training without the making of text, `cpu_seconds` the processor time of all processes
    over it; `tokens_trained` counts a token once per pass.
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

"""What the benchmark of a real model stores: every method's quality, and every runtime's loss and speed, as one JSON
file.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, Field

from records.folders import RESULTS
from sparsegate.converter.checkpoint.fields import Strict
from sparsegate.converter.evaluation.records import Machine, Record
from sparsegate.converter.methods import NEURON_METHODS

PLACE = RESULTS / "real_model.json"
PRECISIONS = ("fp32", "int8", "int4")
BASELINE = "dense fp32"
"""The role that losses are measured against."""
CHOSEN_AT = 0.5
"""Density at which the plan that is exported is chosen."""


class TextFile(Strict):
    """A text by name and hash, for it is not stored: windows and tokens taken from it, sha256 of those."""

    file: str
    sha256: str
    windows: int
    tokens: int
    batches: str


class Training(BaseModel):
    """How a trained plan came about: steps from the start on, through the densities above where it went through them;
    CPU seconds of a step, timed before on the plan that it begins with, without a residual; the minutes of one core
    that they make together; tokens of a step.
    """

    steps: int
    step_seconds: float
    minutes: float
    tokens: int


class Row(Strict):
    """A method at a density, in torch in fp32: held-out NLL and KL in nats per token, `nll_error` the standard error of
    NLL - NLL dense over windows; shares of what is computed and of the bytes touched, of the networks (cost) and of all
    linear maps of the blocks. `training` where it is trained.
    """

    method: str
    density_target: float
    tokens: int
    windows: int
    nll_dense: float
    nll: float
    nll_error: float
    kl: float
    agreement: float
    density: float
    cost: float
    block_cost: float | None
    training: Training | None = None

    @property
    def change(self) -> float:
        """Relative rise in perplexity."""
        return math.expm1(self.nll - self.nll_dense)

    @property
    def change_error(self) -> float:
        """Its standard error, to first order."""
        return math.exp(self.nll - self.nll_dense) * self.nll_error


class Shipped(Strict):
    """A model in a runtime: NLL on the same windows for all, and what it differs by from the dense model in fp32, with
    the standard error over windows.
    """

    tokens: int
    windows: int
    nll: float
    difference: float
    error: float

    @property
    def change(self) -> float:
        """Relative rise in perplexity against the dense model in fp32."""
        return math.expm1(self.difference)

    @property
    def change_error(self) -> float:
        """Its standard error, to first order."""
        return math.exp(self.difference) * self.error


class Chosen(Strict):
    """The plan that was exported: the method of the lowest NLL at the density, among those that skip neurons, or the
    one that was named.
    """

    method: str
    density: float
    named: bool = False


class RealModel(Record):
    """One benchmark. `origin` says where the weights come from, `corpus` what the texts are of; `missing` names what
    was left out; `speed` is a record of `bench_models`.
    """

    model: str
    origin: str
    corpus: str | None = None
    fingerprint: str
    parameters: int
    length: int
    calibration: TextFile
    training: TextFile
    heldout: TextFile
    machine: Machine
    versions: dict[str, str]
    commit: str | None = None
    date: str
    command: str
    rows: list[Row]
    missing: list[str] = []
    chosen: Chosen | None = None
    losses: dict[str, Shipped] = Field(default_factory=dict)
    speed: dict[str, Any] | None = None


def choose(rows: list[Row], density: float = CHOSEN_AT, named: str | None = None) -> Chosen | None:
    """The neuron method of the lowest NLL at a density, or the `named` one; None where none was measured there."""
    if named is not None:
        measured = any(row.method == named and row.density_target == density for row in rows)
        return Chosen(method=named, density=density, named=True) if measured else None
    able = [row for row in rows if row.density_target == density and row.method in NEURON_METHODS]
    return Chosen(method=min(able, key=lambda row: row.nll).method, density=density) if able else None

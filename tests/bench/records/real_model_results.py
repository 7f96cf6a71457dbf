"""What the benchmark of a real model stores: every method's quality, and every runtime's loss and speed, as one JSON
file.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from records.folders import RESULTS
from records.model_results import Loss, ModelResult, TextFile
from sparsegate.converter.checkpoint.fields import Strict
from sparsegate.converter.methods import NEURON_METHODS
from sparsegate.converter.report.change import Change, perplexity_change

PLACE = RESULTS / "real_model.json"
PRECISIONS = ("fp32", "int8", "int4")
BASELINE = "dense fp32"
"""The role that losses are measured against."""
CHOSEN_AT = 0.5
"""Density at which the plan that is exported is chosen."""


class Training(BaseModel):
    """How a trained plan came about: steps from the start on, through the densities above where it went through them;
    CPU seconds of a step, timed before on the plan that it begins with, without a residual; the minutes of one core
    that they make together; tokens of a step.
    """

    steps: int
    step_seconds: float
    minutes: float
    tokens: int


class Row(Loss):
    """What a method at a density loses on the held-out text. `training` where it is trained."""

    method: str
    density_target: float
    training: Training | None = None


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
    def change(self) -> Change:
        """Relative change of perplexity against the dense model in fp32, with its standard error."""
        return perplexity_change(self.difference, 0.0, self.error)


class Chosen(Strict):
    """The plan that was exported: the method of the lowest NLL at the density, among those that skip neurons, or the
    one that was named.
    """

    method: str
    density: float
    named: bool = False


class RealModel(ModelResult):
    """One benchmark. `corpus` says what the texts are of; `speed` is a record of `bench_models`."""

    corpus: str | None = None
    parameters: int
    training: TextFile
    heldout: TextFile
    rows: list[Row]
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

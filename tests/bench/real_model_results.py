"""What the benchmark of a real model stores: every method's quality, and every runtime's loss and speed, as one JSON
file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from real_model_plans import Training
from real_model_speed import BASELINE, Loss

from sparsegate.converter.evaluation.quality import clustered_error
from sparsegate.converter.evaluation.records import Machine, Strict
from sparsegate.converter.methods import NEURON_METHODS

PLACE = Path(__file__).parent / "results" / "real_model.json"
CHOSEN_AT = 0.5
"""Density at which the plan that is exported is chosen."""


class TextFile(Strict):
    """A text by name and hash, for it is not stored: windows and tokens taken from it, sha256 of those."""

    file: str
    sha256: str
    windows: int
    tokens: int
    batches: str


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


class RealModel(Strict):
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


def shipped(losses: dict[str, Loss]) -> dict[str, Shipped]:
    """Every model's loss beside the dense one's in fp32, window by window."""
    base = torch.tensor(losses[BASELINE].nll, dtype=torch.float64)
    found = {}
    for role, loss in losses.items():
        counts, nll = torch.tensor(loss.tokens, dtype=torch.float64), torch.tensor(loss.nll, dtype=torch.float64)
        total = float(counts.sum())
        error = 0.0 if role == BASELINE else clustered_error(nll - base, counts)
        found[role] = Shipped(
            tokens=int(total),
            windows=len(counts),
            nll=float(nll.sum()) / total,
            difference=float((nll - base).sum()) / total,
            error=error if math.isfinite(error) else 0.0,
        )
    return found

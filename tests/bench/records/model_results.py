"""What records of several benchmarks share: where they were made, on which model and texts, and losses of a plan."""

from __future__ import annotations

from sparsegate.converter.checkpoint.fields import Strict
from sparsegate.converter.evaluation.records import Machine, Record
from sparsegate.converter.report.change import Change, perplexity_change


class TextFile(Strict):
    """A text by name and hash, for it is not stored: its sha256, windows and tokens taken from it, sha256 of those."""

    file: str
    sha256: str
    windows: int
    tokens: int
    batches: str


class Loss(Strict):
    """What a plan loses on a text, in torch in fp32: NLL and KL in nats per token, `nll_error` the standard error of
    NLL - NLL dense over windows; shares of what is computed and of the bytes touched, of the networks (cost) and of all
    linear maps of the blocks.
    """

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

    @property
    def rise(self) -> float:
        """NLL over the dense model's, nats per token."""
        return self.nll - self.nll_dense

    @property
    def change(self) -> Change:
        """Relative change of perplexity with its standard error."""
        return perplexity_change(self.nll, self.nll_dense, self.nll_error)


class Measured(Record):
    """One benchmark, with what stands beside every number."""

    machine: Machine
    versions: dict[str, str]
    commit: str | None = None
    date: str


class ModelResult(Measured):
    """A benchmark of a real model: `origin` says where the weights come from, `length` is that of windows in tokens,
    `command` has no folders, `missing` names what was left out.
    """

    model: str
    origin: str
    fingerprint: str
    length: int
    calibration: TextFile
    command: str
    missing: list[str] = []

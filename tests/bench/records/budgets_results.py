"""What the benchmark of budgets stores: what every row loses on every text at every share of the bytes, and what making
it took, as one JSON file.
"""

from __future__ import annotations

from typing import Any, Literal

from records.folders import RESULTS
from records.model_results import Loss, ModelResult, TextFile
from sparsegate.converter.checkpoint.fields import Strict
from sparsegate.converter.evaluation.checks import Check

PLACE = RESULTS / "budgets.json"


class Making(Strict):
    """What a row took.

    Attributes:
        calibration_seconds: Of the statistics, which rows of one kind share.
        seconds: Of everything after them, the training above all; over all runs until it was done.
        steps: Of the training from its start on, through the shares above where it went through them; 0 without one.
        step_seconds: Of one step, timed before on windows that are new to it.
        tokens: Trained on, with every repetition.
        tune: The training's settings.
        descended: Whether one training went through all shares.
        peak_bytes: Most memory that the process held that made the row, rows that it made before included.
        commit: Of the code that made it.
    """

    calibration_seconds: float
    seconds: float
    steps: int = 0
    step_seconds: float | None = None
    tokens: int = 0
    tune: dict[str, Any] | None = None
    descended: bool = False
    peak_bytes: int
    commit: str | None = None


class Row(Strict):
    """A row at a share of the bytes of the networks, or of all linear maps of the blocks: its name, the method, the
    density that it was made for, and losses by the names of the texts. `varies` names the row that it is an ablation
    of.
    """

    name: str
    method: str
    share: float
    of: Literal["networks", "blocks"]
    varies: str | None = None
    trained: bool
    density_target: float
    losses: dict[str, Loss]
    making: Making


class DenseFile(Strict):
    """What the dense model's graph in the same precision loses against the model in fp32, nats per token."""

    tokens: int
    rise: float
    rise_error: float
    kl: float


class Shipped(Strict):
    """A row's ONNX file in a precision, on the first text against the dense model in fp32: rise of NLL with its
    standard error over windows, KL, equal argmax; `dense` is None in floats, where the graph is the model. Speeds are
    ratios to the dense graph in the same precision, back to back; None where the machine was too busy.
    """

    name: str
    share: float
    precision: str
    tokens: int
    rise: float
    rise_error: float
    kl: float
    agreement: float
    dense: DenseFile | None
    checks: list[Check]
    decode_ratio: float | None
    prefill_ratio: float | None
    pairs: int
    quiet: bool


class Budgets(ModelResult):
    """One benchmark. `judges` are the texts that are measured on, by name; `features` what of the processor torch can
    use; `shipped` are files of rows.
    """

    parameters: int
    seed: int
    shares: list[float]
    training: list[TextFile]
    judges: dict[str, TextFile]
    features: list[str]
    threads: int
    rows: list[Row]
    shipped: list[Shipped] = []

    def at(self, share: float, of: str = "networks", trained: bool | None = None) -> list[Row]:
        """The rows at a share that are no ablations, trained or not; None: both."""
        return [
            row
            for row in self.rows
            if (row.share, row.of, row.varies) == (share, of, None) and trained in (None, row.trained)
        ]

    def best(self, share: float, of: str = "networks", trained: bool = False) -> Row | None:
        """The row at a share that loses least on the first text; None where there is none."""
        first = next(iter(self.judges))
        return min(self.at(share, of, trained), key=lambda row: row.losses[first].nll, default=None)

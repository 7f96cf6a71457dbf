"""What a person wants of a conversion, what that means for the opened model, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.source import Source
from ..evaluation.records import Report
from ..evaluation.recovery_record import RecoveryRecord
from .configs import Configs
from .estimate import Estimate
from .recipe import Recipe
from .time_budget import Decision


@dataclass(frozen=True)
class Order:
    """What a person wants of a conversion; `inputs` are the files and folders of the user's that it reads, and what
    they are.
    """

    recipe: Recipe
    out: Path
    device: str
    push_to: str | None
    public: bool
    dry_run: bool
    keep_stages: bool
    command: str
    inputs: list[tuple[str, Path]]


@dataclass(frozen=True)
class Result:
    """What `convert` returns: the folder, whether it was there already, its report, the URL it was pushed to, and the
    ONNX model's precision.
    """

    folder: Path
    up_to_date: bool
    report: Report | None
    estimate: Estimate | None = None
    url: str | None = None
    precision: str = "fp32"


@dataclass(frozen=True)
class Opened:
    """A model that can be converted, the record of the training that its weights come from (None: of none), what its
    conversion is and needs (`recipe` has the steps that fit into its time by the `decision`), and the tensors in its
    files that it does not compute with.
    """

    source: Source
    record: RecoveryRecord | None
    recipe: Recipe
    configs: Configs
    needed: Estimate
    fingerprint: str
    unused: list[str]
    decision: Decision

"""What a training reads: its models, its windows, and where it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arch import Arch
from ..checkpoint.stage import Header
from ..text.windows import Batches

AT_ONCE = 8
"""Windows that pass through a model together where no gradient is taken."""


@dataclass(frozen=True)
class Models:
    """The transformers model that is trained, `student`, and the dense one that it is to be like, `teacher`; None where
    no loss needs one or the student with everything kept teaches. Both have the architecture `arch`, and `activation`
    is the base model's by the op's name, which a network without a swap computes with.
    """

    student: Any
    teacher: Any | None
    arch: Arch
    activation: str

    @property
    def dense(self) -> Any:
        """The model that teaches."""
        return self.student if self.teacher is None else self.teacher


@dataclass(frozen=True)
class TrainingRun:
    """The windows that a run trains on, the seed that decides their order, and the folder below which its state and
    results are stored under `header`, so that an interrupted run goes on.
    """

    batches: Batches
    seed: int
    folder: Path
    header: Header

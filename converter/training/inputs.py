"""What trainings read: models, windows, and where a run is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arch import Arch
from ..arch.site import Site
from ..checkpoint.source import Source
from ..checkpoint.stage import Header
from ..text.windows import Batches
from .settings import Recovery

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
    results are stored under `header`, so that an interrupted run goes on. `density_batches` are the windows whose text
    densities are to hold on; None for that of all that is trained on.
    """

    batches: Batches
    seed: int
    folder: Path
    header: Header
    density_batches: Batches | None = None


@dataclass(frozen=True)
class Heldout:
    """Held-out windows and what they are called."""

    batches: Batches
    name: str


@dataclass(frozen=True)
class RecoveryTask:
    """What a training stage is to do: swap the activation of every feed-forward network of `source` for `activation`
    (None: as it is) and recover the weights on a `device`, towards the dense model of `teacher_source`, which also
    writes the text. `work` holds text, states and result; `heldout` is what the result is measured on.
    """

    source: Source
    teacher_source: Source
    activation: str | None
    recovery: Recovery
    seed: int
    work: Path
    device: str
    heldout: Heldout

    @property
    def arch(self) -> Arch:
        """The architecture of both models."""
        return self.source.arch

    @property
    def base_activation(self) -> str:
        """The activation of a network that was never swapped, by the op's name."""
        return self.arch.activation(self.source.config)

    def wished(self) -> dict[Site, str]:
        """The activation that every network is to have, by site."""
        sites = self.arch.sites(self.source.config)
        return {site: self.activation or present(self.source, site) for site in sites}


def present(source: Source, site: Site) -> str:
    """The activation of a site as it is."""
    base = source.arch.activation(source.config)
    return source.swaps[site].activation(base) if site in source.swaps else base

"""A conversion in progress: what its steps read, and the models that several of them hold."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.plan import Plan
from ..checkpoint.source import Source
from ..modeling.gated import load_dense
from ..onnx_export.base_graph import load_stock
from .recipe import Recipe
from .texts import Texts


class Loaded:
    """Dense models in memory: each is read once until `release`, whoever asks for it."""

    def __init__(self) -> None:
        self._held: dict[Path, Any] = {}

    def dense(self, source: Source, device: str = "cpu") -> Any:
        """The model of a folder, moved to `device`. Training selectors freezes its weights, nothing changes them."""
        if source.folder not in self._held:
            self._held[source.folder] = load_dense(source.folder)
        return self._held[source.folder].to(device)

    def stock(self, source: Source) -> Any:
        """The model that the builder exports (`load_stock`): `dense` where no activation was swapped."""
        return load_stock(source.folder) if source.swaps else self.dense(source)

    def release(self) -> None:
        """Let go of all models."""
        self._held.clear()


@dataclass(frozen=True)
class Conversion:
    """What every step of a conversion reads.

    Attributes:
        source: The model that plans are made for: the one that was named, or what training stages and a rotation made
            of it.
        texts: Token windows.
        recipe: What was asked for.
        work: The folder of the stages.
        device: Where torch calibrates and trains.
        recovered_from: The dense model that training stages or a rotation made `source` of; None where there were none.
        models: What several steps hold in memory.
    """

    source: Source
    texts: Texts
    recipe: Recipe
    work: Path
    device: str = "cpu"
    recovered_from: Source | None = None
    models: Loaded = field(default_factory=Loaded, repr=False, compare=False)

    @property
    def reference(self) -> Source:
        """The dense model that losses and speeds are compared with: ungated `source` where nothing was trained."""
        return self.recovered_from or self.source

    def model(self, device: str = "cpu") -> Any:
        """`source` in torch."""
        return self.models.dense(self.source, device)

    def reference_model(self, device: str = "cpu") -> Any | None:
        """`reference` in torch; None where it is `source` itself, ungated."""
        return None if self.recovered_from is None else self.models.dense(self.recovered_from, device)

    def with_source(self, source: Source) -> Conversion:
        """The conversion of another model with other weights, to be compared with the same reference."""
        return self if source is self.source else replace(self, source=source, recovered_from=self.reference)


class Made(NamedTuple):
    """What a method made: a plan, and the model that it is for: the conversion's, a `rotated` one, or one whose weights
    were trained with it (`updated`).
    """

    plan: Plan
    source: Source
    updated: bool = False
    rotated: bool = False

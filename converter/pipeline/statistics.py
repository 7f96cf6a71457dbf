"""The statistics that plans are made from, collected when the first of them is made."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor

from ..methods import IMPORTED, needs
from ..progress import stage
from ..scores import load_score
from ..sources.predictors import NEEDS as IMPORTED_NEEDS
from ..stats import Stats, load_stat
from ..stats.collect import collect, drop_samples
from ..stats.oracle import collect_labels
from .conversion import Conversion

FOLDER = "stats"
"""Where the statistics of a conversion's model lie in the work folder."""


class Statistics:
    """The statistics of a conversion's model; of another one than the model that was named they lie in a `folder` of
    their own, and are a stage of its own `label`.
    """

    def __init__(self, conversion: Conversion, folder: str = FOLDER, label: str = "calibrate") -> None:
        self.conversion, self.folder, self.label = conversion, folder, label
        self._names: set[str] = set()
        self._stats: Stats = {}

    def of(self, configs: Iterable[Mapping[str, Any]]) -> Stats:
        """The statistics of methods, by their parts' configurations: those of scores that need gradients from the whole
        model, the others block by block.
        """
        names = {
            stat
            for parts in configs
            for part, config in parts.items()
            for stat in (IMPORTED_NEEDS if part == IMPORTED else needs(part, config))
        }
        if not self._stats or not names <= self._names:
            with stage(self.label):
                self._stats, self._names = self._collected(names), names
        return self._stats

    def drop_samples(self) -> None:
        """Delete stored activations."""
        for folder in (self.folder, self._labels):
            drop_samples(self.conversion.work / folder)

    @property
    def _labels(self) -> str:
        return f"{self.folder}_labels"

    def _collected(self, names: set[str]) -> Stats:
        oracle = {name for name in names if "grad" in load_score(load_stat(name)[1]).NEEDS}
        source, calibration, device = (
            self.conversion.source,
            self.conversion.texts.calibration,
            self.conversion.device,
        )
        work, seed = self.conversion.work, self.conversion.recipe.seed
        streamed = collect(source, calibration, sorted(names - oracle), work / self.folder, seed, device)
        if not oracle:
            return streamed
        model = self.conversion.model(device)
        labelled = collect_labels(model, source, calibration, sorted(oracle), work / self._labels, seed)
        every = {**streamed, **labelled}  # sites; their tensors stay on disk until they are asked for
        return {
            site: ChainMap(*(cast("dict[str, Tensor]", part[site]) for part in (labelled, streamed) if site in part))
            for site in every
        }

"""What the benchmark of depths stores: seconds of a conversion's stages by the number of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from records.folders import RESULTS
from records.model_results import Measured
from sparsegate.converter.evaluation.records import read_stored

PLACE = RESULTS / "depth.json"


class Depths(Measured):
    """Seconds by number of layers and stage, of models of one shape with random weights."""

    version: Literal[1] = 1
    shape: str
    windows: int
    steps: int
    seconds: dict[str, dict[str, float]]

    @classmethod
    def load(cls, path: Path) -> Depths:
        """Read a result. Raises InputError when the file is missing or has another form."""
        return read_stored(cls, path, "The result", "Measure again.")

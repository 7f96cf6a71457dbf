"""The model that comes with sparsegate, and its texts."""

from __future__ import annotations

from pathlib import Path

BUNDLED = Path(__file__).parent
CALIBRATION_TEXT = BUNDLED / "calibration.txt"
HELDOUT_TEXT = BUNDLED / "heldout.txt"
BUNDLED_MODEL = "bundled"
"""How a recipe names the small model that comes with sparsegate."""
BUNDLED_NAME = "sparsegate-small"

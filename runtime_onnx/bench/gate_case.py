"""GatedMLP with score gate at op level: the gate is computed in full, a threshold for every neuron keeps a share of all
tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .op_cases import MlpCase


class GateCase(MlpCase):
    """Without a predictor: a neuron is kept where its activated gate is large."""

    decides = "gate"

    def _weights(self) -> dict[str, NDArray[np.float32]]:
        return {role: matrix for role, matrix in super()._weights().items() if role[0] == "w"}

    def operations(self, density: float) -> float:
        """As in `Case`: the gate of every neuron, up and down of those that are kept."""
        return 2.0 * self.d * self.n * (1 + 2 * density)

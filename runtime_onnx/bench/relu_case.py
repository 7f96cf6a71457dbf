"""GatedMLP with a ReLU activation at op level: how many gates open and how many products are not zero is forced by the
inputs.

Every gate and up row has the same part along one direction, and every input a part of a size of choice: their product
moves all gates and ups together, and the rest of both is normal. So the share of open gates is the normal
distribution's, other neurons open for every token, and no bias is needed. Both signs of dReLU open independently: of a
density, its square root.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..ops import gated_mlp
from ..ops.activation import cuts_up
from ..ops.quantisation import dequantise
from .op_cases import MlpCase, union
from .op_graphs import OpFormat

RIGHT = 0.5
"""Of the neurons that the predictor keeps, the share that is not zero."""

SCORES = ("exact", "predictor")
"""What each density is timed with."""


def used_share(score: str, density: float) -> float:
    """The share of all neurons that is not zero, by score, where `density` of them may be kept."""
    return density if score == "exact" else RIGHT


def open_share(activation: str, share: float) -> float:
    """Of gates that are open, where this share of products is not zero: both signs of dReLU open independently."""
    return share**0.5 if cuts_up(activation) else share


class ReluCase(MlpCase):
    """A density is the share of neurons that are not zero: all of those kept by score exact, RIGHT of those kept by the
    predictor.
    """

    def __init__(self, form: OpFormat, d: int, n: int, r: int, folder: Path, activation: str) -> None:
        self.activation = activation
        self._direction = np.full(d, d**-0.5, np.float32)
        super().__init__(form, d, n, r, folder)
        self._predicting = self.variant
        self._rest = self.pool - np.outer(self.pool @ self._direction, self._direction)
        self._open = self._used = np.empty((0, 0), bool)

    def _weights(self) -> dict[str, NDArray[np.float32]]:
        weights = super()._weights()
        for role, part in {"w_gate": -1.0, "w_up": -1.0, "p1": 0.0}.items():
            weights[role] += np.outer(np.float32(part) - weights[role] @ self._direction, self._direction)
        return weights

    def aim(self, score: str, density: float) -> None:
        """As in `Case`: inputs that open as many gates as the density needs."""
        share = used_share(score, density)
        kind, parameter = gated_mlp.split_activation(self.activation)
        opened = open_share(self.activation, share)
        self.pool = (self._rest - np.float32(NormalDist().inv_cdf(opened) + parameter) * self._direction).astype(
            np.float32
        )
        self.variant = self.exact if score == "exact" else self._predicting
        self._score = None
        gate, up = (self.pool @ self._float(role).T for role in ("w_gate", "w_up"))
        self._open = gate > parameter
        self._used = self._open & (up > 0) if cuts_up(kind) else self._open

    @property
    def exact(self) -> gated_mlp.Variant:
        """The variant of score exact."""
        return gated_mlp.Variant(self.activation, "exact", self.format.weights, self.everything.inputs, w=self.format.w)

    def _float(self, role: str) -> NDArray[np.float32]:
        stored = self._arrays[role]
        wide = (
            stored
            if self.format.weights == "float"
            else dequantise(stored, self._arrays[f"s{role[1:]}"], self.format.weights)
        )
        return wide.astype(np.float32)

    def thresholds(self, density: float) -> NDArray[np.float32]:
        """As in `Case`; none of score exact."""
        return np.empty(0, np.float32) if self.variant == self.exact else super().thresholds(min(1.0, density / RIGHT))

    def kept(self, tau: NDArray[np.float32]) -> NDArray[np.bool_]:
        """As in `Case`."""
        return self._used if self.variant == self.exact else super().kept(tau)

    def _rows(self, kept: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Units whose up is read, and whose down is: bool [POOL, n] each."""
        return (self._open, self._used) if self.variant == self.exact else (kept & self._open, kept & self._used)

    def shares(self, kept: NDArray[np.bool_]) -> dict[str, float]:
        """As in `Case`: `opened` and `nonzero`, of all neurons."""
        opened, nonzero = self._rows(kept)
        return {"opened": float(opened.mean()), "nonzero": float(nonzero.mean())}

    def needed(self, kept: NDArray[np.bool_], draws: Sequence[NDArray[np.int64]]) -> float:
        """As in `Case`."""
        assert isinstance(self.variant, gated_mlp.Variant)
        read = [union(rows, draws) for rows in (kept, *self._rows(kept))]
        return gated_mlp.traffic(
            self.variant, self.d, self.n, self.r if self.variant.score == "predictor" else 0, *read
        )

    def operations(self, density: float) -> float:
        """As in `Case`, from the shares of the pool."""
        exact = self.variant == self.exact
        shares = [
            1.0 if exact else density,
            *(rows.mean() * (1 if exact else density) for rows in (self._open, self._used)),
        ]
        return 2.0 * (self.d * self.n * sum(map(float, shares)) + (0 if exact else self.r * (self.d + self.n)))

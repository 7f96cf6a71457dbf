"""What is timed at the level of ops: an op beside its dense counterpart, random weights, and thresholds that force a
density.

A case holds random inputs enough that every call can select anew, and knows bytes, operations and the right answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..ops import gated_mlp, sparse_linear
from ..ops.quantisation import quantise
from .op_graphs import DenseGraph, OpFormat, Variant, sparse_model, store

SEED = 7
POOL = 1024
"""Rows that inputs are drawn from."""


class Case(ABC):
    """An op in one format at one size: d channels, n neurons or outputs, r the predictor's rank; models go
    to `folder`.
    """

    op: str
    variant: Variant
    out: int

    def __init__(self, form: OpFormat, d: int, n: int, r: int, folder: Path) -> None:
        self.format, self.d, self.n, self.r, self.folder = form, d, n, r, folder
        self.pool = np.random.default_rng(SEED + 1).standard_normal((POOL, d), dtype=np.float32)
        self._arrays = self._make()
        self._stored = store(folder, "sparse", self._arrays)
        self._score: NDArray[np.float64] | None = None

    @property
    def score(self) -> NDArray[np.float64]:
        """Scores [POOL, units] of the pool's rows, as the op computes them."""
        if self._score is None:
            self._score = self._scores()
        return self._score

    def thresholds(self, density: float) -> NDArray[np.float32]:
        """Thresholds [units] that keep this share of the pool for every unit; 0 keeps nothing."""
        ranked = np.sort(self.score, axis=0)
        cut = round((1 - density) * len(ranked))
        if cut in (0, len(ranked)):
            return np.full(ranked.shape[1], -1e30 if cut == 0 else 1e30, np.float32)
        return ((ranked[cut - 1] + ranked[cut]) / 2).astype(np.float32)

    def aim(self, score: str, density: float) -> None:  # noqa: B027 most cases have nothing to prepare
        """Prepares the case for the rows of a score and a density."""

    def kept(self, tau: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Units that the pool's rows keep, bool [POOL, units]."""
        return self.score > tau

    def shares(self, kept: NDArray[np.bool_]) -> dict[str, float]:
        """What else a row says of what is kept."""
        return {}

    def needed(self, kept: NDArray[np.bool_], draws: Sequence[NDArray[np.int64]]) -> float:
        """Bytes that a call on one of the draws from the pool must read, on average."""
        return self.bytes(union(kept, draws))

    def model(self, name: str, tau: NDArray[np.float32]) -> Path:
        """Writes the op's model with these thresholds."""
        return sparse_model(
            self.folder / f"{name}.onnx",
            self.op,
            self.variant,
            {**self._stored, "tau": ir.tensor(tau)},
            self.d,
            self.out,
        )

    def expected(self, x: NDArray[np.float32], tau: NDArray[np.float32]) -> NDArray[np.float64]:
        """What the CPU kernel must give for x [t, d]."""
        return self._reference(x, {**self._arrays, "tau": tau})

    @abstractmethod
    def _make(self) -> dict[str, NDArray]:
        """Sets `variant` and `out`; returns the stored tensors by role."""

    @abstractmethod
    def _scores(self) -> NDArray[np.float64]: ...

    @abstractmethod
    def _reference(self, x: NDArray[np.float32], tensors: dict[str, NDArray]) -> NDArray[np.float64]: ...

    @abstractmethod
    def dense(self, baseline: str, folder: Path) -> Path:
        """Writes the dense model of a baseline."""

    @abstractmethod
    def bytes(self, density: float) -> float:
        """Bytes that must be read when this share of the units is kept by any token of a call."""

    @abstractmethod
    def operations(self, density: float) -> float:
        """Multiplications and additions of one token that keeps this share."""


def union(kept: NDArray[np.bool_], draws: Sequence[NDArray[np.int64]]) -> float:
    """The mean share of units that some row of a draw keeps."""
    return float(np.mean([kept[rows].any(0).mean() for rows in draws]))


def mlp_weights(d: int, n: int, r: int) -> dict[str, NDArray[np.float32]]:
    """Random weights by role; the same for every format."""
    rng = np.random.default_rng(SEED)
    shapes = {"w_gate": (n, d), "w_up": (n, d), "w_down": (n, d), "p1": (r, d), "p2": (n, r)}
    weights = {role: rng.standard_normal(shape, dtype=np.float32) / shape[1] ** 0.5 for role, shape in shapes.items()}
    weights["p2"] -= weights["p2"].mean(
        1, keepdims=True
    )  # relu(P1 x) has a mean: without this two selections would overlap
    return weights


def cast(array: NDArray[np.float32], dtype: str) -> NDArray:
    """A float array in another float dtype, bfloat16 included."""
    if dtype == "bfloat16":
        import ml_dtypes

        return array.astype(ml_dtypes.bfloat16)
    return array.astype(dtype)


class MlpCase(Case):
    """GatedMLP with silu and a predictor, against gate, up and down products with silu between them."""

    op = gated_mlp.NAME
    activation = "silu"
    decides = "predictor"

    def _weights(self) -> dict[str, NDArray[np.float32]]:
        return mlp_weights(self.d, self.n, self.r)

    def _make(self) -> dict[str, NDArray]:
        arrays: dict[str, NDArray] = {}
        for role, matrix in self._weights().items():
            kind, dtype = (
                (self.format.weights, self.format.w)
                if role[0] == "w"
                else ("int8_row" if self.format.p == "int8" else "float", self.format.p)
            )
            if kind == "float":
                arrays[role] = cast(matrix, dtype)
            else:
                arrays[role], arrays[f"s{role[1:]}" if role[0] == "w" else f"s_{role}"] = quantise(matrix, kind)
        roles = tuple(role for role in gated_mlp.ROLES if role in arrays or role == "tau")
        p = self.format.p if "p1" in roles else "float32"
        self.variant, self.out = (
            gated_mlp.Variant(self.activation, self.decides, self.format.weights, roles, w=self.format.w, p=p),
            self.d,
        )
        return arrays

    @property
    def everything(self) -> gated_mlp.Variant:
        """The variant of score all: no predictor."""
        roles = tuple(role for role in self.variant.inputs if role[0] == "w" or role in ("s_gate", "s_up", "s_down"))
        return gated_mlp.Variant(self.activation, "all", self.format.weights, roles, w=self.format.w)

    def model_of_everything(self) -> Path:
        """Writes the model of score all."""
        return sparse_model(self.folder / "all.onnx", self.op, self.everything, self._stored, self.d, self.out)

    def expected_of_everything(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        """What the CPU kernel of score all must give for x [t, d]."""
        return gated_mlp.emulate(self.everything, x, self._arrays)

    def _scores(self) -> NDArray[np.float64]:
        placeholder = np.zeros(self.n, np.float32)
        assert isinstance(self.variant, gated_mlp.Variant)
        return gated_mlp.scores(self.variant, self.pool, {**self._arrays, "tau": placeholder}, integer=True)

    def _reference(self, x: NDArray[np.float32], tensors: dict[str, NDArray]) -> NDArray[np.float64]:
        assert isinstance(self.variant, gated_mlp.Variant)
        return gated_mlp.emulate(self.variant, x, tensors)

    def dense(self, baseline: str, folder: Path) -> Path:
        """As in `Case`."""
        weights = self._weights()
        graph = DenseGraph(baseline, self.d)
        graph.product("w_gate", "x", "gate", weights["w_gate"].T)
        graph.product("w_up", "x", "up", weights["w_up"].T)
        for op, inputs, out in (("Sigmoid", ["gate"], "s"), ("Mul", ["gate", "s"], "act"), ("Mul", ["act", "up"], "z")):
            graph.elementwise(op, inputs, out)
        graph.product("w_down", "z", "y", weights["w_down"])
        return graph.save(folder, f"dense_{baseline}")

    def bytes(self, density: float) -> float:
        """As in `Case`."""
        assert isinstance(self.variant, gated_mlp.Variant)
        return gated_mlp.traffic(self.variant, self.d, self.n, self.r, density)

    def operations(self, density: float) -> float:
        """As in `Case`."""
        return 2.0 * (3 * self.d * self.n * density + self.r * (self.d + self.n))


class LinearCase(Case):
    """SparseLinear from d channels to n outputs, against one product."""

    op = sparse_linear.NAME

    def _make(self) -> dict[str, NDArray]:
        matrix = self._weight()
        arrays = {"w": cast(matrix, self.format.w)}
        if self.format.weights != "float":
            arrays["w"], arrays["s_w"] = quantise(matrix, self.format.weights)
        roles = tuple(role for role in sparse_linear.ROLES if role in arrays or role == "tau")
        self.variant, self.out = sparse_linear.Variant(self.format.weights, roles, w=self.format.w), self.n
        return arrays

    def _weight(self) -> NDArray[np.float32]:
        return np.random.default_rng(SEED).standard_normal((self.d, self.n), dtype=np.float32) / np.float32(self.d**0.5)

    def _scores(self) -> NDArray[np.float64]:
        return np.abs(self.pool).astype(np.float64)

    def _reference(self, x: NDArray[np.float32], tensors: dict[str, NDArray]) -> NDArray[np.float64]:
        assert isinstance(self.variant, sparse_linear.Variant)
        return sparse_linear.emulate(self.variant, x, tensors)

    def dense(self, baseline: str, folder: Path) -> Path:
        """As in `Case`."""
        graph = DenseGraph(baseline, self.d)
        graph.product("w", "x", "y", self._weight())
        return graph.save(folder, f"dense_{baseline}")

    def bytes(self, density: float) -> float:
        """As in `Case`."""
        assert isinstance(self.variant, sparse_linear.Variant)
        return sparse_linear.traffic(self.variant, self.d, self.n, density)

    def operations(self, density: float) -> float:
        """As in `Case`."""
        return 2.0 * self.d * self.n * density


CASES: dict[str, Callable[..., Any]] = {"gated_mlp": MlpCase, "sparse_linear": LinearCase}
"""Stem of an op -> the case that times it."""

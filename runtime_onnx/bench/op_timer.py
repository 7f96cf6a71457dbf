"""The rows of an op's benchmark: a case made ready for one of them, timed beside its baselines and peers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import library
from ..errors import InputError
from ..ops import gated_mlp
from .op_cases import POOL, SEED, Case, MlpCase, mlp_weights, union
from .op_graphs import BASELINES, DenseGraph, Variant
from .samples import MIN_PAIRS, Pairs, bursts, calls, compare, pairs, quartiles
from .stream import MemoryStream, best

INTEGER_BOUND = 1e-7
"""NMSE above which an integer kernel is not timed: among millions of products some fall so near a tie that float32 and
the reference round apart (each changes the result by 1e-9 or less), where one neuron too few of 8192 would be 1e-4.
"""
DRAWS = 64
"""Inputs that the calls of a row take in turns."""

Runner = Callable[[NDArray[np.float32]], Any]
"""Runs a model on x [t, d]."""


@dataclass(frozen=True)
class Peer:
    """Another library's dense MLP: beside which formats it stands, and a function from float weights by role and
    threads to what runs x [t, d].
    """

    name: str
    formats: tuple[str, ...]
    open: Callable[[Mapping[str, NDArray[np.float32]], int], Runner]


class Target(NamedTuple):
    """A row to measure: tokens in one call, the share to keep, and what decides."""

    tokens: int
    density: float
    score: str


class PreparedRow:
    """A case with the thresholds and inputs of one row."""

    def __init__(self, case: Case, target: Target) -> None:
        case.aim(target.score, target.density)
        self.case, self.target = case, target
        self._whole = case if target.score == "all" and isinstance(case, MlpCase) else None

    @property
    def variant(self) -> Variant:
        """The op's variant; of score all where everything is kept."""
        return self._whole.everything if self._whole else self.case.variant

    @cached_property
    def tau(self) -> NDArray[np.float32]:
        """Thresholds [units]; empty without a score."""
        return np.empty(0, np.float32) if self._whole else self.case.thresholds(self.target.density)

    @cached_property
    def kept(self) -> NDArray[np.bool_]:
        """Units that the pool's rows keep, bool [POOL, units], or [POOL, 1] where everything is."""
        return np.ones((POOL, 1), bool) if self._whole else self.case.kept(self.tau)

    @cached_property
    def draws(self) -> list[NDArray[np.int64]]:
        """Rows of the pool [tokens] that the calls take in turns."""
        rng = np.random.default_rng(SEED + 2)
        return [rng.choice(POOL, self.target.tokens, replace=False) for _ in range(DRAWS)]

    @cached_property
    def inputs(self) -> list[NDArray[np.float32]]:
        """Inputs [tokens, d] of the calls."""
        return [self.case.pool[rows] for rows in self.draws]

    def model(self) -> Path:
        """Writes the op's model."""
        return self._whole.model_of_everything() if self._whole else self.case.model("op", self.tau)

    def nmse(self, run: Runner) -> float:
        """Error of the kernel on two rows, relative to the energy of the answer. Raises InputError when it is above the
        op's bound.
        """
        x = self.inputs[0][:2]
        expected = self._whole.expected_of_everything(x) if self._whole else self.case.expected(x, self.tau)
        energy = float((expected**2).sum())
        error = float(((run(x) - expected) ** 2).sum()) / (energy or 1.0)
        bound = gated_mlp.BOUNDS["float32"] if self.case.format.weights == "float" else INTEGER_BOUND
        if not error <= bound:
            raise InputError(
                f"The error of {self.case.format.name} must be at most {bound}, got {error:.1e}. The kernel is wrong: "
                "its speed means nothing."
            )
        return error

    def needed(self) -> float:
        """Bytes that a call must read, on average."""
        if self._whole:
            return gated_mlp.traffic(self._whole.everything, self.case.d, self.case.n, 0, 1.0)
        return self.case.needed(self.kept, self.draws)

    def operations(self) -> float:
        """Multiplications and additions of a call."""
        one = 2.0 * 3 * self.case.d * self.case.n if self._whole else self.case.operations(float(self.kept.mean()))
        return self.target.tokens * one


class OpTimer:
    """Sessions, threads and the buffer that all rows share."""

    def __init__(self, threads: int, wanted: int, patience: float, peers: Sequence[Peer]) -> None:
        self.threads, self.wanted, self.patience, self.peers = threads, wanted, patience, peers
        self.stream = MemoryStream(threads)
        self._dense: dict[str, Runner] = {}

    def open(self, path: Path, kernels: bool = False, spinning: bool = False) -> Runner:
        """What runs a model of one input x; with `spinning` its workers wait for the next call as they wait for the
        next op of a model.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        if not spinning:
            options.add_session_config_entry(
                "session.force_spinning_stop", "1"
            )  # idle workers of one session must not take the other's CPU
        if kernels:
            options.register_custom_ops_library(str(library.library_path()))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"x": x})[0]

    def gemm(self, d: int, n: int) -> float:
        """Gflop/s of a dense fp32 product of 512 rows, warm: the roof of arithmetic."""
        x, weight = (
            np.random.default_rng(SEED).standard_normal(shape, dtype=np.float32) for shape in ((512, d), (d, n))
        )
        with TemporaryDirectory() as folder:
            graph = DenseGraph("fp32", d)
            graph.product("w", "x", "y", weight)
            run = self.open(graph.save(Path(folder), "gemm"))
            seconds = calls(lambda _: run(x), 9, self.patience, lambda: None) or calls(
                lambda _: run(x), 1, self.patience, lambda: None, 0
            )
        return 2 * x.size * n / statistics.median(seconds) / 1e9 if seconds else float("nan")

    def row(self, case: Case, target: Target, folder: Path) -> dict[str, Any]:
        """One row: the op, and each baseline and peer in pairs with it."""
        prepared = PreparedRow(case, target)
        row: dict[str, Any] = {
            "format": case.format.name,
            "variant": prepared.variant.name,
            "tokens": target.tokens,
            "asked": target.density,
            "score": target.score,
        }
        if not library.supports(prepared.variant.name):
            return row | {"status": "not run: the library has no kernel for it"}
        run = self.open(prepared.model(), kernels=True, spinning=target.score == "nothing")
        error, kept = prepared.nmse(run), prepared.kept
        row |= {"status": "run", "density": float(kept.mean()), **case.shares(kept), "nmse": error}
        return row | (self._warm(prepared, run) if target.score == "nothing" else self._cold(prepared, run, folder))

    def _warm(self, prepared: PreparedRow, run: Runner) -> dict[str, Any]:
        """Calls right behind one another."""
        inputs = prepared.inputs
        seconds = bursts(lambda number: run(inputs[number % DRAWS]), 4 * self.wanted, self.patience)
        self._enough(seconds, prepared.case.format.name, "warm")
        return {
            "warm_ms": statistics.median(seconds) * 1e3,
            "quartiles_ms": [value * 1e3 for value in quartiles(seconds)],
        }

    def _cold(self, prepared: PreparedRow, run: Runner, folder: Path) -> dict[str, Any]:
        """Calls with weights from memory, beside each dense computation."""
        before = self.stream.bandwidth()
        self.stream.noted()
        op_seconds, compared = self._compared(prepared, run, folder)
        between = self.stream.noted()
        roof = max(best(before, self.stream.bandwidth()), *between.values())
        needed, operations, seconds = prepared.needed(), prepared.operations(), statistics.median(op_seconds)
        return {
            "union": union(prepared.kept, prepared.draws),
            "ms": seconds * 1e3,
            "quartiles_ms": [value * 1e3 for value in quartiles(op_seconds)],
            "bytes": needed,
            "operations": operations,
            "gb_per_s": needed / seconds / 1e9,
            "stream_gb_per_s": roof,
            "share_of_stream": needed / seconds / 1e9 / roof,
            "gflop_per_s": operations / seconds / 1e9,
            "dense": compared,
        }

    def _compared(self, prepared: PreparedRow, run: Runner, folder: Path) -> tuple[list[float], list[dict[str, Any]]]:
        """The op's seconds beside its own baseline, and the comparison with each dense computation."""
        inputs, form = prepared.inputs, prepared.case.format
        op_seconds: list[float] = []
        compared: list[dict[str, Any]] = []
        for name, dense in self._against(prepared.case, folder, prepared.target.tokens):
            timed = pairs(
                lambda i, dense=dense: dense(inputs[i % DRAWS]),
                lambda i: run(inputs[i % DRAWS]),
                self.wanted,
                self.patience,
                self.stream.evict,
            )
            self._enough(timed.candidate, form.name, name, timed)
            op_seconds = op_seconds or timed.candidate
            compared.append(
                {
                    "name": name,
                    "ms": statistics.median(timed.baseline) * 1e3,
                    **compare(timed.baseline, timed.candidate),
                    "dropped": timed.dropped,
                }
            )
        return op_seconds, compared

    def _against(self, case: Case, folder: Path, tokens: int) -> list[tuple[str, Runner]]:
        """Name and run of what a format is compared with, its own baseline first; for several tokens a call that one
        alone.
        """
        baselines = case.format.baselines if tokens == 1 else case.format.baselines[:1]
        for key in baselines:
            if key not in self._dense:
                self._dense[key] = self.open(case.dense(key, folder))
        runs = [(f"ONNX Runtime {BASELINES[key].name}", self._dense[key]) for key in baselines]
        for peer in self.peers if tokens == 1 else ():
            if case.format.name in peer.formats and isinstance(case, MlpCase):
                if peer.name not in self._dense:
                    self._dense[peer.name] = peer.open(mlp_weights(case.d, case.n, case.r), self.threads)
                runs.append((peer.name, self._dense[peer.name]))
        return runs

    def _enough(self, seconds: Sequence[float], form: str, beside: str, timed: Pairs | None = None) -> None:
        if len(seconds) < min(MIN_PAIRS, self.wanted):
            tried = f" of {len(seconds) + timed.dropped}" if timed else ""
            raise InputError(
                f"{form} beside {beside} must have {min(MIN_PAIRS, self.wanted)} clean pairs in {self.patience:.0f} s, "
                f"got {len(seconds)}{tried}. "
                "Repeat when the machine is quiet: finished rows are kept with -o."
            )

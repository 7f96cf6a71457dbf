"""Times one op against the dense computation in ONNX Runtime: weights from memory, a new selection at every call, dense
and sparse back to back.

The buffer of `stream` is read before every timed call, so weights come from memory as they do in a model of many
layers; inputs are drawn anew, so the op selects other units each time. A row needs `MIN_PAIRS` clean pairs. Bytes are
those really needed (the op's `traffic`, for several tokens the union of what they keep), and their share is of the
fastest way of reading memory before, between and after the calls of the row. What a call costs that keeps nothing is
timed with warm weights and workers awake, as they are within a model.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import library
from ..ops import gated_mlp
from .op_cases import CASES, POOL, SEED, Case, MlpCase, mlp_weights, union
from .op_graphs import BASELINES, FORMS, Dense, Form
from .record import record
from .relu_case import ReluCase
from .samples import MIN_PAIRS, Pairs, bursts, calls, compare, pairs, quartiles
from .stream import Stream, best

DENSITIES = (1.0, 0.5, 0.2, 0.1)
RELU_DENSITIES = (0.07,)
"""Of neurons that are not zero: what recovery training reaches."""
RANK = 128
"""Width of the predictor: at most a tenth of the MLP's bytes at the sizes that are measured."""
INTEGER_BOUND = 1e-7
"""NMSE above which an integer kernel is not timed: among millions of products some fall so near a tie that float32 and
the reference round apart (each changes the result by 1e-9 or less), where one neuron too few of 8192 would be 1e-4.
"""
NO_CUDA = "not run: no CUDA device"

Run = Callable[[NDArray[np.float32]], Any]


@dataclass(frozen=True)
class Peer:
    """Another library's dense MLP: beside which formats it stands, and a function from float weights by role and
    threads to what runs x [t, d].
    """

    name: str
    forms: tuple[str, ...]
    open: Callable[[Mapping[str, NDArray[np.float32]], int], Run]


def bench_op(
    op: str = "gated_mlp",
    d: int = 2048,
    n: int = 8192,
    r: int = RANK,
    formats: Sequence[str] | None = None,
    densities: Sequence[float] | None = None,
    tokens: Sequence[int] = (1,),
    threads: int | None = None,
    wanted: int = 21,
    patience: float = 30.0,
    peers: Sequence[Peer] = (),
    finished: Sequence[dict[str, Any]] = (),
    command: str | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
    accept: Callable[[dict[str, Any]], None] | None = None,
    activation: str = "silu",
    score: str | None = None,
) -> dict[str, Any]:
    """Times `op` in every format, for every number of tokens in one call and every density.

    Args:
        op: Stem of the op: "gated_mlp" (with a predictor inside) or "sparse_linear".
        d: Input channels.
        n: Neurons, or outputs of sparse_linear.
        r: Rank of the predictor.
        formats: Names in `op_graphs.FORMS`; by default all that are different for the op.
        densities: Kept shares, DENSITIES by default. 1 for one token also times the op that keeps everything and has no
        predictor. With a ReLU activation the
            shares of neurons that are not zero, RELU_DENSITIES by default: each is timed with score exact and with a
            predictor (see `relu_case`).
        tokens: Tokens per call.
        threads: Threads within an op; by default the CPUs that this process may use.
        wanted: Clean pairs a row.
        patience: Seconds a comparison in which they must come together.
        peers: Other dense MLPs to stand beside.
        finished: Rows of an earlier run, which are not measured again.
        command: What to record as the command; this process's own by default.
        keep: Called with the result after every row.
        accept: Called with the result's head before any row; refuses by raising.
        activation: Of gated_mlp: silu or one with exact zeros. The dense side computes with silu always.
        score: Leaves out rows of another score.

    Returns:
        JSON-ready: "machine", "versions", "command", "settings", "roofs" and "rows".

    Raises:
        ValueError: A name or a number is out of range, a kernel gives wrong numbers, or the machine was too busy for
        `MIN_PAIRS` clean pairs.
    """
    zeros = activation != "silu"
    densities = densities or (RELU_DENSITIES if zeros else DENSITIES)
    known = [name for name in FORMS if op == "gated_mlp" or "predictor" not in name]
    _check(op, known, formats, densities, tokens, d, n, wanted)
    _check_activation(op, activation, densities)
    threads = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    timer = _Timer(threads, wanted, patience, peers)
    settings = {
        "op": op,
        "d": d,
        "n": n,
        "r": r,
        "threads": threads,
        "pairs": wanted,
        "cold": "a buffer larger than the caches is read before every call",
    }
    settings |= {"activation": activation} if zeros else {}
    result: dict[str, Any] = {
        **record(command),
        "kind": "op",
        "settings": settings,
        "isa": library.isa(),
        "roofs": {"stream_gb_per_s": timer.stream.bandwidth(9), "gemm_gflop_per_s": timer.gemm(d, n)},
        "cuda": NO_CUDA,
        "rows": list(finished),
    }
    if accept:
        accept(result)
    done = {_key(row) for row in finished}
    with TemporaryDirectory() as temporary:
        for name in formats or known:
            wishes = [
                wish
                for wish in _wishes(op, tokens, densities, zeros)
                if (name, *wish) not in done and score in (None, wish[2])
            ]
            if not wishes:
                continue
            form = FORMS[name]
            folder = Path(temporary) / name.replace(", ", "_").replace(" ", "_")
            folder.mkdir()
            case: Case = ReluCase(form, d, n, r, folder, activation) if zeros else CASES[op](form, d, n, r, folder)
            for count, density, kind in wishes:
                result["rows"].append(timer.row(case, form, count, density, kind, Path(temporary)))
                if keep:
                    keep(result)
            for file in folder.iterdir():
                file.unlink()
    return result


def _check(
    op: str,
    known: Sequence[str],
    formats: Sequence[str] | None,
    densities: Sequence[float],
    tokens: Sequence[int],
    d: int,
    n: int,
    wanted: int,
) -> None:
    if op not in CASES:
        raise ValueError(f"op must be {' or '.join(CASES)}, got {op!r}. Choose one of them.")
    if wrong := [name for name in formats or () if name not in known]:
        raise ValueError(f"A format of {op} must be one of {'; '.join(known)}, got {wrong[0]!r}. Choose one of them.")
    if wrong := [density for density in densities if not 0 < density <= 1]:
        raise ValueError(f"A density must lie above 0 and be at most 1, got {wrong[0]}. Choose another share.")
    if wrong := [count for count in tokens if not 1 <= count <= POOL]:
        raise ValueError(f"tokens must be 1 to {POOL}, got {wrong[0]}. Choose another number.")
    if d % 32 or n % 32 or d < 32 or n < 32:
        raise ValueError(
            f"d and n must be multiples of 32, got {d} and {n}. The 4- and 8-bit formats have groups of 32."
        )
    if wanted < 1:
        raise ValueError(f"pairs must be at least 1, got {wanted}. Choose a larger number.")


def _check_activation(op: str, activation: str, densities: Sequence[float]) -> None:
    if activation == "silu":
        return
    if op != "gated_mlp" or not gated_mlp.is_relu(activation):
        raise ValueError(
            f"activation must be silu, or for gated_mlp one of {', '.join(gated_mlp.RELUS)}, got {activation} for "
            f"{op}. Choose one of them."
        )
    if wrong := [density for density in densities if density == 1]:
        raise ValueError(
            f"A density of {activation} must be below 1, got {wrong[0]}: some gates are closed. Choose another share."
        )


def _wishes(
    op: str, tokens: Sequence[int], densities: Sequence[float], zeros: bool = False
) -> list[tuple[int, float, str]]:
    """(Tokens, density, score) of the rows to measure: "nothing" is one token that keeps no unit, its weights warm;
    "all" is the op without a predictor.
    """
    if zeros:
        return [
            (count, density, score) for count in tokens for density in densities for score in ("exact", "predictor")
        ]
    own = "predictor" if op == "gated_mlp" else "input"
    rows = [(count, density, own) for count in tokens for density in densities]
    if op == "gated_mlp" and 1.0 in densities:
        rows += [(count, 1.0, "all") for count in tokens]
    return rows + [(1, 0.0, "nothing")] * (1 in tokens)


def _key(row: Mapping[str, Any]) -> tuple[str, int, float, str]:
    return row["format"], row["tokens"], row["asked"], row["score"]


class _Timer:
    """Sessions, threads and the buffer that all rows share."""

    def __init__(self, threads: int, wanted: int, patience: float, peers: Sequence[Peer]) -> None:
        self.threads, self.wanted, self.patience, self.peers = threads, wanted, patience, peers
        self.stream = Stream(threads)
        self._dense: dict[str, Run] = {}

    def open(self, path: Path, kernels: bool = False, spinning: bool = False) -> Run:
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
            graph = Dense("fp32", d)
            graph.product("w", "x", "y", weight)
            run = self.open(graph.save(Path(folder), "gemm"))
            seconds = calls(lambda _: run(x), 9, self.patience, lambda: None) or calls(
                lambda _: run(x), 1, self.patience, lambda: None, 0
            )
        return 2 * x.size * n / statistics.median(seconds) / 1e9 if seconds else float("nan")

    def row(self, case: Case, form: Form, count: int, density: float, score: str, folder: Path) -> dict[str, Any]:
        """One row: the op, and each baseline and peer in pairs with it."""
        everything = score == "all" and isinstance(case, MlpCase)
        case.aim(score, density)
        variant = case.everything if everything and isinstance(case, MlpCase) else case.variant
        row: dict[str, Any] = {
            "format": form.name,
            "variant": variant.name,
            "tokens": count,
            "asked": density,
            "score": score,
        }
        if not library.supports(variant.name):
            return row | {"status": "not run: the library has no kernel for it"}
        tau = np.empty(0, np.float32) if everything else case.thresholds(density)
        kept = np.ones((POOL, 1), bool) if everything else case.kept(tau)
        path = case.model_of_everything() if everything and isinstance(case, MlpCase) else case.model("op", tau)
        run = self.open(path, kernels=True, spinning=score == "nothing")
        rng = np.random.default_rng(SEED + 2)
        draws = [rng.choice(POOL, count, replace=False) for _ in range(64)]
        inputs = [case.pool[rows] for rows in draws]
        error = _nmse(case, run, inputs[0][:2], tau, everything)
        row |= {"status": "run", "density": float(kept.mean()), **case.shares(kept), "nmse": error}
        if score == "nothing":
            seconds = bursts(lambda number: run(inputs[number % 64]), 4 * self.wanted, self.patience)
            self._enough(seconds, form.name, "warm")
            return row | {
                "warm_ms": statistics.median(seconds) * 1e3,
                "quartiles_ms": [value * 1e3 for value in quartiles(seconds)],
            }
        before = self.stream.bandwidth()
        self.stream.noted()
        compared: list[dict[str, Any]] = []
        own: list[float] = []
        for name, dense in self._against(case, form, folder, count):
            found = pairs(
                lambda i, dense=dense: dense(inputs[i % 64]),
                lambda i: run(inputs[i % 64]),
                self.wanted,
                self.patience,
                self.stream.evict,
            )
            self._enough(found.candidate, form.name, name, found)
            own = own or found.candidate
            compared.append(
                {
                    "name": name,
                    "ms": statistics.median(found.baseline) * 1e3,
                    **compare(found.baseline, found.candidate),
                    "dropped": found.dropped,
                }
            )
        between = self.stream.noted()
        roof = max(best(before, self.stream.bandwidth()), *between.values())
        needed, seconds = case.needed(kept, draws), statistics.median(own)
        operations = count * (2.0 * 3 * case.d * case.n if everything else case.operations(float(kept.mean())))
        if everything and isinstance(case, MlpCase):
            needed = gated_mlp.traffic(case.everything, case.d, case.n, 0, 1.0)
        return row | {
            "union": union(kept, draws),
            "ms": seconds * 1e3,
            "quartiles_ms": [value * 1e3 for value in quartiles(own)],
            "bytes": needed,
            "operations": operations,
            "gb_per_s": needed / seconds / 1e9,
            "stream_gb_per_s": roof,
            "share_of_stream": needed / seconds / 1e9 / roof,
            "gflop_per_s": operations / seconds / 1e9,
            "dense": compared,
        }

    def _against(self, case: Case, form: Form, folder: Path, count: int) -> list[tuple[str, Run]]:
        """Name and run of what a format is compared with, its own baseline first; for several tokens a call that one
        alone.
        """
        baselines = form.baselines if count == 1 else form.baselines[:1]
        for key in baselines:
            if key not in self._dense:
                self._dense[key] = self.open(case.dense(key, folder))
        found = [(f"ONNX Runtime {BASELINES[key].name}", self._dense[key]) for key in baselines]
        for peer in self.peers if count == 1 else ():
            if form.name in peer.forms and isinstance(case, MlpCase):
                if peer.name not in self._dense:
                    self._dense[peer.name] = peer.open(mlp_weights(case.d, case.n, case.r), self.threads)
                found.append((peer.name, self._dense[peer.name]))
        return found

    def _enough(self, seconds: Sequence[float], form: str, what: str, found: Pairs | None = None) -> None:
        if len(seconds) < min(MIN_PAIRS, self.wanted):
            tried = f" of {len(seconds) + found.dropped}" if found else ""
            raise ValueError(
                f"{form} beside {what} must have {min(MIN_PAIRS, self.wanted)} clean pairs in {self.patience:.0f} s, "
                f"got {len(seconds)}{tried}. "
                "Repeat when the machine is quiet: finished rows are kept with -o."
            )


def _nmse(case: Case, run: Run, x: NDArray[np.float32], tau: NDArray[np.float32], everything: bool) -> float:
    """Error of the kernel on x, relative to the energy of the answer. Raises ValueError when it is above the op's
    bound.
    """
    expected = case.expected_of_everything(x) if everything and isinstance(case, MlpCase) else case.expected(x, tau)
    energy = float((expected**2).sum())
    error = float(((run(x) - expected) ** 2).sum()) / (energy or 1.0)
    bound = gated_mlp.BOUNDS["float32"] if case.form.weights == "float" else INTEGER_BOUND
    if not error <= bound:
        raise ValueError(
            f"The error of {case.form.name} must be at most {bound}, got {error:.1e}. The kernel is wrong: its speed "
            "means nothing."
        )
    return error

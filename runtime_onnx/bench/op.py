"""Times one op against the dense computation in ONNX Runtime: weights from memory, a new selection at every call, dense
and sparse back to back.

1. The buffer of `stream` is read before every timed call, so weights come from memory as they do in a model of many
   layers.
2. Inputs are drawn anew, so the op selects other units each time.
3. A row needs `MIN_PAIRS` clean pairs.
4. Bytes are those really needed: the op's `traffic`, for several tokens the union of what they keep. Their share is of
   the fastest way of reading memory before, between and after the calls of the row.
5. What a call costs that keeps nothing is timed with warm weights and workers awake, as they are within a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import library
from ..errors import InputError
from ..ops import gated_mlp
from .op_cases import CASES, POOL, Case
from .op_graphs import FORMATS
from .op_timer import OpTimer, Peer, Target
from .record import record, usable_cpus
from .relu_case import SCORES, ReluCase

DENSITIES = (1.0, 0.5, 0.2, 0.1)
RELU_DENSITIES = (0.07,)
"""Of neurons that are not zero: what recovery training reaches."""
RANK = 128
"""Width of the predictor: at most a tenth of the MLP's bytes at the sizes that are measured."""
NO_CUDA = "not run: no CUDA device"


@dataclass(frozen=True)
class OpWorkload:
    """What is timed of an op.

    Attributes:
        op: Stem of the op: "gated_mlp" (with a predictor inside) or "sparse_linear".
        d: Input channels.
        n: Neurons, or outputs of sparse_linear.
        r: Rank of the predictor.
        formats: Names in `op_graphs.FORMATS`; by default all that are different for the op.
        densities: Kept shares, DENSITIES by default. 1 for one token also times the op that keeps everything and has no
            predictor. With a ReLU activation the shares of neurons that are not zero, RELU_DENSITIES by default: each
            is timed with score exact and with a predictor (see `relu_case`).
        tokens: Tokens per call.
        activation: Of gated_mlp: silu or one with exact zeros. The dense side computes with silu always.
        score: Leaves out rows of another score.
    """

    op: str = "gated_mlp"
    d: int = 2048
    n: int = 8192
    r: int = RANK
    formats: Sequence[str] | None = None
    densities: Sequence[float] | None = None
    tokens: Sequence[int] = (1,)
    activation: str = "silu"
    score: str | None = None

    @property
    def zeros(self) -> bool:
        """Whether the activation has exact zeros."""
        return self.activation != "silu"

    @property
    def shares(self) -> Sequence[float]:
        """The densities, by default those of the activation."""
        return self.densities or (RELU_DENSITIES if self.zeros else DENSITIES)

    @property
    def known(self) -> list[str]:
        """Names of the formats that are different for the op."""
        return [name for name in FORMATS if self.op == "gated_mlp" or "predictor" not in name]

    def settings(self) -> dict[str, Any]:
        """Op and sizes, as a result records them."""
        return {"op": self.op, "d": self.d, "n": self.n, "r": self.r}

    def check(self) -> None:
        """Raises InputError for a name that is not known, a number out of range or an activation of another op."""
        if self.op not in CASES:
            raise InputError(f"op must be {' or '.join(CASES)}, got {self.op!r}. Choose one of them.")
        if wrong := [name for name in self.formats or () if name not in self.known]:
            raise InputError(
                f"A format of {self.op} must be one of {'; '.join(self.known)}, got {wrong[0]!r}. Choose one of them."
            )
        if wrong := [density for density in self.shares if not 0 < density <= 1]:
            raise InputError(f"A density must lie above 0 and be at most 1, got {wrong[0]}. Choose another share.")
        if wrong := [count for count in self.tokens if not 1 <= count <= POOL]:
            raise InputError(f"tokens must be 1 to {POOL}, got {wrong[0]}. Choose another number.")
        if self.d % 32 or self.n % 32 or self.d < 32 or self.n < 32:
            raise InputError(
                f"d and n must be multiples of 32, got {self.d} and {self.n}. The 4- and 8-bit formats have groups of "
                "32."
            )

    def check_activation(self) -> None:
        """Raises InputError for an activation that the op does not have, or a density that it cannot have."""
        if not self.zeros:
            return
        if self.op != "gated_mlp" or not gated_mlp.is_relu(self.activation):
            raise InputError(
                f"activation must be silu, or for gated_mlp one of {', '.join(gated_mlp.RELUS)}, got {self.activation} "
                f"for {self.op}. Choose one of them."
            )
        if wrong := [density for density in self.shares if density == 1]:
            raise InputError(
                f"A density of {self.activation} must be below 1, got {wrong[0]}: some gates are closed. Choose "
                "another share."
            )

    def targets(self) -> list[Target]:
        """The rows of one format: "nothing" is one token that keeps no unit, its weights warm; "all" is the op without
        a predictor.
        """
        scores = SCORES if self.zeros else ("predictor" if self.op == "gated_mlp" else "input",)
        rows = [Target(count, density, score) for count in self.tokens for density in self.shares for score in scores]
        if not self.zeros:
            if self.op == "gated_mlp" and 1.0 in self.shares:
                rows += [Target(count, 1.0, "all") for count in self.tokens]
            rows += [Target(1, 0.0, "nothing")] * (1 in self.tokens)
        return [row for row in rows if self.score in (None, row.score)]

    def case(self, name: str, folder: Path) -> Case:
        """The op in a format; its models go to `folder`."""
        if self.zeros:
            return ReluCase(FORMATS[name], self.d, self.n, self.r, folder, self.activation)
        return CASES[self.op](FORMATS[name], self.d, self.n, self.r, folder)


@dataclass(frozen=True)
class OpTiming:
    """How an op is timed: threads within it (the CPUs that this process may use by default), clean pairs a row, and
    the seconds of a comparison in which they must come together.
    """

    threads: int | None = None
    pairs: int = 21
    patience: float = 30.0


def bench_op(
    workload: OpWorkload,
    timing: OpTiming | None = None,
    peers: Sequence[Peer] = (),
    finished: Sequence[dict[str, Any]] = (),
    command: str | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
    accept: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Times an op in every format, for every number of tokens in one call and every density.

    Args:
        workload: What is timed.
        timing: How it is timed.
        peers: Other dense MLPs to stand beside.
        finished: Rows of an earlier run, which are not measured again.
        command: What to record as the command; this process's own by default.
        keep: Called with the result after every row.
        accept: Called with the result's head before any row; refuses by raising.

    Returns:
        JSON-ready: "machine", "versions", "command", "settings", "roofs" and "rows".

    Raises:
        InputError: A name or a number is out of range, a kernel gives wrong numbers, or the machine was too busy for
            `MIN_PAIRS` clean pairs.
    """
    timing = timing or OpTiming()
    workload.check()
    if timing.pairs < 1:
        raise InputError(f"pairs must be at least 1, got {timing.pairs}. Choose a larger number.")
    workload.check_activation()
    threads = timing.threads or usable_cpus()
    timer = OpTimer(threads, timing.pairs, timing.patience, peers)
    result = _head(workload, timer, command) | {"rows": list(finished)}
    if accept:
        accept(result)
    done = {_key(row) for row in finished}
    with TemporaryDirectory() as temporary:
        for name in workload.formats or workload.known:
            targets = [target for target in workload.targets() if (name, *target) not in done]
            if not targets:
                continue
            folder = Path(temporary) / name.replace(", ", "_").replace(" ", "_")
            folder.mkdir()
            case = workload.case(name, folder)
            for target in targets:
                result["rows"].append(timer.row(case, target, Path(temporary)))
                if keep:
                    keep(result)
            for file in folder.iterdir():
                file.unlink()
    return result


def _head(workload: OpWorkload, timer: OpTimer, command: str | None) -> dict[str, Any]:
    """Everything of a result but its rows."""
    settings = workload.settings() | {
        "threads": timer.threads,
        "pairs": timer.wanted,
        "cold": "a buffer larger than the caches is read before every call",
    }
    return {
        **record(command),
        "kind": "op",
        "settings": settings | ({"activation": workload.activation} if workload.zeros else {}),
        "isa": library.isa(),
        "roofs": {"stream_gb_per_s": timer.stream.bandwidth(9), "gemm_gflop_per_s": timer.gemm(workload.d, workload.n)},
        "cuda": NO_CUDA,
    }


def _key(row: Mapping[str, Any]) -> tuple[str, int, float, str]:
    return row["format"], row["tokens"], row["asked"], row["score"]

"""Whether every op of an ONNX folder computes what the checkpoint says, judged where rounding can't travel: at the op's
own input.

A threshold flips on rounding, a flip moves everything after it, and a deep model is chaotic. So a debug copy of the
graph shows what enters and leaves each op. Three things are judged, token by token:

1. Each op against the fp64 reference on the op's own input, integer kernels against the emulation of their arithmetic.
2. The torch executor against the reference on the same input, so that torch and the file mean the same op.
3. The rest of the graph: torch's logits with the graph's own op outputs put in the place of its modules' outputs.

A token with a score within NEAR of its threshold is left out of 1 and 2 at that op, and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...runtime_onnx.ops.margins import off_thresholds, settled_scores, sum_energy, tie_energy
from ..modeling.taps import tapped_outputs
from ..onnx_export.stored import StoredOp
from ..text.windows import Batches
from .checks import LOGIT_BOUND, Check
from .watched import Seen, WatchedGraph

WINDOWS, LENGTH, SINGLE = 4, 32, 4
"""Sequences, their tokens, and how many of these are fed one by one."""
INTEGER_WINDOWS = 2
"""Sequences where weights are integers: the emulation of their kernels is slow."""
SUM_BOUND = 1e-11
"""NMSE of a token in torch and in a body, whose products are a library's: on a real model the worst token of ONNX
Runtime's products has 1.2e-12.
"""
_ROUNDED_AT_ONCE = 20_000_000  # rounded values


@dataclass
class Tally:
    """What was compared at the ops of one executor: the worst token by its error over its bound, and how many tokens
    were left out.
    """

    worst: float = 0.0
    where: str = ""
    ops: int = 0
    compared: int = 0
    left_out: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, name: str, error: NDArray, bound: NDArray, clear: NDArray[np.bool_], first: bool = True) -> None:
        """Note the errors [T] of an op's tokens against their bounds [T]; those not `clear` of a threshold are left
        out. `first` counts the op.
        """
        self.ops += first
        self.left_out += int((~clear).sum())
        self.compared += int(clear.sum())
        ratios = (np.where(np.isfinite(error), error, np.inf) / bound)[clear]
        if (
            len(ratios) and not (worst := float(ratios.max())) <= self.worst
        ):  # NaN, of a bound that is none, is the worst
            self.worst, self.where = float(np.nan_to_num(worst, nan=np.inf, posinf=np.inf)), name

    def check(self, name: str) -> Check:
        """The judgement: no op may be missing or unknown, and every error must keep its bound."""
        total = self.compared + self.left_out
        value = float("inf") if self.faults or not self.compared else self.worst
        note = f"{self.ops} ops, {total} tokens, {self.left_out / max(1, total):.1%} left out near a threshold"
        note += f"; worst at {self.where}" if self.where else ""
        note = "; ".join([*self.faults[:3], note])
        return Check(name=name, value=value, bound=1.0, passed=value <= 1.0, note=note)


@dataclass(frozen=True)
class Watched:
    """What the ops of an executor saw of the same sequences: node name -> tokens of all sequences; and the logits [N,
    T, V].
    """

    tokens: Tensor
    seen: dict[str, Seen]
    logits: NDArray[np.float32]


def watch(graph: WatchedGraph, tokens: Tensor) -> Watched:
    """Run sequences [N, T] through a debug copy, the last SINGLE tokens of each one by one."""
    runs = [graph.run(row.numpy(), SINGLE) for row in tokens]

    def joined(name: str, part: int) -> NDArray:
        return np.concatenate([seen[name][part] for seen, _ in runs])

    seen = {name: Seen(joined(name, 0), joined(name, 1)) for name in graph.ops}
    return Watched(tokens, seen, np.stack([logits for _, logits in runs]))


def watched_tokens(batches: Batches, integers: bool) -> Tensor:
    """The sequences [N, T] that ops are compared on: starts of held-out windows, position 0 among them."""
    full = batches.tokens[batches.mask.all(1)]
    count = INTEGER_WINDOWS if integers else WINDOWS
    return full[:: max(1, len(full) // count)][:count, :LENGTH]


@torch.no_grad()
def judge_ops(
    model: Any, watched: Mapping[str, Watched], ops: Sequence[StoredOp], kernel: str = "kernel"
) -> dict[str, Tally]:
    """The ops of several executors of one file, and the gated torch modules ("torch"), against the reference on the
    ops' own inputs; by executor.

    The executor named `kernel` is judged by the kernels' arithmetic where weights are integers. `model` is gated and
    its weights are those of the file; the torch modules are run on what the first executor's ops read.
    """
    tallies = {executor: Tally() for executor in (*watched, "torch")}
    unknown = {executor: set(run.seen) for executor, run in watched.items()}
    for op in ops:
        present = {}
        for executor, run in watched.items():
            if op.node in run.seen:
                present[executor] = run.seen[op.node]
                unknown[executor].discard(op.node)
            else:
                tallies[executor].faults.append(f"{op.node} is not in the file")
        if not present:
            continue
        if op.emulated and kernel in present:
            _judge_kernel(tallies[kernel], op, present.pop(kernel))
        first = next(iter(present or watched), "")
        seen = dict(present)
        x = (seen.get(first) or watched[first].seen[op.node]).x
        seen["torch"] = Seen(x, _torch_output(model, op, x))
        _judge_float(tallies, op, seen)
    for executor, names in unknown.items():
        tallies[executor].faults += [f"{name} is not in the checkpoint" for name in sorted(names)]
    return tallies


def _judge_float(tallies: Mapping[str, Tally], op: StoredOp, seen: Mapping[str, Seen]) -> None:
    """Executors that leave activations in floating point, all on one evaluation of the reference."""
    x = np.concatenate([part.x.astype(np.float32) for part in seen.values()])
    clear, expected = (
        off_thresholds(op.variant, x, op.tensors, integer=False),
        op.op.reference(op.variant, x, op.tensors),
    )
    start = 0
    for executor, part in seen.items():
        rows = slice(start, start := start + len(part.x))
        error, bound = nmse(part.y, expected[rows]), np.full(len(part.x), op.op.BOUNDS[op.variant.x])
        if executor != "kernel":
            bound = np.maximum(bound, SUM_BOUND)
        if (over := error > bound).any():
            bound[over] += sum_energy(op.variant, part.x[over].astype(np.float32), op.tensors) / np.maximum(
                np.square(expected[rows][over]).sum(-1), 1e-30
            )
        tallies[executor].add(op.node, error, bound, clear[rows])


def _judge_kernel(tally: Tally, op: StoredOp, seen: Seen) -> None:
    """A kernel that rounds activations where they meet integers; what lies at a rounding boundary may have been rounded
    to either side.
    """
    tight = op.op.BOUNDS[op.variant.weights if op.variant.weights != "float" else "int8_row"]
    at_once = max(
        1, _ROUNDED_AT_ONCE // max(tensor.size for role, tensor in op.tensors.items() if role.startswith(("s_", "tau")))
    )
    for start in range(0, len(seen.x), at_once):
        x, y = (part[start : start + at_once] for part in seen)
        clear = settled_scores(op.variant, x, op.tensors)
        expected = op.op.emulate(op.variant, x, op.tensors)
        bound = tight + tie_energy(op.variant, x, op.tensors) / np.maximum(np.square(expected).sum(-1), 1e-30)
        tally.add(op.node, nmse(y, expected), bound, clear, first=start == 0)


def _torch_output(model: Any, op: StoredOp, x: NDArray) -> NDArray[np.float32]:
    """What the gated torch modules at an op's place answer to x [T, d_in]: [T, d_out]."""
    rows = torch.from_numpy(x.astype(np.float32))[None]
    parts = [model.get_submodule(module)(rows)[0][:, columns or slice(None)] for module, columns in op.places]
    return torch.cat(parts, dim=-1).numpy()


def nmse(got: NDArray, expected: NDArray) -> NDArray[np.float64]:
    """Squared error over squared size by token, [T] of [T, d]; 0 where both are 0."""
    error = np.square(got.astype(np.float64) - expected).sum(-1)
    size = np.square(expected).sum(-1)
    return np.where(error == 0, 0.0, error / np.maximum(size, 1e-30))


@torch.no_grad()
def judge_rest(name: str, model: Any, watched: Watched, ops: Sequence[StoredOp]) -> Check:
    """Everything outside the ops: torch's logits when each op's output is the graph's, against the graph's logits.

    No threshold decides anything here, so the bound is that of a dense graph.
    """
    lines, length = watched.tokens.shape
    outputs: dict[str, list[tuple[slice | None, Tensor]]] = {}
    for op in ops:
        y = torch.from_numpy(watched.seen[op.node].y.astype(np.float32)).view(lines, length, -1)
        start = 0
        for module, columns in op.places:
            width = y.shape[-1] if columns is None else columns.stop - columns.start
            outputs.setdefault(module, []).append((columns, y[..., start : start + width]))
            start += width
    with tapped_outputs({model.get_submodule(name): partial(_with_columns, parts) for name, parts in outputs.items()}):
        expected = model(input_ids=watched.tokens).logits.float().numpy()
    difference = float(np.abs(watched.logits - expected).max())
    bound = LOGIT_BOUND * max(float(np.sqrt(np.square(expected, dtype=np.float64).mean())), 1.0)
    note = f"{lines} sequences of {length} tokens, torch with the graph's own op outputs"
    return Check(name=name, value=difference, bound=bound, passed=difference <= bound, note=note)


def _with_columns(parts: list[tuple[slice | None, Tensor]], output: Tensor) -> Tensor:
    """`output` [..., d_out] with its columns (None: all) from `parts`."""
    changed = output.clone()
    for columns, y in parts:
        changed[..., columns or slice(None)] = y
    return changed


def open_watched(onnx: Path, library: bool, providers: list[str] | None, rounded: bool) -> WatchedGraph:
    """The debug copy of a folder's graph; where activations are rounded outside the ops, they stay in floating point
    here.
    """
    return WatchedGraph(onnx, library, providers, float_activations=rounded)

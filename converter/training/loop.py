"""The one training loop: named tensors, seeded windows, a schedule in levels, and checkpoints from which a run goes on
to the same weights.

What is trained and against what is an `Objective`; this module knows neither models nor losses. State lies in
safetensors and JSON. Under torchrun every process takes its share of the rows of every micro-batch, and the result is
that of one process with all rows (`distributed`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from torch.optim import Optimizer

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import read_json
from ..checkpoint.stage import Header, atomic_folder, is_finished, write_header, write_json, write_tensors
from ..modeling.distributed import (
    anywhere,
    broadcast_text,
    clip_gradients,
    gathered,
    mean_gradients,
    same_error,
    scatter,
    share_of,
    share_tensors,
    sum_over_processes,
    world,
)
from ..progress import partly, update
from ..text.windows import Batches
from .optimizers import Trained, make_optimizers, moments, remember
from .settings import Settings

STATE = "training.json"
_TENSORS, _VERSION = "training.safetensors", 2
_SAVING = 20  # between saves, at least this many times what the last one took


class Objective(Protocol):
    """What a run minimises. With several processes each has its own objective, which sees its rows; what it carries
    over must be equal on all of them (`distributed.sum_over_processes`).
    """

    def parameters(self) -> Mapping[str, tuple[Tensor, float] | Trained]:
        """Trained leaf tensors by name, each with its rate relative to the others'."""
        ...

    def loss(self, tokens: Tensor, mask: Tensor, step: int) -> Tensor:
        """The scalar loss of a micro-batch's windows [B, S] at a step (from 0): a mean over the positions that `mask`
        has.
        """
        ...

    def after(self, step: int) -> dict[str, float]:
        """Called when the tensors have moved; returns figures for the progress line and the curve, where the mean over
        processes stands.
        """
        ...

    def state(self) -> dict[str, float]:
        """What `loss` and `after` carry from step to step besides the tensors."""
        ...

    def restore(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""
        ...


@dataclass
class _Run:
    """How far a run has come: steps done, positions trained on and seconds taken, over all processes and resumed runs,
    and its curve.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def train(
    objective: Objective,
    batches: Batches,
    settings: Settings,
    folder: Path,
    header: Header,
    at_level: Callable[[int], None],
) -> list[dict[str, float]]:
    """Run `settings.steps` steps, resumed from `folder` when it holds a state under the same `header`; `at_level(k)` is
    called at the end of level k, on every process.

    The windows of a step depend on (seed, step) alone, so an interrupted run ends with the same weights. The losses of
    micro-batches and processes are weighted by their positions that are not padding, so that the step is that of one
    batch of all of them. Returns the curve: every tenth step and after the last a row of step, loss, `tokens` trained
    on so far, seconds if asked, and figures. Raises InputError when the loss or its gradient is not finite and when
    windows do not divide by the number of processes.
    """
    trained = {
        name: leaf if isinstance(leaf, Trained) else Trained(*leaf) for name, leaf in objective.parameters().items()
    }
    tensors = {name: leaf.tensor for name, leaf in trained.items()}
    optimizers = make_optimizers(trained, settings.rate, settings.optimizer, settings.betas, settings.weight_decay)
    share_tensors(tensors.values())
    run = _resume(objective, tensors, optimizers, folder, header)
    before, begun = run.seconds, monotonic()
    saved, took = begun, 0.0
    note = ""
    update(run.step, settings.steps)
    for step in range(run.step, settings.steps):
        loss, count = _step(objective, tensors, optimizers, batches, settings, step)
        figures = objective.after(step)
        run.step, run.tokens, run.seconds = step + 1, run.tokens + count, before + monotonic() - begun
        if run.step % 10 == 0 or run.step == settings.steps:
            figures = _mean(figures)
            note = " ".join(f"{name} {value:.4g}" for name, value in {"loss": loss, **figures}.items())
            times = {"seconds": run.seconds} if settings.timed else {}
            run.curve.append({"step": run.step, "loss": loss, "tokens": run.tokens, **times, **figures})
        update(run.step, settings.steps, note)
        if run.step in settings.bounds():
            at_level(settings.bounds().index(run.step))
        late = anywhere(monotonic() - saved > max(settings.save_seconds, _SAVING * took))
        if (run.step % settings.save_every == 0 or late) and run.step < settings.steps:
            start = monotonic()
            _save(objective, tensors, optimizers, run, folder, header)
            saved = monotonic()
            took = saved - start
    return run.curve


def _step(
    objective: Objective,
    tensors: Mapping[str, Tensor],
    optimizers: list[Optimizer],
    batches: Batches,
    settings: Settings,
    step: int,
) -> tuple[float, int]:
    """Move the tensors once; returns the loss before and the positions that are not padding, both of all processes.
    Raises InputError when the loss or its gradient is not finite.
    """
    for group in (group for one in optimizers for group in one.param_groups):
        group["lr"] = group["peak"] * settings.factor(step)
    for one in optimizers:
        one.zero_grad(set_to_none=True)
    loss, count = _backward(objective, batches, settings, step)
    if not math.isfinite(loss):
        raise InputError(f"The training loss must be a finite number, got {loss} at step {step}. Lower the rate.")
    mean_gradients(tensors.values())
    norm = clip_gradients(tensors.values(), settings.clip)
    if not bool(norm.isfinite()):
        raise InputError(f"The gradient must be finite, got a norm of {float(norm)} at step {step}. Lower the rate.")
    for one in optimizers:
        one.step()
    return loss, count


def _backward(objective: Objective, batches: Batches, settings: Settings, step: int) -> tuple[float, int]:
    """Add up the gradients of a step, to be averaged over processes; returns its loss and its positions that are not
    padding, both of all processes.
    """
    rows = _rows(len(batches.tokens), settings, step)
    count = int(batches.mask[rows].sum())
    total: Any = 0.0
    for micro in rows.split(settings.windows):
        share = micro[share_of(len(micro), "The windows of a micro-batch")]
        tokens, mask = batches.tokens[share], batches.mask[share]
        loss = objective.loss(tokens, mask, step)
        weight = int(mask.sum()) / max(1, count)
        scale = weight * world().size
        (loss if scale == 1 else loss * scale).backward()
        total = total + (loss.detach() if weight == 1 else loss.detach() * weight)
    return float(sum_over_processes(total)), count


def _mean(figures: dict[str, float]) -> dict[str, float]:
    """Figures averaged over processes."""
    if world().size == 1:
        return figures
    means = sum_over_processes(torch.tensor(list(figures.values()), dtype=torch.float64)) / world().size
    return dict(zip(figures, means.tolist(), strict=True))


def _rows(count: int, settings: Settings, step: int) -> Tensor:
    """The windows of a step: a part of a permutation that is drawn anew for every pass over the data. [B]."""
    size = min(settings.windows * settings.accumulate, count)
    per_pass = count // size
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + step // per_pass))
    at = step % per_pass * size
    return order[at : at + size]


def _save(
    objective: Objective,
    tensors: Mapping[str, Tensor],
    optimizers: list[Optimizer],
    run: _Run,
    folder: Path,
    header: Header,
) -> None:
    """Store the state; the first process gathers and writes it."""
    stored: dict[str, Tensor] = {}
    names = {name: sorted(moments(optimizers, tensor)) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        for key, value in {"value": tensor, **moments(optimizers, tensor)}.items():
            whole = gathered(value)
            if whole is not None:
                stored[f"{name}.{key}"] = whole.contiguous()
    state = {"version": _VERSION, "step": run.step, "tokens": run.tokens, "seconds": run.seconds, "moments": names}
    with same_error():
        if world().rank == 0:
            with atomic_folder(folder) as partial:
                write_tensors(partial / _TENSORS, stored)
                write_json(partial / STATE, {**state, "objective": objective.state(), "curve": run.curve})
                write_header(partial, header)


def _resume(
    objective: Objective, tensors: Mapping[str, Tensor], optimizers: list[Optimizer], folder: Path, header: Header
) -> _Run:
    """Fill tensors, optimizers and objective from the state that the first process finds, if it does."""
    state: dict[str, Any] = {}
    with same_error():
        if world().rank == 0:
            state = read_json(folder / STATE, "The training state") if is_finished(folder, header) else {}
            if state.get("version") != _VERSION:
                state = {}
                shutil.rmtree(
                    folder, ignore_errors=True
                )  # another run's state would belie what this one leaves beside it
    state = json.loads(broadcast_text(json.dumps(state)))
    if not state:
        return _Run()
    partly()
    stored = safe_open(folder / _TENSORS, framework="pt") if world().rank == 0 else None
    for name, tensor in tensors.items():
        for key, into in {"value": tensor, **remember(optimizers, tensor, state["moments"][name])}.items():
            scatter(stored.get_tensor(f"{name}.{key}") if stored is not None else None, into)
    objective.restore(state["objective"])
    return _Run(int(state["step"]), int(state["tokens"]), float(state["seconds"]), list(state["curve"]))

"""The one training loop: AdamW over named tensors, seeded windows, a schedule in levels, and checkpoints from which a run goes on to the same weights.

What is trained and against what is an `Objective`; this module knows neither models nor losses. State lies in safetensors and JSON.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from .artifact import Header, InputError, atomic_folder, is_finished, read_json, write_header, write_json
from .data import Batches

BETAS = (0.9, 0.98)
CLIP = 1.0  # norm of the gradient of all tensors together
_STATE, _TENSORS = "training.json", "training.safetensors"


@dataclass(frozen=True)
class Settings:
    """How the loop runs: `steps` of `windows` windows; in every one of the `levels` equal parts of the run the rate rises for `warm_up` steps to `rate` and
    falls linearly to `floor` of it; `save_every` steps the state is stored.
    """

    steps: int
    windows: int
    rate: float
    warm_up: int = 30
    levels: int = 1
    floor: float = 0.05
    seed: int = 0
    save_every: int = 100

    def bounds(self) -> list[int]:
        """The step after which each level ends."""
        return [round(self.steps * (k + 1) / self.levels) for k in range(self.levels)]

    def factor(self, step: int) -> float:
        """The rate of a step (from 0) as a share of the peak."""
        bounds = [0, *self.bounds()]
        level = next(k for k in range(self.levels) if step < bounds[k + 1])
        inside, length = step - bounds[level], bounds[level + 1] - bounds[level]
        warm = min(self.warm_up, length // 4)
        if inside < warm:
            return (inside + 1) / (warm + 1)
        return self.floor + (1 - self.floor) * (length - inside) / max(1, length - warm)


class Objective(Protocol):
    """What a run minimises."""

    def parameters(self) -> Mapping[str, tuple[Tensor, float]]:
        """Trained leaf tensors by name, each with its rate relative to the others'."""
        ...

    def loss(self, tokens: Tensor, mask: Tensor, step: int) -> Tensor:
        """The scalar loss of windows [B, S] at a step (from 0)."""
        ...

    def after(self, step: int) -> dict[str, float]:
        """Called when the tensors have moved; returns figures for the progress line and the curve."""
        ...

    def state(self) -> dict[str, float]:
        """What `loss` and `after` carry from step to step besides the tensors."""
        ...

    def restore(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""
        ...


def train(
    objective: Objective, batches: Batches, settings: Settings, folder: Path, header: Header, at_level: Callable[[int], None], label: str = "train"
) -> list[dict[str, float]]:
    """Run `settings.steps` steps, resumed from `folder` when it holds a state under the same `header`; `at_level(k)` is called at the end of level k.

    The windows of a step depend on (seed, step) alone, so an interrupted run ends with the same weights. Returns the curve: one row of figures every tenth
    step. Raises InputError when the loss or its gradient is not finite.
    """
    tensors = {name: tensor for name, (tensor, _) in objective.parameters().items()}
    groups = [{"params": [tensor], "lr": share * settings.rate, "peak": share * settings.rate} for tensor, share in objective.parameters().values()]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
    start, curve = _resume(objective, tensors, optimizer, folder, header)
    with tqdm(total=settings.steps, initial=start, desc=label, unit="step") as progress:
        for step in range(start, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * settings.factor(step)
            rows = _rows(len(batches.tokens), settings, step)
            loss = objective.loss(batches.tokens[rows], batches.mask[rows], step)
            if not bool(loss.isfinite()):
                raise InputError(f"The training loss must be a finite number, got {float(loss.detach())} at step {step}. Lower the rate.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(tensors.values(), CLIP)
            if not bool(norm.isfinite()):
                raise InputError(f"The gradient must be finite, got a norm of {float(norm)} at step {step}. Lower the rate.")
            optimizer.step()
            figures = objective.after(step)
            progress.update()
            if (step + 1) % 10 == 0:
                progress.set_postfix({name: f"{value:.4g}" for name, value in figures.items()})
                curve.append({"step": step + 1, "loss": float(loss.detach()), **figures})
            if step + 1 in settings.bounds():
                at_level(settings.bounds().index(step + 1))
            if (step + 1) % settings.save_every == 0 and step + 1 < settings.steps:
                _save(objective, tensors, optimizer, step + 1, curve, folder, header)
    return curve


def _rows(count: int, settings: Settings, step: int) -> Tensor:
    """The windows of a step: a part of a permutation that is drawn anew for every pass over the data. [B]."""
    size = min(settings.windows, count)
    per_pass = count // size
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + step // per_pass))
    at = step % per_pass * size
    return order[at : at + size]


def _save(
    objective: Objective,
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    curve: list[dict[str, float]],
    folder: Path,
    header: Header,
) -> None:
    stored = {f"{name}.value": tensor.detach().cpu() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        moments = optimizer.state[tensor]
        stored |= {f"{name}.{key}": moments[key].cpu().clone() for key in ("exp_avg", "exp_avg_sq")}
    with atomic_folder(folder) as partial:
        save_file(stored, partial / _TENSORS)
        write_json(partial / _STATE, {"step": step, "objective": objective.state(), "curve": curve})
        write_header(partial, header)


def _resume(
    objective: Objective, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, folder: Path, header: Header
) -> tuple[int, list[dict[str, float]]]:
    if not is_finished(folder, header):
        shutil.rmtree(folder, ignore_errors=True)  # another run's state would belie what this one leaves beside it
        return 0, []
    stored, state = load_file(folder / _TENSORS), read_json(folder / _STATE, "The training state")
    step = int(state["step"])
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(stored[f"{name}.value"])
            moments = {key: stored[f"{name}.{key}"].to(tensor.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[tensor] = {"step": torch.tensor(float(step)), **moments}
    objective.restore(state["objective"])
    return step, list(state["curve"])

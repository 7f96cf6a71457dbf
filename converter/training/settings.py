"""Settings of trainings: of the loop, and of a recipe's recovery."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch.distributed
from pydantic import Field, model_validator

from ..checkpoint.fields import PassPrecision, Strict
from ..text.mixture import Data

_FEW_STEPS = 300  # a process takes several seconds to start
_SMALL = 32_000_000  # parameters: larger models' operations fill several threads


def count_for(recovery: Recovery, parameters: int, available: int) -> int:
    """How many processes to train in on a CPU: one where nothing is trained end to end or weights are shared out; what
    is asked for; or for "auto" the most up to `available` cores that the windows of a micro-batch divide by, for small
    models and more than a few steps, and one for the rest and block by block, whose micro-batches need not divide by
    what the windows do.
    """
    if not recovery.end_to_end or recovery.parallel == "fsdp":
        return 1
    if recovery.processes != "auto":
        return recovery.processes
    if (
        recovery.steps < _FEW_STEPS
        or parameters > _SMALL
        or recovery.by_block is not None
        or not torch.distributed.is_available()
    ):
        return 1
    return max(count for count in range(1, max(1, available) + 1) if recovery.windows % count == 0)


class Losses(Strict):
    """Weights of what is minimised, nats per token: `distill` KL(dense || student), `lm` the next token's
    cross-entropy; `hidden` a mean over blocks of the squared difference of their outputs from the dense source's,
    relative to its energy.
    """

    distill: float = Field(default=1.0, ge=0)
    lm: float = Field(default=0.0, ge=0)
    hidden: float = Field(default=0.0, ge=0)


class Penalty(Strict):
    """What makes activations sparse, by its `kind`, per site and then the mean over sites.

    `count` is a smooth count of the open units, sigmoid(margin / softness) where the margin is the smaller of a unit's
    factors that must be positive, relative to the rms of each; `l1` is mean|z| / rms z. Its `weight` grows over the
    first `ramp` of the run along a straight line or, in `periods` steps, along sine curves (ProSparse, arXiv
    2402.13516). With a `density` the weight is a controller's instead, which leads the share of non-zeros there along
    the same curve and holds it.
    """

    kind: Literal["count", "l1"] = "count"
    weight: float = Field(default=0.5, ge=0)
    ramp: float = Field(default=0.5, gt=0, le=1)
    shape: Literal["linear", "sine"] = "linear"
    periods: int = Field(default=1, ge=1)
    softness: float = Field(default=0.25, gt=0)
    density: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Penalty:
        if self.density is not None and self.weight == 0:
            raise ValueError("weight must be above 0 where a density is wished: it is what leads there")
        return self


class Lora(Strict):
    """Low-rank updates W + alpha / rank B A of every linear map of the blocks in place of whole weights (LoRA, arXiv
    2106.09685).
    """

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)


class Joint(Strict):
    """Predictors trained together with the weights: their cost (of the network's weights), the density that they
    predict after the first `ramp` of the run, to which they are led from 1 along `path`, and their peak rate; the mask
    is hard and its gradient the sigmoid's (Turbo Sparse, arXiv 2406.05955).
    """

    cost: float = Field(default=0.1, gt=0, lt=1)
    density: float = Field(default=0.14, gt=0, lt=1)
    rate: float = Field(default=4e-3, gt=0)
    ramp: float = Field(default=0.5, gt=0, le=1)
    path: Literal["linear", "geometric"] = "linear"


class ByBlock(Strict):
    """Recovery block by block: every network is fitted to the dense block's output, in order, on the inputs that the
    blocks before really give; `steps` of `tokens` tokens a block at peak `rate`, between two closed-form solutions of
    the down projection; `l1` weighs mean|z| / rms z.
    """

    steps: int = Field(default=100, ge=1)
    tokens: int = Field(default=2048, ge=1)
    rate: float = Field(default=5e-3, gt=0)
    l1: float = Field(default=0.0, ge=0)


class Recovery(Strict):
    """Training of weights after an activation was swapped or units were gated: `steps` of `accumulate` times `windows`
    windows each, over all processes.

    The rate rises over `warm_up` steps to `rate` and falls along `schedule` to `floor` of it. `optimizer` muon takes
    matrices by Muon and the rest by AdamW. `end_to_end` False leaves it at `by_block`. `parallel` says what several
    processes under torchrun share: nothing but gradients (data), or weights and optimizer too (fsdp). On a CPU,
    `processes` of this machine sample and train, sharing nothing but gradients (auto: as many as cores and windows
    allow, where a model is small); the result is the same up to rounding.
    """

    steps: int = Field(default=2000, ge=1)
    windows: int = Field(default=8, ge=1)
    accumulate: int = Field(default=1, ge=1)
    rate: float = Field(default=2e-3, gt=0)
    floor: float = Field(default=0.1, ge=0, le=1)
    warm_up: int = Field(default=50, ge=0)
    schedule: Literal["linear", "cosine"] = "cosine"
    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    precision: PassPrecision = "auto"
    checkpointing: bool = False
    data: Data = Data()
    losses: Losses = Losses()
    penalty: Penalty = Penalty()
    lora: Lora | None = None
    predictors: Joint | None = None
    by_block: ByBlock | None = None
    end_to_end: bool = True
    parallel: Literal["data", "fsdp"] = "data"
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"


class Stage(Strict):
    """One method, two joined by `+` (a neuron method and a channel method), `imported`, or `auto`, which tries those
    without training and the trained form of the best; and the configuration, of which a method takes the fields that it
    knows. `steps` are those of methods that are trained end to end, by name, in place of the configuration's; 0 leaves
    a method out. `tune` trains the weights under the stage's plan.
    """

    method: str = "auto"
    config: dict[str, Any] = {}
    steps: dict[str, Annotated[int, Field(ge=0)]] = {}
    tune: Recovery | None = None


@dataclass(frozen=True)
class Settings:
    """How the loop runs: `steps` of `accumulate` micro-batches of `windows` windows each, over all processes; in every
    one of the `levels` equal parts of the run the rate rises for `warm_up` steps to `rate` and falls along `schedule`
    to `floor` of it; `clip` is the largest norm of the gradient of all tensors together. The state is stored every
    `save_every` steps and whenever `save_seconds` have passed. `timed` adds the column `seconds` to the curve.
    """

    steps: int
    windows: int
    rate: float
    warm_up: int = 30
    levels: int = 1
    floor: float = 0.05
    seed: int = 0
    save_every: int = 100
    accumulate: int = 1
    schedule: Literal["linear", "cosine"] = "linear"
    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    clip: float = 1.0
    save_seconds: float = 60.0
    timed: bool = False

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
        left = (length - inside) / max(1, length - warm)
        if self.schedule == "cosine":
            return self.floor + (1 - self.floor) * (1 - math.cos(math.pi * left)) / 2
        return self.floor + (1 - self.floor) * (length - inside) / max(1, length - warm)


def settings_of(recovery: Recovery, seed: int) -> Settings:
    """The loop of a recipe's recovery training, in one level and with times in its curve."""
    r = recovery
    return Settings(
        r.steps,
        r.windows,
        r.rate,
        r.warm_up,
        floor=r.floor,
        seed=seed,
        accumulate=r.accumulate,
        schedule=r.schedule,
        optimizer=r.optimizer,
        betas=r.betas,
        weight_decay=r.weight_decay,
        timed=True,
    )

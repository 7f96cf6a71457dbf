"""Training under the gates of a plan: what selects, and what of the weights is trained beside it, all layers jointly
against the dense model's own distribution.

The loss is KL(dense || sparse) over the vocabulary, mean over positions, plus `local` times the sum over layers of the
energy that a layer's output loses on its own input, relative to the output's energy and weighted by what noise of that
energy in that layer costs in divergence, plus a price on the kept share of all sites together.

Two controllers hold the density. A shift of all logits follows the wished one from step to step. The price is the one
at which such a shift would gain nothing, (dL / dshift) / (d density / dshift): gradients then say which units are worth
more than others, and layers find their own densities while the mean stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.plan import Plan
from ..methods.tune import Tune
from ..modeling.losses import kept_divergence, kl_divergence
from .dense_logits import DenseLogits
from .inputs import Models
from .recompute import checkpointed
from .settings import Settings
from .step_parts import StepPart, StepPass, known, split_step
from .student import Seen, Student

SINK = 0.25
"""Of a level: the part in which the wished density sinks to the level's."""
# Of the excess that a step makes up for: batches differ, and following each of them would move every threshold.
_FOLLOW = 0.15
_FARTHEST = 1.0  # logits that a step shifts by at most
_MEMORY = 0.9  # of the running mean of the price


class SelectionObjective:
    """The objective of `loop.train` for the sites of a plan; `targets` are the densities that the levels of the run end
    at, `start` the one that it begins with.

    `probe` [N, S] are a few windows that inputs are scaled by. The model's own weights are never changed and get no
    gradients; the divergence is from the dense model of `models`. `tune` says what is trained, what the lost energy
    weighs and in which precision passes run; steps and rate are those of `settings`.
    """

    def __init__(
        self,
        models: Models,
        plan: Plan,
        tune: Tune,
        settings: Settings,
        start: float,
        targets: Sequence[float],
        probe: Tensor,
    ) -> None:
        self.models, self.tune, self.settings, self.targets = models, tune, settings, [start, *targets]
        self.student = Student(models, plan, tune, probe, settings.seed)
        self.dense = DenseLogits(self.student.model if models.teacher is None else models.teacher, tune)
        self.shift, self.price, self.steps = 0.0, 0.0, 0
        self.figures: dict[str, float] = {}

    def parameters(self) -> Mapping[str, tuple[Tensor, float]]:
        """Every trained tensor with its relative rate."""
        return self.student.parameters()

    def target(self, step: int) -> float:
        """The density aimed at in a step: it sinks over the first part of a level and stays."""
        ends = self.settings.bounds()
        level = next(k for k, end in enumerate(ends) if step < end)
        begin = [0, *ends][level]
        above, wished = self.targets[level], self.targets[level + 1]
        return above + (wished - above) * min(1.0, (step + 1 - begin) / max(1.0, SINK * (ends[level] - begin)))

    def loss(self, tokens: Tensor, mask: Tensor, step: int) -> Tensor:
        """Divergence (nats per position), lost energy and price; windows [B, S], padding masked [B, S]."""
        device = self.student.model.device
        tokens, mask = tokens.to(device), mask.to(device)
        parts, threads = split_step(tokens, mask, device), torch.get_num_threads()
        self.student.shift(self.shift)
        with ThreadPoolExecutor(len(parts)) as pool, ExitStack() as recomputed:
            if self.tune.recompute:
                recomputed.enter_context(checkpointed(self.student.model))
            try:
                dense = list(pool.map(self._dense, parts))
                with self.student.masking():
                    passes = list(pool.map(self._sparse, parts, dense))
                del dense
                weights = torch.tensor([1.0, self.tune.local, self.price], device=device)
                leaves = [tensor for tensor, _ in self.parameters().values()]
                gradients = list(pool.map(lambda each: each[0].gradients(weights, leaves), passes))
            finally:
                torch.set_num_threads(threads)
        value = torch.stack([each.value(weights).detach() for each, _ in passes]).sum()
        density = float(sum(each.density.detach() * each.part.share for each, _ in passes))
        self._steer(density, passes, step)
        self.figures = {
            "kl": float(sum(each.divergence.detach() for each, _ in passes)),
            "density": density,
            "price": self.price,
        }
        return known(value, [reduce(torch.add, parts) for parts in zip(*gradients, strict=True)], leaves)

    def _steer(self, density: float, passes: Sequence[tuple[StepPass, list[Seen]]], step: int) -> None:
        """Move shift and price for the next step, by what this one kept and how its losses pull at all logits."""
        pull = fall = 0.0
        for each, seen in passes:
            for site, (gain, slope) in ((one.site, one.pull[-1]) for one in seen if one.pull):
                pull += gain
                fall += each.part.share * self.student.weights[site] * slope
        if fall > 0:
            price = max(0.0, -pull / fall)
            self.price = price if self.steps == 0 else _MEMORY * self.price + (1 - _MEMORY) * price
            target, following = (self.target(min(k, self.settings.steps - 1)) for k in (step, step + 1))
            moved = (target - following + _FOLLOW * (density - target)) / fall
            self.shift += max(-_FARTHEST, min(_FARTHEST, moved))
        self.steps += 1

    def _dense(self, part: StepPart) -> Any:
        torch.set_num_threads(part.threads)
        return self.dense.of(part.tokens, part.mask)

    def _sparse(self, part: StepPart, dense: Any) -> tuple[StepPass, list[Seen]]:
        """The divergence, lost energy and density of a part, with their graph, and what its sites kept."""
        torch.set_num_threads(part.threads)
        seen = self.student.begin()
        sparse = self.dense.logits(self.student.model, part.tokens, part.mask)
        distance = kept_divergence if self.dense.keeps else kl_divergence
        divergence = distance(dense, sparse, part.mask) * part.positions if part.positions else sparse.sum() * 0.0
        lost = torch.stack([each.lost for each in seen]).sum()
        return StepPass(divergence, lost, self.student.density(seen), part), seen

    def after(self, step: int) -> dict[str, float]:
        """Divergence (nats), density and price of the step, and the density aimed at."""
        return self.figures | {"target": self.target(step)}

    def state(self) -> dict[str, float]:
        """The controllers' memory."""
        return {"price": self.price, "shift": self.shift, "steps": float(self.steps)}

    def restore(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""
        self.price, self.shift, self.steps = float(state["price"]), float(state["shift"]), int(state["steps"])

    def plan(self, tokens: Tensor, density: float) -> Plan:
        """The present gates as a plan whose density on windows [N, S] is `density`."""
        return self.student.site_plans(tokens, density, self.shift)

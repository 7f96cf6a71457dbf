"""The search for the cheapest plan inside a quality budget: bisection on the mean density, or on a shift.

A budget bounds what held-out text loses: the rise in perplexity or the divergence from the dense model, or both. It is
met on windows kept for the search; what is found is judged on others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..arch import Arch
from ..arch.site import Site
from ..checkpoint.plan import Gate, Plan, Predictor, SitePlan, Threshold
from ..evaluation.long_context import Sequences, far_loss, whole_windows
from ..evaluation.quality import LEAST_WINDOWS, Reference, Totals, compare, torch_logits
from ..modeling.gated import Recorder, make_gates
from ..text.windows import Batches
from .recipe import Budget

_ROUGH_SHARE = 8  # the bisection begins on every 8th window
_STEPS, _ROUGH_STEPS = 6, 6
_SLACK = 0.02  # a result within 2 % of the budget below it is near enough
_SURE = (
    4  # standard errors between a loss and a bound that more windows will not change sides of, however often one looks
)


@dataclass(frozen=True)
class Loss:
    """What a plan loses on the search windows: `nll` is the rise in nats per token, `kl` the divergence from dense,
    each with its standard error; `density` is the realised share by site. `kl_long` is the divergence of the far tokens
    of long windows, all of which are measured each time; None without such windows.
    """

    nll: float
    kl: float
    density: Mapping[Site, float]
    nll_error: float = 0.0
    kl_error: float = 0.0
    kl_long: float | None = None

    def share(self, budget: Budget, errors: float = 0.0) -> float:
        """The used share of the budget, the tightest bound deciding, with so many standard errors more; above 1 it is
        broken.
        """
        shares = []
        if budget.max_ppl_increase is not None:
            shares.append((self.nll + errors * self.nll_error) / max(1e-9, math.log1p(budget.max_ppl_increase)))
        if budget.max_kl is not None:
            shares.append((self.kl + errors * self.kl_error) / max(1e-9, budget.max_kl))
        if budget.max_kl_long is not None:
            shares.append(math.nan if self.kl_long is None else self.kl_long / max(1e-9, budget.max_kl_long))
        return math.inf if any(math.isnan(share) for share in shares) else max(shares)

    def is_decided(self, budget: Budget) -> bool:
        """Whether it is sure to keep or to break the budget."""
        return self.share(budget, _SURE) < 1 or self.share(budget, -_SURE) > 1


class Judge:
    """Measures plans on one model and text, beside that model ungated or the dense `reference_model` that it was made
    from; of the dense side is kept what fits into `keep_bytes`. Windows must be in random order where a budget may be
    decided on the first of them. `long` are whole windows for a budget on long context.
    """

    def __init__(
        self,
        model: Any,
        arch: Arch,
        activation: str,
        batches: Batches,
        keep_bytes: float = 2e9,
        reference_model: Any | None = None,
        long: Batches | None = None,
    ) -> None:
        self.model, self.arch, self.activation = model, arch, activation
        self.reference = Reference(model, batches, reference_model, keep_bytes)
        self.groups = self.reference.groups
        self.long = None if long is None else Sequences(model, whole_windows(long), reference_model)

    @torch.no_grad()
    def loss(self, plan: Plan, every: int = 1, most: int | None = None, budget: Budget | None = None) -> Loss:
        """What `plan` loses on every `every`-th group of windows, `most` groups at most (then not on long ones); with a
        `budget` only as many as decide on it.
        """
        gates = make_gates(self.model, plan, self.arch, self.activation)
        total, seen = Totals(), Recorder(counts_only=True)
        kl_long = None if self.long is None or most is not None else far_loss(self.long.rows(gates))[0]
        for number in list(range(0, len(self.groups), every))[:most]:
            total.add(compare(self.reference, number, [torch_logits(self.model, gates, self.groups[number], seen)])[0])
            if budget is not None and total.windows >= LEAST_WINDOWS and _loss(total, seen, kl_long).is_decided(budget):
                break
        return _loss(total, seen, kl_long)


def _loss(total: Totals, seen: Recorder, kl_long: float | None = None) -> Loss:
    nll_dense, nll, kl, _ = total.means()
    return Loss(nll - nll_dense, kl, seen.density(), total.error(), total.kl_error(), kl_long)


def sparsest(
    make: Callable[[float], Plan], judge: Judge, budget: Budget, low: float, high: float
) -> tuple[float, Plan, Loss] | None:
    """The plan of the least level in [low, high] that meets the budget on the search windows, its level and loss; None
    when `high` does not meet it.

    A plan is measured on all windows unless the first of them decide. `make(level)` must lose less the higher the
    level. A rough bisection on some windows narrows the bracket before the exact one.
    """
    ends = [low, high]
    for _ in range(_ROUGH_STEPS):
        middle = sum(ends) / 2
        ends[judge.loss(make(middle), every=_ROUGH_SHARE, budget=budget).share(budget) <= 1] = middle
    width = (high - low) / 16
    low, top = max(low, ends[0] - width), high
    high = min(high, ends[1] + width)
    best = None
    for candidate in (high, top):
        loss = judge.loss(make(candidate), budget=budget)
        if loss.share(budget) <= 1:
            best, high = (candidate, make(candidate), loss), candidate
            break
    if best is None:
        return None
    for _ in range(_STEPS):
        if best[2].share(budget) > 1 - _SLACK:
            break
        middle = (low + high) / 2
        loss = judge.loss(make(middle), budget=budget)
        if loss.share(budget) <= 1:
            best, high = (middle, make(middle), loss), middle
        else:
            low = middle
    return best


def settled(plan: Plan, density: Mapping[Site, float]) -> Plan:
    """The plan with these densities as its calibrated ones."""

    def gate(site: Site, entry: SitePlan) -> Gate:
        return replace(entry.gating, density=density.get(site, entry.gating.density))

    return {site: replace(entry, gate=gate(site, entry)) for site, entry in plan.items()}


def shifted(plan: Plan, shift: float) -> Plan:
    """A plan that keeps more with a higher `shift`: predictors' logits rise by it, gates' thresholds fall by a quarter
    of it, relatively.
    """

    def moved(gate: Gate) -> Gate:
        if isinstance(gate, Predictor):
            return replace(gate, tau=gate.tau - shift)
        return replace(gate, tau=gate.tau * math.exp(-shift / 4)) if isinstance(gate, Threshold) else gate

    return {site: replace(entry, gate=moved(entry.gating)) for site, entry in plan.items()}

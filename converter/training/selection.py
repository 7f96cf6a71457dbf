"""Predictors and thresholds trained end to end: all layers jointly against the dense model's own distribution, base
weights frozen.

The forward pass masks neurons by score > tau as the executors do; the backward pass takes the sigmoid's slope
(straight-through, arXiv 1308.3432). The loss is KL(dense || sparse) over the vocabulary, mean over positions, plus
`local` times the sum over layers of the energy that a layer's output loses on its own input, relative to the output's
energy and weighted by what noise of that energy in that layer costs in divergence, plus a price on the mean kept share
of all layers together. The price is a controller's: proportional and integral to the density's excess over a target
that sinks to the wished density, so layers find their own densities and the mean meets the target.

Where everything is kept, both errors and all their gradients vanish although some neurons matter more than others: a
derivative at mask 1 is not the change at mask 0. Of the lost energy E = |sum_i (1 - m_i) v_i|^2, v_i = z_i w_down_i,
the exact change by one mask is the derivative at m_i = 1/2, that is the derivative plus (1 - 2 m_i) |v_i|^2; this term
is added, so neurons learn their worth from the first step.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arch.site import Site
from ..checkpoint.plan import Plan
from ..methods.tune import Tune
from ..modeling.blocks import down_rows, ffn_down, ffn_parts
from ..modeling.distributed import in_bf16
from ..modeling.losses import kl_divergence, sigmoid_slope
from ..modeling.taps import replaced
from .false_position import at_zero
from .inputs import AT_ONCE, Models
from .sensitivity import input_rms, noise_costs
from .settings import Settings
from .step_parts import StepPart, StepPass, known, split_step
from .unit import make_unit

PROPORTIONAL, INTEGRAL = 5.0, 0.1
"""Nats per unit of excess density, and per unit of excess and step."""


class _Masked(torch.autograd.Function):
    """(z * m, the mean of m, the sum by window of (1 - 2 m) |v|^2 m) of z [B, S, n] and the mask m = logit > 0 with the
    sigmoid's slope.

    v_i = z_i w_down_i from the norms [n] of w_down, and no gradient goes through it. None for the norms: the last one
    is 0. Logits and norms are fp32.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, logits: Tensor, norms: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        mask = logits.sign().relu_()
        kept, share = z * mask.to(z.dtype), mask.mean()
        if norms is None:
            return kept, share, share.new_zeros(())
        worth = (z.float() * norms).square_()
        ctx.save_for_backward(z, logits, mask, worth)
        return kept, share, -torch.linalg.vecdot(worth.flatten(1), mask.flatten(1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        z, logits, mask, worth = ctx.saved_tensors
        of_kept, of_share, of_toggles = gradients[0], gradients[1], gradients[2][:, None, None]
        of_mask = mask.mul(-2 * of_toggles).add_(of_toggles).mul_(worth)
        of_mask.addcmul_(of_kept.to(mask.dtype), z.to(mask.dtype)).add_(of_share / mask.numel())
        return of_kept * mask.to(of_kept.dtype), of_mask.mul_(sigmoid_slope(logits)), None


class SelectionObjective:
    """The objective of `loop.train` for the feed-forward sites of a plan; `targets` are the densities that the levels
    of the run end at, `start` the one that it begins with.

    `probe` [N, S] are a few windows that inputs are scaled by. The student's weights are never changed and get no
    gradients; the divergence is from the dense model of `models`. `tune` says what the lost energy weighs and in which
    precision passes run; steps and rate are those of `settings`.
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
        self.models, self.settings, self.targets = models, settings, [start, *targets]
        model, arch = models.student, models.arch
        self.local, self.half = tune.local, in_bf16(tune.precision, model.device)
        scales = input_rms(model, arch, [site for site in plan if site.kind == "ffn"], probe)
        self.units = {site: make_unit(plan[site], model.device, scale) for site, scale in scales.items()}
        self.edits = {site: plan[site].edits for site in scales}
        self.price = 0.0
        self._seen: defaultdict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.figures: dict[str, float] = {}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        modules = {site: model.get_submodule(arch.ffn_module(site.layer)) for site in self.units}
        self.worth = noise_costs(model, arch, list(self.units), probe)
        self.norms = {site: down_rows(module, arch).float().norm(dim=1) for site, module in modules.items()}

    def parameters(self) -> Mapping[str, tuple[Tensor, float]]:
        """Every trained tensor, at the same rate."""
        return {
            f"{site.key}.{name}": (tensor, 1.0)
            for site, unit in self.units.items()
            for name, tensor in unit.tensors.items()
        }

    def target(self, step: int) -> float:
        """The density aimed at in a step: it sinks over the first half of a level and stays."""
        ends = self.settings.bounds()
        level = next(k for k, end in enumerate(ends) if step < end)
        begin = [0, *ends][level]
        above, wished = self.targets[level], self.targets[level + 1]
        return above + (wished - above) * min(1.0, 2 * (step + 1 - begin) / (ends[level] - begin))

    def loss(self, tokens: Tensor, mask: Tensor, step: int) -> Tensor:
        """Divergence (nats per position), lost energy and price; windows [B, S], padding masked [B, S]."""
        device = self.models.student.device
        tokens, mask = tokens.to(device), mask.to(device)
        parts, threads = split_step(tokens, mask, device), torch.get_num_threads()
        with ThreadPoolExecutor(len(parts)) as pool:
            try:
                dense = list(pool.map(self._dense, parts))
                with self.masking():
                    passes = list(pool.map(self._masked, parts, dense))
                del dense
                density = float(sum(each.density.detach() * each.part.share for each in passes))
                excess = density - self.target(step)
                self.price = max(0.0, self.price + INTEGRAL * excess)
                price = max(0.0, self.price + PROPORTIONAL * excess)
                weights = torch.tensor([1.0, self.local, price], device=device)
                leaves = [tensor for tensor, _ in self.parameters().values()]
                gradients = list(pool.map(lambda each: each.gradients(weights, leaves), passes))
            finally:
                torch.set_num_threads(threads)
        self.figures = {
            "kl": float(sum(each.divergence.detach() for each in passes)),
            "density": density,
            "price": self.price,
        }
        value = torch.stack([each.value(weights).detach() for each in passes]).sum()
        return known(value, [reduce(torch.add, parts) for parts in zip(*gradients, strict=True)], leaves)

    def _logits(self, model: Any, part: StepPart) -> Tensor:
        attention = None if bool(part.mask.all()) else part.mask.long()
        with torch.autocast(part.tokens.device.type, torch.bfloat16, enabled=self.half):
            logits: Tensor = model(input_ids=part.tokens, attention_mask=attention, use_cache=False).logits
        return logits

    def _dense(self, part: StepPart) -> Tensor:
        torch.set_num_threads(part.threads)
        with torch.no_grad():
            return self._logits(self.models.dense, part)

    def _masked(self, part: StepPart, dense: Tensor) -> StepPass:
        """The divergence, lost energy and density of a part, with their graph."""
        torch.set_num_threads(part.threads)
        seen = self._seen[threading.get_ident()] = []  # a thread may have had another part before
        sparse = self._logits(self.models.student, part)
        divergence = kl_divergence(dense, sparse, part.mask) * part.positions if part.positions else sparse.sum() * 0.0
        return StepPass(
            divergence,
            torch.stack([energy for _, energy in seen]).sum(),
            torch.stack([share for share, _ in seen]).mean(),
            part,
        )

    @contextmanager
    def masking(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """The model masked by the present tensors; yields (kept share, lost energy in nats), one pair a call of a site
        by this thread, in layer order.
        """
        self._seen = defaultdict(list)
        student, arch = self.models.student, self.models.arch
        modules = {site: student.get_submodule(arch.ffn_module(site.layer)) for site in self.units}
        with replaced({module: self._forward(site, module) for site, module in modules.items()}):
            yield self._seen[threading.get_ident()]

    def _forward(self, site: Site, module: nn.Module) -> Any:
        unit, arch = self.units[site], self.models.arch

        def forward(x: Tensor) -> Tensor:
            parts = ffn_parts(module, arch, self.models.activation, x)
            hidden = F.relu((x / unit.scale) @ unit.tensors["fc1"].T) if "fc1" in unit.tensors else None
            logits = unit.logits(hidden, parts.gate)
            if unit.shift:
                logits = logits - unit.shift
            trained = torch.is_grad_enabled()
            kept, share, toggles = _Masked.apply(parts.z, logits, self.norms[site] if trained else None)
            y = ffn_down(module, arch, kept)
            if hidden is not None and "residual" in unit.tensors:
                y = y + hidden @ unit.tensors["residual"]
            if trained:
                dense = ffn_down(module, arch, parts.z.detach()).float()
                energy = (dense - y.float()).square().sum((-2, -1)) + toggles
                lost = self.worth[site] * (energy / dense.square().sum((-2, -1)).clamp_min(1e-20)).mean()
            self._seen[threading.get_ident()].append((share, lost if trained else toggles))
            return y

        return forward

    def after(self, step: int) -> dict[str, float]:
        """Divergence (nats), density and price of the step, and the density aimed at."""
        return self.figures | {"target": self.target(step)}

    def state(self) -> dict[str, float]:
        """The controller's memory."""
        return {"price": self.price}

    def restore(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""
        self.price = float(state["price"])

    def plan(self, tokens: Tensor, density: float) -> Plan:
        """The present tensors as a plan whose mean density on windows [N, S] is `density`: one shift of all logits,
        found by false position.
        """

        def excess_at(shift: float) -> tuple[float, dict[Site, float]]:
            by_site = self.densities(tokens, shift)
            return sum(by_site.values()) / len(by_site) - density, by_site

        by_site = at_zero(excess_at)
        plan: Plan = {site: unit.site_plan(by_site[site], self.edits[site]) for site, unit in self.units.items()}
        for unit in self.units.values():
            unit.shift = 0.0
        return plan

    @torch.no_grad()
    def densities(self, tokens: Tensor, shift: float) -> dict[Site, float]:
        """Kept share by site on windows [N, S] with `shift` taken from every logit; the shift stays set."""
        for unit in self.units.values():
            unit.shift = shift
        student, total = self.models.student, torch.zeros(len(self.units))
        with self.masking() as seen:
            for rows in tokens.split(AT_ONCE):
                seen.clear()
                student.get_decoder()(input_ids=rows.to(student.device), use_cache=False)
                total += len(rows) * torch.stack([share for share, _ in seen]).cpu()
        return dict(zip(self.units, (total / len(tokens)).tolist(), strict=True))

"""A model that is trained under the gates of a plan: what masks it, what of it is trained, and what becomes of both.

The forward pass masks units by score > tau as the executors do; the backward pass takes the sigmoid's slope
(straight-through, arXiv 1308.3432). That gradient reaches what selects and ends there: through the scores it would
teach the layers before to make values large or small for the mask's sake. Neurons are gated in their network, input
channels in their linear map. The model's own weights stay as they are: updates run beside them (`modeling/updates.py`).

Where everything is kept, errors and all their gradients vanish although some neurons matter more than others: a
derivative at mask 1 is not the change at mask 0. Of the lost energy E = |sum_i (1 - m_i) v_i|^2, v_i = z_i w_down_i,
the exact change by one mask is the derivative at m_i = 1/2, that is the derivative plus (1 - 2 m_i) |v_i|^2; this term
is added, so neurons learn their worth from the first step.
"""

from __future__ import annotations

import copy
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arch.site import Site
from ..checkpoint.cost import site_cost, site_parameters
from ..checkpoint.plan import Plan
from ..methods.tune import Tune
from ..modeling.blocks import down_rows, ffn_down, ffn_parts
from ..modeling.distributed import in_bf16
from ..modeling.losses import sigmoid_slope
from ..modeling.taps import linear_parts, replaced
from ..modeling.updates import Update, low_rank, whole
from .adapters import block_linears
from .false_position import at_zero
from .inputs import AT_ONCE, Models
from .sensitivity import input_rms, noise_costs
from .unit import Unit, make_unit

_WHOLE = 0.05  # rate of whole weights, relative to that of low-rank updates


@dataclass
class Seen:
    """What a site's call kept: `share` of its units, the nats `lost` to the missing energy, and once a gradient was
    taken its `pull`.

    `pull` has the gradient of all other losses by a common rise of the site's logits, and the mean slope of its mask,
    which is the density lost by a common fall.
    """

    site: Site
    share: Tensor
    lost: Tensor
    pull: list[tuple[float, float]] = field(default_factory=list)


class _Masked(torch.autograd.Function):
    """(z * m, the mean of m, the sum by window of (1 - 2 m) |v|^2 m) of z [B, S, n] and the mask m = logit > 0 with the
    sigmoid's slope.

    v_i = z_i w_down_i from the norms [n] of w_down, and no gradient goes through it. None for the norms: the last one
    is 0. Logits and norms are fp32. `pull` gets what `Seen` says.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, logits: Tensor, norms: Tensor | None, pull: list[tuple[float, float]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask = logits.sign().relu_()
        kept, share = z * mask.to(z.dtype), mask.mean()
        worth = None if norms is None else (z.float() * norms).square_()
        ctx.save_for_backward(z, logits, mask, worth)
        ctx.pull = pull
        if worth is None:
            return kept, share, share.new_zeros(())
        return kept, share, -torch.linalg.vecdot(worth.flatten(1), mask.flatten(1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        z, logits, mask, worth = ctx.saved_tensors
        of_kept, of_share = gradients[:2]
        slope, of_mask = sigmoid_slope(logits), of_kept.float() * z
        if worth is not None:
            of_toggles = gradients[2][:, None, None]
            of_mask.addcmul_(mask.mul(-2 * of_toggles).add_(of_toggles), worth)
        of_logits = of_mask.mul_(slope)
        ctx.pull.append((float(of_logits.sum()), float(slope.mean())))
        return of_kept * mask.to(of_kept.dtype), of_logits.add_(slope.mul_(of_share / mask.numel())), None, None


class Student:
    """The transformers model of `models` under `plan`, as `tune` says; `probe` [N, S] are a few windows that inputs are
    scaled by, and the updates' start depends on `seed`.

    `model` is what passes run through: the given one with frozen weights, or a copy of it in bfloat16. `weights` are
    the plan's sites by what of all gated bytes they decide on.
    """

    def __init__(self, models: Models, plan: Plan, tune: Tune, probe: Tensor, seed: int = 0) -> None:
        model, arch = models.student, models.arch
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.models, self.plan, self.arch, self.tune = models, plan, arch, tune
        sites = [site for site in plan if site.kind == "ffn"]
        scales = input_rms(model, arch, sites, probe)
        self.units = {site: make_unit(entry, model.device, scales.get(site, 1.0)) for site, entry in plan.items()}
        for site in sites if tune.offsets else []:
            zeros = torch.zeros(arch.size(model.config, "hidden"), device=model.device)
            self.units[site].tensors.setdefault("offset", zeros.requires_grad_())
        self.weights = _governed(plan, models)
        local = sites if tune.local else []
        self.worth = noise_costs(model, arch, local, probe) if local else {}
        modules = {site: model.get_submodule(arch.ffn_module(site.layer)) for site in local}
        self.norms = {site: down_rows(module, arch).float().norm(dim=1) for site, module in modules.items()}
        self.updates = _updates(models, tune, seed)
        self.model = _half(model) if in_bf16(tune.precision, model.device) else model
        self._seen: defaultdict[int, list[Seen]] = defaultdict(list)

    def parameters(self) -> Mapping[str, tuple[Tensor, float]]:
        """Every trained tensor with its rate relative to thresholds'."""
        share = self.tune.update_rate / self.tune.rate
        leaves = {
            f"{site.key}.{name}": (tensor, share if name == "offset" else 1.0)
            for site, unit in self.units.items()
            for name, tensor in unit.tensors.items()
        }
        for name, update in self.updates.items():
            for part, tensor in update.tensors.items():
                leaves[f"{name}.{part}"] = (tensor, share * (_WHOLE if part == "weight" else 1.0))
        return leaves

    @contextmanager
    def masking(self) -> Iterator[list[Seen]]:
        """The model masked and updated by the present tensors; yields what this thread's calls of its sites kept."""
        self._seen = defaultdict(list)
        with replaced(self._forwards()):
            yield self._seen[threading.get_ident()]

    def begin(self) -> list[Seen]:
        """An empty list of what this thread's next calls keep, which may have had another part of a step before."""
        seen = self._seen[threading.get_ident()] = []
        return seen

    def density(self, seen: list[Seen]) -> Tensor:
        """Kept share of all sites together, by the bytes that they decide on."""
        return torch.stack([each.share * self.weights[each.site] for each in seen]).sum()

    def shift(self, shift: float) -> None:
        """Take `shift` from every logit from now on."""
        for unit in self.units.values():
            unit.shift = shift

    def site_plans(self, tokens: Tensor, density: float, shift: float) -> Plan:
        """The present gates as a plan whose density on windows [N, S] is `density`: all logits are shifted together, by
        false position from `shift`. The shift that was set before stands again.
        """
        before = {site: unit.shift for site, unit in self.units.items()}

        def excess_at(more: float) -> tuple[float, dict[Site, float]]:
            by_site = self.densities(tokens, shift + more)
            return sum(by_site[site] * weight for site, weight in self.weights.items()) - density, by_site

        by_site = at_zero(excess_at)
        plan = {site: unit.site_plan(by_site[site], self.plan[site].edits) for site, unit in self.units.items()}
        for site, unit in self.units.items():
            unit.shift = before[site]
        return plan

    @torch.no_grad()
    def densities(self, tokens: Tensor, shift: float) -> dict[Site, float]:
        """Kept share by site on windows [N, S] with `shift` taken from every logit; the shift stays set."""
        self.shift(shift)
        total = dict.fromkeys(self.units, 0.0)
        with self.masking() as seen:
            for rows in tokens.split(AT_ONCE):
                seen.clear()
                self.model.get_decoder()(input_ids=rows.to(self.model.device), use_cache=False)
                for each in seen:
                    total[each.site] += len(rows) * float(each.share)
        return {site: share / len(tokens) for site, share in total.items()}

    def merged(self) -> dict[str, Tensor]:
        """The updated weights by their names in the model, fp32; none where no weight is trained."""
        modules = dict(self.models.student.named_modules())
        return {f"{name}.weight": update.merged(modules[name].weight) for name, update in self.updates.items()}

    def _forwards(self) -> dict[Any, Any]:
        """What the modules of `model` compute that a plan's site or an update changes."""
        forwards: dict[Any, Any] = {}
        for site in self.units:
            if site.kind == "ffn":
                module = self.model.get_submodule(self.arch.ffn_module(site.layer))
                forwards[module] = partial(self._network, site, module)
        gated = {site.layer for site in self.units if site.kind != "ffn"}
        parts = {name: rows for layer in gated for name, rows in linear_parts(self.model, self.arch, layer).items()}
        masked = {name for name, rows in parts.items() if any(site in self.units for site in rows)}
        for name in {*self.updates, *masked}:
            module = self.model.get_submodule(name)
            forwards[module] = partial(self._linear, module, self.updates.get(name), parts.get(name))
        return forwards

    def _network(self, site: Site, module: nn.Module, x: Tensor) -> Tensor:
        """The output [B, S, d] of a gated feed-forward module."""
        unit, arch = self.units[site], self.arch
        parts = ffn_parts(module, arch, self.models.activation, x)
        hidden = _hidden(unit, x.detach()) if "fc2" in unit.tensors else None
        seen, toggles, kept = self._kept(site, unit, parts.z, unit.logits(hidden, parts.gate.detach()))
        y = ffn_down(module, arch, kept)
        if "residual" in unit.tensors:
            y = y + _hidden(unit, x) @ unit.tensors["residual"].to(x.dtype)
        if "offset" in unit.tensors:
            y = y + unit.tensors["offset"].to(x.dtype)
        if site in self.worth and torch.is_grad_enabled():
            dense = ffn_down(module, arch, parts.z.detach()).detach().float()
            energy = (dense - y.float()).square().sum((-2, -1)) + toggles
            seen.lost = self.worth[site] * (energy / dense.square().sum((-2, -1)).clamp_min(1e-20)).mean()
        return y

    def _kept(self, site: Site, unit: Unit, values: Tensor, logits: Tensor) -> tuple[Seen, Tensor, Tensor]:
        """What was seen, the energy by which single masks change the lost one, and the values [B, S, n] that logits
        keep.
        """
        if unit.shift:
            logits = logits - unit.shift
        pull: list[tuple[float, float]] = []
        kept, share, toggles = _Masked.apply(values, logits, self.norms.get(site), pull)
        seen = Seen(site, share, share.new_zeros(()), pull)
        self._seen[threading.get_ident()].append(seen)
        return seen, toggles, kept

    def _linear(self, module: Any, update: Update | None, parts: Mapping[Site, slice] | None, x: Tensor) -> Tensor:
        """The output of a linear map with masks on the inputs of its parts, and with its update."""
        whole_map = {None: slice(None)} if parts is None else parts
        outputs = []
        for site, rows in whole_map.items():
            unit = None if site is None else self.units.get(site)
            kept = x if unit is None or site is None else self._kept(site, unit, x, unit.logits(None, x.detach()))[2]
            if update is None:
                bias = None if module.bias is None else module.bias[rows]
                outputs.append(F.linear(kept, module.weight[rows], bias))
            else:
                outputs.append(update.product(kept, module.weight, module.bias, rows))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _hidden(unit: Unit, x: Tensor) -> Tensor:
    """relu(fc1 x) [..., r] of the network's input."""
    return F.relu(F.linear(x / unit.scale, unit.tensors["fc1"].to(x.dtype)))


def _governed(plan: Plan, models: Models) -> dict[Site, float]:
    """By site the share of the bytes that its density decides on, of those of all sites."""
    arch, config = models.arch, models.student.config
    sizes = site_parameters(plan, arch, config)
    bytes_ = {
        site: sizes[site] * (site_cost(plan, site, arch, config, 1.0) - site_cost(plan, site, arch, config, 0.0))
        for site in plan
    }
    return {site: size / sum(bytes_.values()) for site, size in bytes_.items()}


def _updates(models: Models, tune: Tune, seed: int) -> dict[str, Update]:
    """What is trained of the weights, by the name of its linear map."""
    if tune.updates == "none":
        return {}
    model, arch = models.student, models.arch
    updates = {}
    for name in block_linears(model, arch):
        weight = model.get_submodule(name).weight
        inside = tune.updates == "networks" and f".{arch.ffn.module}." in name
        updates[name] = whole(weight) if inside else low_rank(name, weight, tune.rank, seed)
    return updates


def _half(model: Any) -> Any:
    """The model with its parameters in bfloat16 and its buffers, rotary frequencies among them, as they are."""
    memo = {
        id(parameter): nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)

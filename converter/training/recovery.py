"""What training after a swapped activation minimises: the student's divergence from the dense source, and a penalty
that makes its activations sparse.

Loss = distill KL(dense || student) + lm NLL + hidden mean over blocks |h - h_dense|^2 / |h_dense|^2 + weight * penalty.
The penalty is a mean over sites of a smooth count of non-zero units, which pushes those near zero over it from either
side, or of mean|z| / rms z. Its weight grows along a line or ProSparse's sine curves; with a wished density it is a
controller's, which leads the share of non-zeros there along a geometric path and keeps it.

Predictors may be trained with the weights: the forward pass takes what they keep (logit > 0), the backward pass the
sigmoid's slope; a second controller holds their density.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...runtime_onnx.ops.activation import cuts_up, split_activation
from ..arch import Arch
from ..arch.site import Site
from ..modeling.blocks import ffn_activation, ffn_down, ffn_products, parts_of
from ..modeling.distributed import in_bf16, sum_over_processes
from ..modeling.losses import MLP_MARGIN, dejavu_loss, kl_divergence, straight_through
from ..modeling.taps import replaced, tapped_outputs
from .inputs import Models
from .optimizers import Trained
from .settings import Joint, Penalty, Recovery, Settings
from .unit import Unit

SOURCE = (
    "Turbo Sparse, arXiv 2406.05955 (dReLU, predictors trained with the weights); ProSparse, arXiv 2402.13516 (growing "
    "L1); Hinton et al., arXiv 1503.02531",
    "KL(dense || student) + weight(step) * mean over sites of mean sigmoid(margin / softness), or of mean|z| / rms z",
    "distillation from the dense source in place of a corpus; a count of units, or an L1 norm relative to the rms, so "
    "that shrinking z does not pay",
)
PROPORTIONAL, INTEGRAL = 5.0, 0.1
"""Of the price of what predictors keep: nats per unit of excess density, and per unit of excess and step."""
_GAIN, _REACTION = 0.03, 1.0  # relative change of the weight a step and at once, for a density twice the wished one
_MEMORY = 0.9  # of the running mean of the density
_SUMS = ("count", "soft", "nonzero", "absolute", "square", "gate", "up")
_MEMORISED = ("weight", "begin", "mean", "price")
_SHARE = 0.2  # of non-zero units, before any was seen
_LABELS = 0.1  # weight of the predictors' cross-entropy on what is non-zero


def grown(penalty: Penalty, progress: float) -> float:
    """The weight of the penalty at `progress` of the run, 0 to 1, as a share of the last one.

    `sine`: in `periods` equal parts it rises from one multiple of 1 / periods to the next along half a cosine
    (ProSparse, arXiv 2402.13516, equation 4).
    """
    inside = min(1.0, progress / penalty.ramp)
    if penalty.shape == "linear" or inside == 1.0:
        return inside
    part, within = divmod(inside * penalty.periods, 1.0)
    return (part + 0.5 * (1 - math.cos(math.pi * within))) / penalty.periods


def predicted_path(joint: Joint, progress: float) -> float:
    """The density that predictors are led to at `progress` of the run, 0 to 1."""
    share = min(1.0, progress / joint.ramp)
    return joint.density**share if joint.path == "geometric" else 1 + (joint.density - 1) * share


@dataclass
class _Pending:
    """What a controller has not used yet: it is led once a step, by the mean of the micro-batches since."""

    total: float = 0.0
    count: int = 0
    step: int = -1

    def add(self, value: float, step: int) -> float | None:
        """The mean at the first micro-batch of a step, None at the others."""
        self.total, self.count = self.total + value, self.count + 1
        if step == self.step:
            return None
        mean = self.total / self.count
        self.total, self.count, self.step = 0.0, 0, step
        return mean


class RecoveryObjective:
    """The objective of `loop.train` for a student whose networks have exact zeros.

    `trained` are the student's leaves by name, `units` predictors by site, trained too. The student's networks must
    already be swapped; a teacher is needed by the losses `distill` and `hidden` only. `hidden` names the trained
    matrices of hidden layers, and `watch` is called after every step for more figures.
    """

    def __init__(
        self,
        models: Models,
        recovery: Recovery,
        settings: Settings,
        trained: Mapping[str, Tensor],
        units: Mapping[Site, Unit] | None = None,
        hidden: Collection[str] = (),
        watch: Callable[[int], dict[str, float]] | None = None,
    ) -> None:
        student, teacher, arch = models.student, models.teacher, models.arch
        self.models, self.recovery, self.settings = models, recovery, settings
        self.trained, self.units = dict(trained), dict(units or {})
        self.modules = {site: student.get_submodule(arch.ffn_module(site.layer)) for site in arch.sites(student.config)}
        self.device = next(student.parameters()).device
        self.half = in_bf16(recovery.precision, self.device)
        self.weight = recovery.penalty.weight
        self.begin, self.mean, self.price, self.predicted = 0.0, 0.0, 0.0, 1.0
        self.pending = {"density": _Pending(), "excess": _Pending()}
        self.figures: dict[str, float] = {}
        self.micro_batches: list[dict[str, float]] = []
        self.step = -1
        self.scales: dict[Site, tuple[float, float]] = {}
        self.hidden, self.watch = frozenset(hidden), watch
        self.began, self.spent, self.used = time.process_time(), 0.0, 0.0
        self.blocks = _blocks(student, arch) if recovery.losses.hidden else []
        self.dense_blocks = _blocks(teacher, arch) if recovery.losses.hidden and teacher is not None else []

    def parameters(self) -> Mapping[str, Trained]:
        """Every weight at the same rate, and predictors at theirs."""
        weights = {name: Trained(tensor, 1.0, name in self.hidden) for name, tensor in self.trained.items()}
        share = 1.0 if self.recovery.predictors is None else self.recovery.predictors.rate / self.recovery.rate
        return weights | {
            f"{site.key}.{name}": Trained(tensor, share)
            for site, unit in self.units.items()
            for name, tensor in unit.tensors.items()
        }

    def loss(self, tokens: Tensor, mask: Tensor, step: int) -> Tensor:
        """The scalar loss of windows [B, S], padding masked [B, S]."""
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        losses = self.recovery.losses
        keywords = {"attention_mask": None if bool(mask.all()) else mask.long(), "use_cache": False}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            dense, targets, outputs = None, list[Tensor](), list[Tensor]()
            if self.models.teacher is not None:
                with torch.no_grad(), tapped_outputs(dict.fromkeys(self.dense_blocks, targets.append)):
                    dense = self.models.teacher(input_ids=tokens, **keywords).logits
            with self.observing(mask) as seen, tapped_outputs(dict.fromkeys(self.blocks, outputs.append)):
                logits = self.models.student(input_ids=tokens, **keywords).logits
        total, self.figures = logits.new_zeros((), dtype=torch.float32), {}
        self.micro_batches = [*(self.micro_batches if step == self.step else []), self.figures]
        self.step = step
        if dense is not None and losses.distill:
            total = total + losses.distill * self._shown("kl", kl_divergence(dense, logits, mask))
        if losses.lm:
            follows = mask[:, 1:] & mask[:, :-1]
            nll = F.cross_entropy(logits[:, :-1][follows].float(), tokens[:, 1:][follows], reduction="sum")
            count = sum_over_processes(torch.stack([follows.sum(), mask.sum()]).float())
            total = total + losses.lm * self._shown("lm", nll / mask.sum() * (count[1] / count[0]))
        if targets:
            energies = torch.stack([t[mask].float().square().sum() for t in targets] + [mask.sum().float()])
            energies = sum_over_processes(energies)
            pairs = zip(outputs, targets, energies[:-1] / energies[-1], strict=True)
            hidden = torch.stack(
                [(h[mask].float() - t[mask].float()).square().sum() / mask.sum() / energy for h, t, energy in pairs]
            ).mean()
            total = total + losses.hidden * self._shown("hidden", hidden)
        return total + self._penalty(seen, step) + self._selection(seen, step)

    def _shown(self, name: str, value: Tensor) -> Tensor:
        self.figures[name] = float(value.detach())
        return value

    def _penalty(self, seen: Mapping[Site, Mapping[str, Tensor]], step: int) -> Tensor:
        """The weighted sparsity term. Sums go over all processes before ratios are formed, so that several give the
        gradient of one joint batch.
        """
        sums = {name: torch.stack([at[name] for at in seen.values()]) for name in _SUMS}
        joint = dict(
            zip(_SUMS, sum_over_processes(torch.stack([part.detach() for part in sums.values()])), strict=True)
        )
        count = joint["count"]
        share = 1 / sums["count"]  # the loop weighs every process's mean by its positions
        density = float((joint["nonzero"] / count).mean())
        if self.recovery.penalty.kind == "count":
            value, shown = (sums["soft"] * share).mean(), (joint["soft"] / count).mean()
        else:
            mean, square = joint["absolute"] / count, (joint["square"] / count).clamp_min(1e-20)
            # the ratio's gradient, linear in this process's sums
            value = ((sums["absolute"] / square.sqrt() - sums["square"] * mean / (2 * square**1.5)) * share).mean()
            shown = (mean / square.sqrt()).mean()
        for site, gate, up, number in zip(seen, joint["gate"], joint["up"], count, strict=True):
            self.scales[site] = (float(gate / number) ** 0.5, float(up / number) ** 0.5)
        self._steer(density, step)
        self.figures |= {"penalty": float(shown), "density": density}
        return self._weight(step) * (value + (shown - value).detach())

    def _steer(self, density: float, step: int) -> None:
        """The controller's memory, once a step: running mean of the density, and the weight."""
        mean = self.pending["density"].add(density, step)
        if mean is None:
            return
        density = mean
        if self.begin == 0.0:
            self.begin = self.mean = density
        self.mean = _MEMORY * self.mean + (1 - _MEMORY) * density
        if self.recovery.penalty.density is not None:
            self.weight *= math.exp(_GAIN * max(-1.0, min(1.0, self.mean / self.path(step) - 1)))

    def path(self, step: int) -> float:
        """The density that the controller wants in a step."""
        wished = self.recovery.penalty.density
        assert wished is not None
        share = grown(self.recovery.penalty, (step + 1) / self.settings.steps)
        return math.exp((1 - share) * math.log(max(self.begin, 1e-6)) + share * math.log(wished))

    def _weight(self, step: int) -> float:
        if self.recovery.penalty.density is None:
            return self.recovery.penalty.weight * grown(self.recovery.penalty, (step + 1) / self.settings.steps)
        return self.weight * (1 + _REACTION * max(-0.5, min(1.0, self.mean / self.path(step) - 1)))

    def _selection(self, seen: Mapping[Site, Mapping[str, Tensor]], step: int) -> Tensor:
        """The price of what predictors keep, and their cross-entropy on what is non-zero."""
        if not self.units:
            return next(iter(seen.values()))["absolute"].new_zeros(())
        joint = self.recovery.predictors
        assert joint is not None
        kept = torch.stack([at["kept"] for at in seen.values()]).mean()
        weight = next(iter(seen.values()))["count"]
        both = sum_over_processes(torch.stack([kept.detach() * weight, weight]))
        self.predicted = float(both[0] / both[1])
        excess = self.predicted - predicted_path(joint, (step + 1) / self.settings.steps)
        self.price = max(0.0, self.price + INTEGRAL * (self.pending["excess"].add(excess, step) or 0.0))
        self.figures |= {"predicted": self.predicted, "price": self.price}
        labelled = torch.stack([at["labelled"] for at in seen.values()]).mean()
        return max(0.0, self.price + PROPORTIONAL * excess) * kept + _LABELS * labelled

    @contextmanager
    def observing(self, mask: Tensor) -> Iterator[dict[Site, dict[str, Tensor]]]:
        """The student with its networks' sums written down; yields them by site, over the unpadded positions of mask
        [B, S].
        """
        seen: dict[Site, dict[str, Tensor]] = {}
        with replaced({module: self._forward(site, module, mask, seen) for site, module in self.modules.items()}):
            yield seen

    def _forward(self, site: Site, module: nn.Module, mask: Tensor, seen: dict[Site, dict[str, Tensor]]) -> Any:
        whole = bool(mask.all())
        known = self.scales.get(site)  # now: a checkpointed block calls again when they have changed
        weight = (self.mean or _SHARE) + MLP_MARGIN

        def forward(x: Tensor) -> Tensor:
            before, up = ffn_products(module, self.models.arch, x)
            name = ffn_activation(module, self.models.activation)
            gate, _, z = parts_of(name, before, up)
            rows = slice(None) if whole else mask
            sums = self._sums(known, name, before[rows], None if up is None else up[rows], z[rows])
            if site in self.units:
                unit = self.units[site]
                inner = F.relu((x.detach() / unit.scale) @ unit.tensors["fc1"].T)
                logits = unit.logits(inner, gate)
                labels = (z != 0).float().detach()
                kept = straight_through(logits)
                z = z * kept.to(z.dtype)
                if not whole:
                    logits, labels, kept = logits[mask], labels[mask], kept[mask]
                sums |= {"kept": kept.mean(), "labelled": dejavu_loss(logits, labels, weight)}
            seen[site] = sums
            return ffn_down(module, self.models.arch, z)

        return forward

    def _sums(
        self, known: tuple[float, float] | None, name: str, before: Tensor, up: Tensor | None, z: Tensor
    ) -> dict[str, Tensor]:
        """What a site's call adds to the penalty's sums, from the products [T, n] and z [T, n]."""
        kind, cut = split_activation(name)
        wide, gate = z.float(), before.float()
        up = torch.ones_like(gate) if up is None else up.float()
        squares = gate.detach().square().sum(), up.detach().square().sum()
        if known is None:
            joint = sum_over_processes(torch.stack([*squares, squares[0].new_tensor(float(gate.numel()))]))
            known = float(joint[0] / joint[2]) ** 0.5, float(joint[1] / joint[2]) ** 0.5
        margin = (gate - cut) / max(known[0], 1e-10)
        if cuts_up(kind):
            margin = torch.minimum(margin, up / max(known[1], 1e-10))
        return {
            "soft": torch.sigmoid(margin / self.recovery.penalty.softness).sum(),
            "nonzero": (z != 0).sum().float(),
            "gate": squares[0],
            "up": squares[1],
            "absolute": wide.abs().sum(),
            "square": wide.square().sum(),
            "count": squares[0].new_tensor(float(z.numel())),
        }

    def after(self, step: int) -> dict[str, float]:
        """The step's losses in nats, the penalty and densities, means over its micro-batches, and the
        penalty's weight.
        """
        figures = {
            name: sum(each[name] for each in self.micro_batches) / len(self.micro_batches) for name in self.figures
        }
        watched = {} if self.watch is None else self.watch(step)
        self.used = self.cpu_seconds
        return figures | {"weight": self._weight(step)} | watched

    def state(self) -> dict[str, float]:
        """The controllers' memory, the scales of the last step, and the processor seconds so far."""
        state = {name: getattr(self, name) for name in _MEMORISED} | {"cpu_seconds": self.used}
        state |= {
            f"{name} {part}": float(getattr(each, part))
            for name, each in self.pending.items()
            for part in ("total", "count")
        }
        for site, (gate, up) in self.scales.items():
            state |= {f"{site.key} gate": gate, f"{site.key} up": up}
        return state

    def restore(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""
        for name in _MEMORISED:
            setattr(self, name, float(state[name]))
        self.pending = {
            name: _Pending(float(state[f"{name} total"]), int(state[f"{name} count"])) for name in self.pending
        }
        self.began, self.spent = time.process_time(), float(state["cpu_seconds"])
        self.scales = {
            site: (float(state[f"{site.key} gate"]), float(state[f"{site.key} up"]))
            for site in self.modules
            if f"{site.key} gate" in state
        }

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all processes in all runs that the present one goes on from, up to what they stored; all
        call this together.
        """
        return self.spent + float(
            sum_over_processes(torch.tensor(time.process_time() - self.began, dtype=torch.float64))
        )


def _blocks(model: Any, arch: Arch) -> list[nn.Module]:
    return list(model.get_submodule(arch.block.rpartition(".")[0]))

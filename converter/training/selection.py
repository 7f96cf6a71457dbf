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

import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...runtime_onnx.errors import InputError
from ..arch import Arch
from ..arch.site import Site
from ..checkpoint.plan import Entry, Plan, Predictor, Swap, Threshold, deciding, load_plan, save_plan
from ..checkpoint.stage import Header, atomic_folder, is_finished, write_json
from ..methods.tune import Tune
from ..modeling.blocks import down_rows, ffn_down, ffn_parts
from ..modeling.distributed import multiplies_bf16
from ..modeling.losses import kl_divergence, sigmoid_slope
from ..modeling.processes import keep_freed_memory
from ..progress import resumed
from ..text.windows import Batches
from .loop import train
from .settings import Settings

PROPORTIONAL, INTEGRAL = 5.0, 0.1
"""Nats per unit of excess density, and per unit of excess and step."""
_STEEPNESS = 4.0  # logit of a gate value of twice its threshold
_NEVER = 1e4  # threshold in place of an infinite one
_ASIDE, _ASIDE_MOST = 16, 32  # every 16th window, about 32 at most, is kept for setting densities
_SHIFTS, _REACH, _REACH_MOST, _TOLERANCE = (
    24,
    0.5,
    4096.0,
    0.002,
)  # false position: trials, logits to one side at first and at most, density
_TOGETHER = 8  # windows
_NOISE = 0.01  # relative energy


@dataclass
class Unit:
    """What is trained at one site: `fc1` [r, d], `fc2` [n, r] and `bias` [n] of a predictor, or `bias` [n] of a gate,
    logit = |act(gate)| * steep - bias; `residual` [r, d] where there is one. fc1 works on x / `scale`, which has rms 1,
    so that one rate serves all. `shift` is taken from every logit.
    """

    tensors: dict[str, Tensor]
    steep: Tensor | None
    scale: float
    shift: float = 0.0

    def logits(self, hidden: Tensor | None, gate: Tensor) -> Tensor:
        """Logits [..., n] fp32, before the shift, from relu(fc1 x) [..., r] or act(gate) [..., n]."""
        if self.steep is None:
            assert hidden is not None
            return (hidden @ self.tensors["fc2"].T).float() + self.tensors["bias"]
        return gate.float().abs() * self.steep - self.tensors["bias"]

    def entry(self, density: float) -> Entry:
        """The plan's entry: bias and shift as thresholds."""
        t = {
            name: tensor.detach().cpu().clone() / (self.scale if name == "fc1" else 1.0)
            for name, tensor in self.tensors.items()
        }
        if self.steep is None:
            return Predictor(t["fc1"], t["fc2"], self.shift - t["bias"], density, t.get("residual"))
        return Threshold("gate", (t["bias"] + self.shift) / self.steep.cpu(), density, t.get("fc1"), t.get("residual"))


def make_unit(entry: Entry, device: torch.device, scale: float) -> Unit:
    """The trained form of a plan's entry at a site whose inputs have the rms `scale`."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, torch.float32).clone(memory_format=torch.contiguous_format).requires_grad_()

    if isinstance(entry, Predictor):
        tensors, steep = {"fc1": leaf(entry.fc1 * scale), "fc2": leaf(entry.fc2), "bias": leaf(-entry.tau)}, None
    else:
        assert isinstance(entry, Threshold)
        tau = entry.tau.to(device, torch.float32)
        never = torch.isinf(tau)  # a neuron whose up projection is always 0
        steep = torch.where(never, 1.0, _STEEPNESS / tau.clamp_min(1e-4))
        tensors = {"bias": leaf(torch.where(never, _NEVER, tau * steep))}
        if entry.fc1 is not None:
            tensors["fc1"] = leaf(entry.fc1 * scale)
    if entry.residual is not None:
        tensors["residual"] = leaf(entry.residual)
    return Unit(tensors, steep, scale)


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


@dataclass
class _Part:
    """Windows of a step that one thread takes, [b, S], with their padding masked: their share of the step's windows,
    and of its positions; how many threads its operations may take.
    """

    tokens: Tensor
    mask: Tensor
    share: float
    positions: float
    threads: int


@dataclass
class _Pass:
    """What a part adds to the divergence, and its lost energy and density."""

    divergence: Tensor
    lost: Tensor
    density: Tensor
    part: _Part

    def value(self, weights: Tensor) -> Tensor:
        """What it adds to the loss that weighs the three so."""
        return weights[0] * self.divergence + self.part.share * (weights[1] * self.lost + weights[2] * self.density)

    def gradients(self, weights: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        """Of `value`, by leaf."""
        torch.set_num_threads(self.part.threads)
        return torch.autograd.grad(self.value(weights), leaves)


class _Known(torch.autograd.Function):
    """A value of leaves whose gradients are there already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(outer[0] * gradient for gradient in ctx.gradients)


class EndToEnd:
    """The objective of `loop.train` for the feed-forward sites of a plan; `targets` are the densities that the levels
    of the run end at, `start` the one that it begins with.

    `probe` [N, S] are a few windows that inputs are scaled by. The model's weights are never changed and get no
    gradients; the divergence is from `teacher`, where there is one, else from the model with everything kept.
    """

    def __init__(
        self,
        model: Any,
        arch: Arch,
        activation: str,
        plan: Plan,
        settings: Settings,
        targets: Sequence[float],
        start: float,
        local: float,
        half: bool,
        probe: Tensor,
        teacher: Any | None = None,
    ) -> None:
        self.model, self.arch, self.activation = model, arch, activation
        self.teacher = teacher
        self.settings, self.targets, self.local, self.half = settings, [start, *targets], local, half
        scales = input_rms(model, arch, [site for site in plan if site.kind == "ffn"], probe)
        self.units = {site: make_unit(deciding(plan[site]), model.device, scale) for site, scale in scales.items()}
        self.swaps: dict[Site, list[Entry]] = {
            site: [entry for entry in plan[site] if isinstance(entry, Swap)] for site in scales
        }
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
        tokens, mask = tokens.to(self.model.device), mask.to(self.model.device)
        parts, threads = self._parts(tokens, mask), torch.get_num_threads()
        with ThreadPoolExecutor(len(parts)) as pool:
            try:
                dense = list(pool.map(self._dense, parts))
                with self.masking():
                    passes = list(pool.map(self._masked, parts, dense))
                del dense
                density = float(sum(each.density.detach() * each.part.share for each in passes))
                excess = density - self.target(step)
                self.price = max(0.0, self.price + INTEGRAL * excess)
                weights = torch.tensor(
                    [1.0, self.local, max(0.0, self.price + PROPORTIONAL * excess)], device=tokens.device
                )
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
        loss: Tensor = _Known.apply(value, [sum(each) for each in zip(*gradients, strict=True)], *leaves)
        return loss

    def _parts(self, tokens: Tensor, mask: Tensor) -> list[_Part]:
        """The windows of a step, shared out among threads: short operations do not fill several, windows do. On a GPU
        all windows are one part.
        """
        count = min(len(tokens), torch.get_num_threads()) if self.model.device.type == "cpu" else 1
        threads, kept = max(1, torch.get_num_threads() // count), int(mask.sum())
        rows = zip(tokens.tensor_split(count), mask.tensor_split(count), strict=True)
        return [
            _Part(own, which, len(own) / len(tokens), int(which.sum()) / max(1, kept), threads) for own, which in rows
        ]

    def _logits(self, model: Any, part: _Part) -> Tensor:
        attention = None if bool(part.mask.all()) else part.mask.long()
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.half):
            logits: Tensor = model(input_ids=part.tokens, attention_mask=attention, use_cache=False).logits
        return logits

    def _dense(self, part: _Part) -> Tensor:
        torch.set_num_threads(part.threads)
        with torch.no_grad():
            return self._logits(self.teacher or self.model, part)

    def _masked(self, part: _Part, dense: Tensor) -> _Pass:
        """The divergence, lost energy and density of a part, with their graph."""
        torch.set_num_threads(part.threads)
        seen = self._seen[threading.get_ident()] = []  # a thread may have had another part before
        sparse = self._logits(self.model, part)
        divergence = kl_divergence(dense, sparse, part.mask) * part.positions if part.positions else sparse.sum() * 0.0
        return _Pass(
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
        modules = {site: self.model.get_submodule(self.arch.ffn_module(site.layer)) for site in self.units}
        try:
            for site, module in modules.items():
                module.forward = self._forward(site, module)
            yield self._seen[threading.get_ident()]
        finally:
            for module in modules.values():
                module.__dict__.pop("forward", None)

    def _forward(self, site: Site, module: nn.Module) -> Any:
        unit = self.units[site]

        def forward(x: Tensor) -> Tensor:
            parts = ffn_parts(module, self.arch, self.activation, x)
            hidden = F.relu((x / unit.scale) @ unit.tensors["fc1"].T) if "fc1" in unit.tensors else None
            logits = unit.logits(hidden, parts.gate)
            if unit.shift:
                logits = logits - unit.shift
            trained = torch.is_grad_enabled()
            kept, share, toggles = _Masked.apply(parts.z, logits, self.norms[site] if trained else None)
            y = ffn_down(module, self.arch, kept)
            if hidden is not None and "residual" in unit.tensors:
                y = y + hidden @ unit.tensors["residual"]
            if trained:
                dense = ffn_down(module, self.arch, parts.z.detach()).float()
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
            found = self.densities(tokens, shift)
            return sum(found.values()) / len(found) - density, found

        found = _settled(excess_at)
        plan: Plan = {site: [*self.swaps[site], unit.entry(found[site])] for site, unit in self.units.items()}
        for unit in self.units.values():
            unit.shift = 0.0
        return plan

    @torch.no_grad()
    def densities(self, tokens: Tensor, shift: float) -> dict[Site, float]:
        """Kept share by site on windows [N, S] with `shift` taken from every logit; the shift stays set."""
        for unit in self.units.values():
            unit.shift = shift
        total = torch.zeros(len(self.units))
        with self.masking() as seen:
            for rows in tokens.split(_TOGETHER):
                seen.clear()
                self.model.get_decoder()(input_ids=rows.to(self.model.device), use_cache=False)
                total += len(rows) * torch.stack([share for share, _ in seen]).cpu()
        return dict(zip(self.units, (total / len(tokens)).tolist(), strict=True))


def train_plan(
    model: Any,
    arch: Arch,
    activation: str,
    plan: Plan,
    start: float,
    densities: Sequence[float],
    batches: Batches,
    tune: Tune,
    seed: int,
    folder: Path,
    header: Header,
    teacher: Any | None = None,
) -> list[Plan]:
    """Train the feed-forward entries of `plan` and return one plan per density in `densities`, which one run visits in
    turn; other sites stay as they are.

    `start` is the density that the run begins with (1 for a fresh predictor). Every plan's density holds on windows
    that were not trained on. State, levels and curve are stored below `folder` under `header`, so an interrupted run
    goes on to the same result. Raises InputError for a plan without feed-forward sites and for too few windows.
    """
    if not any(site.kind == "ffn" for site in plan):
        raise InputError(
            "A plan to train must gate a feed-forward network, got "
            f"{', '.join(site.key for site in plan) or 'no site'}. Take another method."
        )
    header = header.model_copy(
        update={
            "config": header.config
            | {"tune": tune.model_dump(mode="json"), "densities": list(densities), "plan": _hash(plan)}
        }
    )
    folders = [folder / f"level_{k}" for k in range(len(densities))]
    curve_file = folder / "curve.json"
    if not all(is_finished(place, header) for place in folders) or not curve_file.is_file():
        full = batches.tokens[batches.mask.all(1)]
        aside = full[:: max(_ASIDE, len(full) // _ASIDE_MOST)]
        kept = [k for k in range(len(batches.tokens)) if not bool((batches.tokens[k] == aside).all(1).any())]
        if not len(aside) or not kept:
            found = f"{len(full)} full ones of {len(batches.tokens)}"
            raise InputError(
                f"Training end to end must have a full window to set densities on and others to train on, got {found}. "
                "Give more text."
            )
        curve_file.unlink(missing_ok=True)
        keep_freed_memory()
        settings = Settings(tune.steps * len(densities), tune.windows, tune.rate, levels=len(densities), seed=seed)
        half = tune.precision == "bf16" or (tune.precision == "auto" and multiplies_bf16(model.device))
        objective = EndToEnd(
            model, arch, activation, plan, settings, densities, start, tune.local, half, aside[:4], teacher
        )

        def at_level(level: int) -> None:
            with atomic_folder(folders[level]) as partial:
                save_plan(partial, objective.plan(aside, densities[level]), header)

        curve = train(
            objective, Batches(batches.tokens[kept], batches.mask[kept]), settings, folder / "state", header, at_level
        )
        write_json(curve_file, {"rows": curve})
    else:
        resumed()
    untrained = {site: entries for site, entries in plan.items() if site.kind != "ffn"}
    return [untrained | load_plan(place) for place in folders]


def _settled(excess_at: Callable[[float], tuple[float, dict[Site, float]]]) -> dict[Site, float]:
    """The second value at the shift where the first, which falls with it, is zero within the tolerance, or nearest to
    that after the last trial. Every trial costs passes through the model, so it is the Illinois method (false position,
    Dahlquist and Bjorck 1974) from 0, with a bisection every third time.
    """
    here, (excess, found) = 0.0, excess_at(0.0)
    ends = {excess > 0: (here, excess)}
    reach = _REACH if excess > 0 else -_REACH
    while abs(excess) >= _TOLERANCE and len(ends) < 2 and abs(reach) <= _REACH_MOST:
        here = reach
        excess, found = excess_at(here)
        ends[excess > 0] = (here, excess)
        reach *= 4
    for trial in range(_SHIFTS if len(ends) == 2 else 0):
        if abs(excess) < _TOLERANCE:
            break
        (low, above), (high, below) = ends[True], ends[False]
        here = (low + high) / 2 if trial % 3 == 2 else low + (high - low) * above / (above - below)
        positive = excess > 0
        excess, found = excess_at(here)
        if (excess > 0) == positive:  # the end that stays counts half, so that it moves too
            other = ends[not positive]
            ends[not positive] = (other[0], other[1] / 2)
        ends[excess > 0] = (here, excess)
    return found


@torch.no_grad()
def input_rms(model: Any, arch: Arch, sites: Sequence[Site], tokens: Tensor) -> dict[Site, float]:
    """Root mean square of the feed-forward inputs by site, on windows [N, S]."""
    found: dict[Site, float] = {}

    def hook(site: Site) -> Any:
        return lambda module, inputs: found.__setitem__(
            site, float(inputs[0].float().square().mean().sqrt().clamp_min(1e-6))
        )

    handles = [model.get_submodule(arch.ffn_module(site.layer)).register_forward_pre_hook(hook(site)) for site in sites]
    try:
        model(input_ids=tokens.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def noise_costs(model: Any, arch: Arch, sites: Sequence[Site], tokens: Tensor) -> dict[Site, float]:
    """Nats of divergence per unit of relative noise energy in one layer's feed-forward output, by site: KL / _NOISE
    under Gaussian noise of energy _NOISE * |y|^2 a token, on windows [N, S].
    """
    tokens = tokens.to(model.device)
    dense = model(input_ids=tokens, use_cache=False).logits
    generator = torch.Generator().manual_seed(0)

    def hook(module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        noise = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
        return y + noise * (_NOISE**0.5 * y.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))

    found = {}
    for site in sites:
        handle = model.get_submodule(arch.ffn_module(site.layer)).register_forward_hook(hook)
        try:
            found[site] = float(kl_divergence(dense, model(input_ids=tokens, use_cache=False).logits)) / _NOISE
        finally:
            handle.remove()
    return found


def _hash(plan: Plan) -> str:
    """Sha256 (hex) of a plan's tensors."""
    digest = hashlib.sha256()
    for site, entries in plan.items():
        for entry in entries:
            for role, tensor in entry.tensors().items():
                digest.update(f"{site.key}.{role}".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()

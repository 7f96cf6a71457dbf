"""What is trained at a site: a predictor, or thresholds on gates or inputs, in the form that gradients work on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.plan import Edit, Gate, Predictor, Residual, SitePlan, Threshold

_STEEPNESS = 4.0  # logit of a gate value of twice its threshold
_NEVER = 1e4  # threshold in place of an infinite one


@dataclass
class Unit:
    """What is trained at one site: `fc1` [r, d], `fc2` [n, r] and `bias` [n] of a predictor, or `bias` [n] of
    thresholds, logit = |value| * steep - bias, where the value is act(gate) or a linear map's input by `score`;
    `residual` [r, d] and `offset` [d] where there is one. fc1 works on x / `scale`, which has rms 1, so that one rate
    serves all. `shift` is taken from every logit.
    """

    tensors: dict[str, Tensor]
    steep: Tensor | None
    scale: float
    score: str = "predictor"
    shift: float = 0.0

    def logits(self, hidden: Tensor | None, values: Tensor) -> Tensor:
        """Logits [..., n] fp32, before the shift, from relu(fc1 x) [..., r], or from act(gate) or x [..., n]."""
        if self.steep is None:
            assert hidden is not None
            return (hidden @ self.tensors["fc2"].to(hidden.dtype).T).float() + self.tensors["bias"]
        return values.float().abs() * self.steep - self.tensors["bias"]

    def site_plan(self, density: float, edits: tuple[Edit, ...] = ()) -> SitePlan:
        """The site's plan behind `edits`: bias and shift as thresholds."""
        t = {
            name: tensor.detach().cpu().clone() / (self.scale if name == "fc1" else 1.0)
            for name, tensor in self.tensors.items()
        }
        if self.steep is None:
            gate: Gate = Predictor(t["fc1"], t["fc2"], self.shift - t["bias"], density)
        else:
            gate = Threshold(self.score, (t["bias"] + self.shift) / self.steep.cpu(), density)
        fc1 = None if self.steep is None else t.get("fc1")
        return SitePlan(edits, gate, Residual(t["residual"], fc1) if "residual" in t else None, t.get("offset"))


def make_unit(entry: SitePlan, device: torch.device, scale: float) -> Unit:
    """The trained form of the gate and the residual of a site whose inputs have the rms `scale`."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, torch.float32).clone(memory_format=torch.contiguous_format).requires_grad_()

    gate, residual = entry.gate, entry.residual
    if isinstance(gate, Predictor):
        tensors, steep = {"fc1": leaf(gate.fc1 * scale), "fc2": leaf(gate.fc2), "bias": leaf(-gate.tau)}, None
    else:
        assert isinstance(gate, Threshold)
        tau = gate.tau.to(device, torch.float32)
        never = torch.isinf(tau)  # a neuron whose up projection, or a channel whose weights are always 0
        steep = torch.where(never, 1.0, _STEEPNESS / tau.clamp_min(1e-4))
        tensors = {"bias": leaf(torch.where(never, _NEVER, tau * steep))}
        if residual is not None and residual.fc1 is not None:
            tensors["fc1"] = leaf(residual.fc1 * scale)
    if residual is not None:
        tensors["residual"] = leaf(residual.weight)
    if entry.offset is not None:
        tensors["offset"] = leaf(entry.offset)
    return Unit(tensors, steep, scale, gate.score)

"""What is trained at a site: a predictor, or a gate's thresholds, in the form that gradients work on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.plan import Entry, Predictor, Threshold

_STEEPNESS = 4.0  # logit of a gate value of twice its threshold
_NEVER = 1e4  # threshold in place of an infinite one


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

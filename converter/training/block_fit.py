"""What is minimised for one block: the distance of what a student's network adds from what the dense block gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arch import Arch
from ..modeling.blocks import ffn_down, ffn_parts
from ..modeling.linalg import Gram
from .optimizers import Trained
from .signs import energy_by_sign, flip
from .walk import TOKENS_AT_ONCE, Half

_L2 = 1e-3  # relative to the mean square of z


class Rows(NamedTuple):
    """What a network sees and must give, [R, d] from `windows` windows, and the mean square of what the dense network
    adds.
    """

    x: Half
    target: Half
    energy: float
    windows: int


@dataclass(frozen=True)
class Tail:
    """What a block does to its network's output m before it adds it: factor * norm(m), the norm absent in most
    architectures; `linear` without one.
    """

    norm: Any | None
    factor: float
    linear: bool

    def __call__(self, m: Tensor) -> Tensor:
        """What is added for m [..., d]."""
        return self.factor * (m if self.norm is None else self.norm(m))


class Fit:
    """The objective of `loop.train` for one network: tail(network(x)) against what the block must add to the student's
    hidden states.

    A window's tokens are numbers of rows of `x` and `target` [R, d]. The error is relative to `energy`, the mean square
    of what the dense network adds; `l1` weighs mean|z| / rms z, `half` lets products run in bfloat16.
    """

    def __init__(
        self, network: Any, arch: Arch, activation: str, tail: Tail, rows: Rows, l1: float = 0.0, half: bool = False
    ) -> None:
        self.network, self.arch, self.activation, self.tail = network, arch, activation, tail
        self.rows, self.l1, self.half = rows, l1, half
        self.device = next(network.parameters()).device
        self.figures: dict[str, float] = {}

    def parameters(self) -> Mapping[str, Trained]:
        """The network's weights and biases, at the same rate."""
        return {name: Trained(parameter, hidden=True) for name, parameter in self.network.named_parameters()}

    def added(self, at: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Of some rows z [T, n], the network's output and what the block adds, both [T, d]."""
        z = ffn_parts(self.network, self.arch, self.activation, self.rows.x[at].to(self.device)).z
        out = ffn_down(self.network, self.arch, z)
        return z, out, self.tail(out)

    def loss(self, tokens: Tensor, mask: Tensor, step: int) -> Tensor:
        """The relative error and the penalty for numbers of rows [B, G]."""
        at = tokens.flatten()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            z, _, added = self.added(at)
        error = (added.float() - self.rows.target[at].to(self.device)).square().mean() / self.rows.energy
        self.figures = {"error": float(error.detach())}
        if not self.l1:
            return error
        return error + self.l1 * z.float().abs().mean() / z.float().square().mean().sqrt().clamp_min(1e-12)

    def after(self, step: int) -> dict[str, float]:
        """The error of the step's rows."""
        return self.figures

    def state(self) -> dict[str, float]:
        """Nothing is carried from step to step."""
        return {}

    def restore(self, state: dict[str, float]) -> None:
        """Nothing to restore."""

    @torch.no_grad()
    def measure(self, numbers: Tensor) -> tuple[float, float]:
        """The relative error over rows, given their numbers [T], and the share of z that is not 0."""
        error = nonzero = 0.0
        for at in numbers.split(TOKENS_AT_ONCE):
            z, _, added = self.added(at)
            error += float((added - self.rows.target[at].to(self.device)).double().square().mean(1).sum())
            nonzero += float((z != 0).float().mean(1).sum())
        return error / len(numbers) / self.rows.energy, nonzero / len(numbers)

    def turn(self) -> None:
        """Flip the neurons whose energy, with the dense model's activation, is larger where up is negative."""
        chunks = torch.arange(len(self.rows.x.values)).split(TOKENS_AT_ONCE)
        sums = sum(
            energy_by_sign(self.network, self.arch, self.activation, self.rows.x[at].to(self.device)) for at in chunks
        )
        assert isinstance(sums, Tensor)
        flip(self.network, self.arch, sums[1] > sums[0])

    @torch.no_grad()
    def solve_down(self, numbers: Tensor, l2: float = _L2) -> None:
        """Move the down projection, with its bias, to the ridge regression's solution on rows, given their numbers [T]:
        the least change that explains what is missing, `l2` relative to the mean square of z. Only for a linear tail.
        """
        linear = getattr(self.network, self.arch.ffn.down)
        units = linear.weight.shape[1]
        gram = Gram.empty(units + (linear.bias is not None), linear.weight.shape[0])
        for at in numbers.split(TOKENS_AT_ONCE):
            z, out, _ = self.added(at)
            regressors = z if linear.bias is None else torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
            gram.add(regressors, self.rows.target[at].to(self.device) / self.tail.factor - out)
        change = gram.solve(l2 * float(gram.hidden.diagonal()[:units].mean())).to(linear.weight)
        linear.weight += change[:units].T
        if linear.bias is not None:
            linear.bias += change[units]

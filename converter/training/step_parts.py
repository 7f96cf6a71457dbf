"""The windows of a training step shared out among threads: short operations do not fill several, windows do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class StepPart:
    """Windows of a step that one thread takes, [b, S], with their padding masked: their share of the step's windows,
    and of its positions; how many threads its operations may take.
    """

    tokens: Tensor
    mask: Tensor
    share: float
    positions: float
    threads: int


@dataclass
class StepPass:
    """What a part adds to the divergence, and its lost energy and density."""

    divergence: Tensor
    lost: Tensor
    density: Tensor
    part: StepPart

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


def known(value: Tensor, gradients: list[Tensor], leaves: list[Tensor]) -> Tensor:
    """`value`, a scalar whose gradients by leaf are there already."""
    loss: Tensor = _Known.apply(value, gradients, *leaves)
    return loss


def split_step(tokens: Tensor, mask: Tensor, device: torch.device) -> list[StepPart]:
    """The windows [B, S] of a step with their padding masked, one part a thread. On a GPU all windows are one part."""
    count = min(len(tokens), torch.get_num_threads()) if device.type == "cpu" else 1
    threads, positions = max(1, torch.get_num_threads() // count), int(mask.sum())
    rows = zip(tokens.tensor_split(count), mask.tensor_split(count), strict=True)
    return [
        StepPart(part, unpadded, len(part) / len(tokens), int(unpadded.sum()) / max(1, positions), threads)
        for part, unpadded in rows
    ]

"""Prompt statistic: how much a neuron took part in the prompt's tokens, fixed for all that follows."""

from __future__ import annotations

from torch import Tensor

from . import Context

SOURCE = ("GRIFFIN, arXiv 2404.01365", "s_i = norm over prompt tokens of z_ti / norm(z_t)", "none")
NEEDS = ("z", "prompt")
PHASE = "prompt"


def score(context: Context) -> Tensor:
    """The prompt's statistic for every token: [T, n]. z gives only the shape."""
    assert context.z is not None and context.prompt is not None
    return context.prompt.expand_as(context.z)


def statistic(z: Tensor) -> Tensor:
    """Norm over tokens of z_t / norm(z_t), for the prompt's z [..., P, n]: [..., n]. A token whose z is all zero adds
    nothing.
    """
    return (z / z.norm(dim=-1, keepdim=True).clamp_min(1e-30)).norm(dim=-2)

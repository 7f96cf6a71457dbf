"""Gate thresholds: one threshold a layer at the quantile of |act(gate)| that keeps the target share. No training."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..arch import Arch
from ..plans import Plan, Threshold, uniform_tau
from ..stats import Stats
from ..stats.histogram import edges

SOURCE = ("CATS, arXiv 2404.08763", "tau = quantile of |act(gate)| over tokens and units", "bins of constant relative width in place of a fixed range")
NEEDS = ("histogram:gate",)


class Config(BaseModel):
    """`sparsity`: the share of gated neurons to skip, in every layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    sparsity: float = Field(default=0.5, gt=0, lt=1)


def plan(stats: Stats, arch: Arch, config: Config) -> Plan:
    """A Threshold on the gate for every site; the calibrated density is what the histogram holds above tau."""
    found: Plan = {}
    for site, tensors in stats.items():
        tau, density = cut(tensors["histogram:gate.count"], 1.0 - config.sparsity)
        found[site] = [Threshold("gate", uniform_tau(tau, int(tensors["histogram:gate.units"])), density)]
    return found


def cut(count: Tensor, density: float) -> tuple[float, float]:
    """The threshold above which the share `density` of a histogram lies, and the share really above it.

    Inside its bin the threshold is interpolated linearly; a bin of exact zeros is never split, since a score must exceed its threshold.
    """
    total = int(count.sum())
    above = count.flip(0).cumsum(0).flip(0)
    wanted = density * total
    bin_ = int((above >= wanted).nonzero().max()) if bool((above >= wanted).any()) else 0
    if bin_ == 0:
        return 0.0, float(above[1]) / total
    low, high = edges(bin_, bin_ + 2).tolist()
    inside = (wanted - float(above[bin_ + 1] if bin_ + 1 < len(above) else 0)) / max(1.0, float(count[bin_]))
    tau = torch.tensor(high - inside * (high - low), dtype=torch.float32).item()
    return tau, wanted / total

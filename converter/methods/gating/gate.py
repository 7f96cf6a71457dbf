"""Gate thresholds: one threshold a layer at the quantile of |act(gate)| that keeps the target share. No training."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ...arch import Arch
from ...checkpoint.plan import Plan, Threshold, uniform_tau
from ...stats import Stats, of_kind
from ...stats.bins import cut
from ..thresholds import Densities, densities_of

SOURCE = (
    "CATS, arXiv 2404.08763",
    "tau = quantile of |act(gate)| over tokens and units",
    "bins of constant relative width in place of a fixed range",
)
NEEDS = ("histogram:gate",)


class Config(BaseModel):
    """`sparsity`: the share of gated neurons to skip, in every layer; `densities` sets kept shares of single layers by
    site key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    densities: Densities | None = None


def plan(stats: Stats, arch: Arch, config: Config) -> Plan:
    """A Threshold on the gate for every site; the calibrated density is what the histogram holds above tau."""
    sites = of_kind(stats, "ffn")
    found: Plan = {}
    for site, wanted in densities_of(sites, config.sparsity, config.densities).items():
        tau, density = cut(sites[site]["histogram:gate.count"], wanted)
        found[site] = [Threshold("gate", uniform_tau(tau, int(sites[site]["histogram:gate.units"])), density)]
    return found

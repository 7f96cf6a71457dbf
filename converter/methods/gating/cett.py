"""Gate thresholds of equal harm: every layer drops the same share of its output's norm, so layers find their own
densities. No training.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ...arch import Arch
from ...checkpoint.plan import Plan, SitePlan, Threshold, uniform_tau
from ...stats import Stats, of_kind
from ...stats.bins import cut
from ..thresholds import one_cett, share_at

SOURCE = (
    "ReLU2 Wins, arXiv 2402.03804; Sparsing Law, arXiv 2411.02335",
    "one CETT = mean norm(sum of dropped z_i w_down_i) / norm(sum of all) for all layers, by bisection",
    "the threshold is on |act(gate_i)|, known before up and down, instead of norm(z_i w_down_i); the CETT meets a "
    "target density instead of a perplexity",
)
NEEDS = ("histogram:gate", "dropped:gate")


class Config(BaseModel):
    """`sparsity`: the mean share of gated neurons to skip over all layers. `cett` fixes the relative norm to drop
    instead; the density follows then.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    cett: float | None = Field(default=None, gt=0, lt=1)


def plan(stats: Stats, arch: Arch, config: Config) -> Plan:
    """A Threshold on the gate for every site, at the share whose CETT is the common one."""
    sites = of_kind(stats, "ffn")
    curves = {site: (tensors["dropped:gate.share"], tensors["dropped:gate.error"]) for site, tensors in sites.items()}
    common = config.cett or one_cett(list(curves.values()), config.sparsity)
    thresholds: Plan = {}
    for site, (share, error) in curves.items():
        tau, density = cut(sites[site]["histogram:gate.count"], 1.0 - share_at(share, error, common))
        thresholds[site] = SitePlan(
            gate=Threshold("gate", uniform_tau(tau, int(sites[site]["histogram:gate.units"])), density)
        )
    return thresholds

"""Gate thresholds: one threshold a layer at the quantile of |act(gate)| that keeps the target share. No training."""

from __future__ import annotations

from ...arch import Arch
from ...checkpoint.plan import Plan, SitePlan, Threshold, uniform_tau
from ...stats import Stats, of_kind
from ...stats.bins import cut
from ..thresholds import NeuronShare as Config
from ..thresholds import densities_of

SOURCE = (
    "CATS, arXiv 2404.08763",
    "tau = quantile of |act(gate)| over tokens and units",
    "bins of constant relative width in place of a fixed range",
)
NEEDS = ("histogram:gate",)


def plan(stats: Stats, arch: Arch, config: Config) -> Plan:
    """A Threshold on the gate for every site; the calibrated density is what the histogram holds above tau."""
    sites = of_kind(stats, "ffn")
    thresholds: Plan = {}
    for site, wanted in densities_of(sites, config.sparsity, config.densities).items():
        tau, density = cut(sites[site]["histogram:gate.count"], wanted)
        thresholds[site] = SitePlan(
            gate=Threshold("gate", uniform_tau(tau, int(sites[site]["histogram:gate.units"])), density)
        )
    return thresholds

"""Gate thresholds of every neuron: one constant a layer on gate_i^2 E[up_i^2], which is a threshold of its own on
|act(gate_i)|. No training.
"""

from __future__ import annotations

from ...arch import Arch
from ...checkpoint.plan import Plan, SitePlan, Threshold
from ...stats import Stats, of_kind
from ..thresholds import NeuronShare as Config
from ..thresholds import chess_taus, densities_of

SOURCE = (
    "CHESS, arXiv 2409.01366",
    "tau_i = sqrt(c / E[up_i^2]), c = quantile of gate^2 E[up^2] over tokens and units",
    "neurons only: the inputs of q and o stay dense (method teal covers those); histograms in place of sorted samples",
)
NEEDS = ("unit_histogram:gate",)


def plan(stats: Stats, arch: Arch, config: Config) -> Plan:
    """A Threshold on the gate with tau [n] of every site; the calibrated density is what the histograms
    hold above tau.
    """
    sites = of_kind(stats, "ffn")
    thresholds: Plan = {}
    for site, wanted in densities_of(sites, config.sparsity, config.densities).items():
        tau, density = chess_taus(
            sites[site]["unit_histogram:gate.count"], sites[site]["unit_histogram:gate.up_moment"], wanted
        )
        thresholds[site] = SitePlan(gate=Threshold("gate", tau, density))
    return thresholds

"""Gate thresholds trained end to end: every neuron's own threshold on |act(gate)|, all layers jointly. Begins from
CHESS thresholds of the same density.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ...arch import Arch
from ...checkpoint.plan import Plan, SitePlan, Threshold
from ...stats import Stats, of_kind
from ..thresholds import Allocation, Densities, chess_taus, densities_of
from ..tune import Tune

SOURCE = (
    "CHESS, arXiv 2409.01366, for the start; straight-through gradients, arXiv 1308.3432",
    "tau_i minimises KL(dense || sparse) at a mean density",
    "thresholds are trained and not set by a quantile",
)
NEEDS = ("unit_histogram:gate",)


class Config(BaseModel):
    """`sparsity`: the share of gated neurons to skip over all layers together; `allocation` and `densities` how layers
    share it before the training, as in chess; `tune` how the thresholds are trained; `residual` adds a head for what is
    skipped, of a twentieth of the network's weights, in closed form (ridge, after the training) or from there trained
    together with the thresholds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    allocation: Allocation = "uniform"
    densities: Densities | None = None
    seed: int = 0
    tune: Tune = Tune(steps=60, rate=2e-3)
    residual: Literal["none", "ridge", "trained"] = "trained"


def start(config: Config) -> float:
    """The density of `plan`: the wished one, since short training moves thresholds little."""
    return 1.0 - config.sparsity


def plan(stats: Stats, arch: Arch, config: Config) -> Plan:
    """CHESS thresholds at the mean density `start`, to be trained."""
    thresholds: Plan = {}
    sites = of_kind(stats, "ffn")
    for site, wanted in densities_of(sites, config.sparsity, config.densities).items():
        tau, density = chess_taus(
            sites[site]["unit_histogram:gate.count"], sites[site]["unit_histogram:gate.up_moment"], wanted
        )
        thresholds[site] = SitePlan(gate=Threshold("gate", tau, density))
    return thresholds

"""Input thresholds trained end to end: every channel's own threshold on |x_j|, all linear maps jointly. Begins from
TEAL's greedy split of the same density.
"""

from __future__ import annotations

from ...arch import Arch
from ...checkpoint.plan import Plan
from ...stats import Stats
from ..thresholds import ChannelShare, plan_linears
from ..tune import Tune

SOURCE = (
    "TEAL, arXiv 2408.14690, for the start; straight-through gradients, arXiv 1308.3432",
    "tau_j minimises KL(dense || sparse) at a mean density",
    "thresholds are trained, together with low-rank updates of the weights, and not set by a quantile",
)
NEEDS = ("histogram:input", "scale:input")


class Config(ChannelShare):
    """As `ChannelShare` for the thresholds that the training begins with; `sparsity` then holds for all linears of all
    layers together. `tune` says how thresholds and updates are trained.
    """

    seed: int = 0
    tune: Tune = Tune(steps=300, rate=1e-3, update_rate=5e-4)


def more_needs(config: Config) -> tuple[str, ...]:
    """The greedy path, where it is asked for."""
    return ("greedy:input",) if config.follows_path else ()


def start(config: Config) -> float:
    """The density of `plan`: the wished one."""
    return 1.0 - config.sparsity


def plan(stats: Stats, arch: Arch, config: Config) -> Plan:
    """TEAL's thresholds at the mean density `start`, to be trained."""
    return plan_linears(stats, "input", config)

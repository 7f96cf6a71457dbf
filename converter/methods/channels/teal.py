"""Input sparsity of linears: one threshold on |x_j| a linear, at the quantile of the target share or of the block's
greedy split. No training.
"""

from __future__ import annotations

from ...arch import Arch
from ...checkpoint.plan import Plan
from ...stats import Stats
from ..thresholds import ChannelShare as Config
from ..thresholds import plan_linears

SOURCE = (
    "TEAL, arXiv 2408.14690",
    "keep x_j when |x_j| > tau, tau = quantile of |x| of each linear; greedy split of a block's sparsity over its "
    "linears",
    "quantiles of |x| itself, no symmetry assumed; every position is masked; the split's error is relative to each "
    "token's output",
)
NEEDS = ("histogram:input", "scale:input")


def more_needs(config: Config) -> tuple[str, ...]:
    """The greedy path, where it is asked for."""
    return ("greedy:input",) if config.follows_path else ()


def plan(stats: Stats, arch: Arch, config: Config) -> Plan:
    """A Threshold on the input of every chosen linear, one value repeated [d_in]."""
    return plan_linears(stats, "input", config)

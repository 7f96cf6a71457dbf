"""Input sparsity of linears, channels weighted by the norm of the weights they meet: a threshold on |x_j| norm(W[:,
j]). No training.
"""

from __future__ import annotations

from ...arch import Arch
from ...checkpoint.plan import Plan
from ...stats import Stats
from ..thresholds import ChannelShare as Config
from ..thresholds import plan_linears

SOURCE = (
    "WINA, arXiv 2505.19427",
    "keep x_j when |x_j| norm2(W[:, j]) > tau, stored as tau_j = tau / norm2(W[:, j]) on |x_j|",
    "a calibrated threshold a linear in place of a top-k a token; real norms for up and down as well; no rotation",
)
NEEDS = ("histogram:wina", "scale:wina")


def more_needs(config: Config) -> tuple[str, ...]:
    """The greedy path, where it is asked for."""
    return ("greedy:wina",) if config.follows_path else ()


def plan(stats: Stats, arch: Arch, config: Config) -> Plan:
    """A Threshold on the input of every chosen linear, tau [d_in]; a channel whose weights are all 0 is never kept."""
    return plan_linears(stats, "wina", config)

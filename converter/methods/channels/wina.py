"""Input sparsity of linears, channels weighted by the norm of the weights they meet: a threshold on |x_j| norm(W[:,
j]). No training.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ...arch import Arch
from ...checkpoint.plan import Plan
from ...stats import Stats
from ..thresholds import Densities, Linear, plan_linears

SOURCE = (
    "WINA, arXiv 2505.19427",
    "keep x_j when |x_j| norm2(W[:, j]) > tau, stored as tau_j = tau / norm2(W[:, j]) on |x_j|",
    "a calibrated threshold a linear in place of a top-k a token; real norms for up and down as well; no rotation",
)
NEEDS = ("histogram:wina", "scale:wina")


class Config(BaseModel):
    """`sparsity`: the mean share of weights to skip in the chosen `linears` (None: all of a block), in every block.

    `greedy` lets a block's linears differ by TEAL's greedy split, else all have the same share. `densities` sets kept
    shares by site key, or of a block's mean by `layers.<i>`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    linears: tuple[Linear, ...] | None = Field(default=None, min_length=1)
    greedy: bool = True
    densities: Densities | None = None


def more_needs(config: Config) -> tuple[str, ...]:
    """The greedy path, where it is asked for."""
    return ("greedy:wina",) if config.greedy else ()


def plan(stats: Stats, arch: Arch, config: Config) -> Plan:
    """A Threshold on the input of every chosen linear, tau [d_in]; a channel whose weights are all 0 is never kept."""
    return plan_linears(stats, "wina", config.sparsity, config.linears, config.greedy, config.densities)

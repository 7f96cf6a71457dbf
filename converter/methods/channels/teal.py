"""Input sparsity of linears: one threshold on |x_j| a linear, at the quantile of the target share or of the block's
greedy split. No training.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ...arch import Arch
from ...checkpoint.plan import Plan
from ...stats import Stats
from ..thresholds import Densities, Linear, plan_linears

SOURCE = (
    "TEAL, arXiv 2408.14690",
    "keep x_j when |x_j| > tau, tau = quantile of |x| of each linear; greedy split of a block's sparsity over its "
    "linears",
    "quantiles of |x| itself, no symmetry assumed; every position is masked; the split's error is relative to each "
    "token's output",
)
NEEDS = ("histogram:input", "scale:input")


class Config(BaseModel):
    """`sparsity`: the mean share of weights to skip in the chosen `linears` (None: all of a block), in every block.

    `greedy` lets a block's linears differ by the greedy split, else all have the same share. `densities` sets kept
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
    return ("greedy:input",) if config.greedy else ()


def plan(stats: Stats, arch: Arch, config: Config) -> Plan:
    """A Threshold on the input of every chosen linear, one value repeated [d_in]."""
    return plan_linears(stats, "input", config.sparsity, config.linears, config.greedy, config.densities)

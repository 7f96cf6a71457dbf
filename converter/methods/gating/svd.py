"""Predictors in closed form: a truncated SVD says from the block's input which neurons to keep. No training."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ...arch import Arch
from ...checkpoint.plan import Plan, SitePlan
from ...modeling.predictor import rank_for
from ...progress import track
from ...stats import Stats, of_kind
from ..low_rank import LabelScore, Moments, low_rank_predictor

SOURCE = (
    "SVD predictors, arXiv 2603.14110; reduced-rank regression, Izenman 1975",
    "logit = P2 relu(P1 x) of rank r from the SVD of whitened moments; tau keeps a share, or finds a share of the "
    "labels",
    "the score of a neuron is regressed on x in place of w_gate x, which says what is kept only where an activation "
    "cuts one side off",
)
NEEDS = ("moments:{score}",)


class Config(BaseModel):
    """`sparsity`: the share of neurons to skip, in every layer.

    `rank` r, or None for the largest whose weights cost at most `cost` of the network's. `score` is what is regressed.
    With `recall`, thresholds keep so large a share of the neurons that the score's top `1 - sparsity` holds, whatever
    that keeps besides.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    rank: int | None = Field(default=None, ge=1)
    cost: float = Field(default=0.1, gt=0, lt=1)
    recall: float | None = Field(default=None, gt=0, lt=1)
    score: LabelScore = "abs_z"


def rank(config: Config, hidden: int, units: int, matrices: int) -> int:
    """The rank of the predictors beside networks of `matrices` matrices [n, d]."""
    return config.rank or rank_for(hidden, units, matrices, config.cost)


def plan(stats: Stats, arch: Arch, config: Config) -> Plan:
    """A Predictor for every site. Raises InputError when a site saw too few tokens."""
    predictors: Plan = {}
    for site, tensors in track(of_kind(stats, "ffn").items(), unit="site"):
        moments = Moments.of(tensors, config.score, 1.0 - config.sparsity)
        width = rank(config, *moments.samples.sizes, arch.matrices)
        predictors[site] = SitePlan(gate=low_rank_predictor(moments, width, config.recall))
    return predictors

"""The order in which a block's linears bear input sparsity best: the path of TEAL's greedy split, measured at the
block's output.

Thresholds are quantiles of the score over all tokens; the path is found afterwards, on the few tokens that stay in
memory with the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..arch.site import Site
from . import Probe, StatSetup
from .bins import BINS, bins, cut, greedy_split

FIELDS = ("scale",)


def init(setup: StatSetup) -> dict[str, Any]:
    """An empty histogram of the score; `size` is the linear's number of weights."""
    return {"count": torch.zeros(BINS, dtype=torch.int64), "size": setup.units * setup.outputs}


def update(state: dict[str, Any], x: Tensor, score: Tensor, positions: Tensor) -> None:
    """Count the scores [T, d_in]; the field `scale` [d_in] is the score of an input of 1."""
    state["count"] += torch.bincount(bins(score).flatten().cpu(), minlength=BINS)
    state["scale"] = state["fields"]["scale"]


def settle(states: Mapping[Site, dict[str, Any]], probe: Probe, score: str) -> None:
    """Walk the path with the block in memory; a token's error counts relative to its output, so that no token outweighs
    the others.
    """
    named = {site.kind.removeprefix("linear:"): state for site, state in states.items()}
    dense = probe.block({})
    size = dense.square().sum(-1).clamp_min(1e-30)

    @cache  # a step changes one linear's share
    def tau(name: str, share: float) -> Tensor:
        return cut(named[name]["count"], 1.0 - share)[0] / named[name]["scale"]

    def error(shares: Mapping[str, float]) -> float:
        taus = {name: tau(name, share) for name, share in shares.items() if share > 0}
        return float(((probe.block(taus) - dense).square().sum(-1) / size).mean())

    path = greedy_split({name: state["size"] for name, state in named.items()}, error)
    for column, state in zip(path.T, named.values(), strict=True):
        state["path"] = column.float().contiguous()


def finish(state: dict[str, Any]) -> dict[str, Tensor]:
    """{"path": the linear's dropped share along the block's path, fp32 [steps + 1]}."""
    return {"path": state["path"]}

"""What thresholds on a neuron score drop: the relative norm of the dropped neurons' sum (CETT) at a grid of dropped
shares.

Thresholds are quantiles of the score over all tokens; the norms are measured afterwards, on the few tokens that stay in
memory with the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..arch.site import Site
from . import Probe, StatSetup
from .bins import BINS, bins, cut, dropped_norm

SHARES = torch.cat([torch.arange(1, 32) / 32, torch.tensor([0.98, 0.99])])


def init(setup: StatSetup) -> dict[str, Any]:
    """An empty histogram of the score."""
    return {"count": torch.zeros(BINS, dtype=torch.int64)}


def update(state: dict[str, Any], x: Tensor, score: Tensor, positions: Tensor) -> None:
    """Count the scores [T, n]."""
    state["count"] += torch.bincount(bins(score).flatten().cpu(), minlength=BINS)


def settle(states: Mapping[Site, dict[str, Any]], probe: Probe, score: str) -> None:
    """Measure every share of the grid with the layer's network in memory."""
    (state,) = states.values()
    scores, z, w_down = probe.neurons(score)
    taus = [cut(state["count"], 1.0 - share)[0] for share in SHARES.tolist()]
    state["error"] = torch.tensor([dropped_norm(z, w_down, scores > tau) for tau in taus])
    state["share"] = torch.tensor([float((scores <= tau).float().mean()) for tau in taus])


def finish(state: dict[str, Any]) -> dict[str, Tensor]:
    """{"share": the dropped shares [L], "error": the relative norm that each drops [L]}, both fp32."""
    return {"share": state["share"], "error": state["error"]}

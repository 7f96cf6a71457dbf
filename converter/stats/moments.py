"""First and second moments of a site's input and of a score's root, and a few tokens apart from them, for predictors in
closed form.

The root is that of the score relative to its mean over the token's units. Tokens at every `stride`-th position are kept
whole in fp16 and left out of the moments, so thresholds are set on tokens that nothing was fitted to; the choice
depends neither on batches nor on workers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import StatSetup

ROWS = 2048
"""Tokens that are kept whole, at most."""
_STRIDE = 8  # at least: short texts keep an eighth
_FP16_MAX = 65504.0


def init(setup: StatSetup) -> dict[str, Any]:
    """Sums of x [d], the root t [n], x^T x [d, d] and x^T t [d, n] in fp64, and no rows."""
    hidden, units = setup.hidden, setup.units
    sums = {"mean": (hidden,), "target": (units,), "square": (hidden, hidden), "shared": (hidden, units)}
    return {
        "count": 0,
        "sums": {name: torch.zeros(shape, dtype=torch.float64) for name, shape in sums.items()},
        "stride": max(_STRIDE, -(-setup.tokens // ROWS)),
        "rows": [],
    }


def update(state: dict[str, Any], x: Tensor, score: Tensor, positions: Tensor) -> None:
    """Add tokens x [T, d] with scores [T, n], at least 0; positions [T] count tokens over all windows."""
    whole = positions % state["stride"] == 0
    if bool(whole.any()):
        state["rows"].append((positions[whole].cpu(), _half(x, whole), _share(score, whole)))
    at = (~whole).to(x.device)
    entered, target = x[at].float(), root(score[at])
    state["count"] += len(entered)
    sums = state["sums"]
    for name, part in (
        ("mean", entered.sum(0, dtype=torch.float64)),
        ("target", target.sum(0, dtype=torch.float64)),
        ("square", entered.T @ entered),
        ("shared", entered.T @ target),
    ):
        sums[name] = sums[name].to(x.device).add_(part)


def finish(state: dict[str, Any]) -> dict[str, Tensor]:
    """{"mean": [d], "target": [n], "covariance": of x [d, d], "shared": covariance of x and the root [d, n], all fp32;
    "x": [K, d], "score": [K, n] as a share of the token's largest, both fp16, by position; "count" int64 [] of all
    tokens}.
    """
    count = max(1, state["count"])
    mean, target, square, shared = (
        state["sums"][name].cpu() / count for name in ("mean", "target", "square", "shared")
    )
    positions, x, score = (torch.cat(parts) for parts in zip(*state["rows"], strict=True))
    order = positions.argsort()
    tensors = {
        "mean": mean,
        "target": target,
        "covariance": square - mean.outer(mean),
        "shared": shared - mean.outer(target),
    }
    stored = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    return stored | {
        "x": x[order],
        "score": score[order],
        "count": torch.tensor(state["count"] + len(x)),
    }


def root(score: Tensor) -> Tensor:
    """The root of scores [T, n] relative to their mean over the token's units, fp32."""
    values = score.float()
    return (values / values.mean(dim=1, keepdim=True).clamp_min(1e-30)).sqrt()


def _half(x: Tensor, at: Tensor) -> Tensor:
    return x[at.to(x.device)].clamp(-_FP16_MAX, _FP16_MAX).half().cpu()


def _share(score: Tensor, at: Tensor) -> Tensor:
    picked = score[at.to(score.device)]
    return (picked / picked.amax(dim=1, keepdim=True).clamp_min(1e-30)).half().cpu()

"""Activation predictors: a two-layer network per site that says from the block's input which neurons a score would keep.

logit = P2 relu(P1 x) + b is trained by binary cross-entropy on the per-token top-k of the score; b and the threshold that meets the target density on
held-out tokens become tau, so that a neuron is kept when P2 relu(P1 x) > tau.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..arch import Arch
from ..artifact import InputError
from ..plans import Plan, Predictor
from ..stats import Stats

SOURCE = (
    "DejaVu, arXiv 2310.17157; PowerInfer, arXiv 2312.12456",
    "logit = P2 relu(P1 x)",
    "an output bias folded into the threshold; labels are the top-k of a score, because SwiGLU has no exact zeros; unweighted cross-entropy, the density is "
    "set by the threshold afterwards",
)
NEEDS = ("samples:{score}",)
_HELDOUT = 0.1  # share of the samples that thresholds and recall are measured on
_HELDOUT_ROWS = 4096  # at most: their logits [rows, n] are in memory at once


class Config(BaseModel):
    """How predictors are trained.

    `sparsity` is the share of neurons to skip, `score` makes the labels, `rank` is r (None: the largest r whose weights cost at most `cost` of the
    network's), `steps` of `batch` tokens, `rate` the peak learning rate.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    score: Literal["magnitude", "gate"] = "magnitude"
    rank: int | None = Field(default=None, ge=1)
    cost: float = Field(default=0.1, gt=0, lt=1)
    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=1024, ge=1)
    rate: float = Field(default=3e-3, gt=0)
    seed: int = 0


def plan(stats: Stats, arch: Arch, config: Config) -> Plan:
    """A trained Predictor for every site. Raises InputError when a site has too few samples to hold some out."""
    found: Plan = {}
    matrices = 2 if arch.ffn.kind == "plain" else 3
    with tqdm(total=len(stats) * config.steps, desc="train predictors", unit="step") as progress:
        for site, tensors in stats.items():
            x, score = tensors[f"samples:{config.score}.x"], tensors[f"samples:{config.score}.score"]
            if len(x) < 64:
                raise InputError(f"Predictors must be trained on at least 64 tokens a site, got {len(x)}. Give more calibration text.")
            rank = config.rank or rank_for(x.shape[1], score.shape[1], matrices, config.cost)
            found[site] = [_train(x, score, rank, config, site.layer, progress)]
    return found


def rank_for(hidden: int, units: int, matrices: int, cost: float = 0.1) -> int:
    """The largest r with r (d + n) <= cost * m d n, m matrices of [n, d]; at least 1."""
    return max(1, int(cost * matrices * hidden * units / (hidden + units)))


@dataclass(frozen=True)
class _Labels:
    """Top-k of the score as bool [T, n], made batch by batch."""

    score: Tensor
    k: int

    def rows(self, at: Tensor) -> Tensor:
        picked = self.score[at].float()
        return torch.zeros_like(picked).scatter_(1, picked.topk(self.k, dim=1).indices, 1.0)


def _train(x: Tensor, score: Tensor, rank: int, config: Config, layer: int, progress: tqdm) -> Predictor:
    units, hidden = score.shape[1], x.shape[1]
    density = 1.0 - config.sparsity
    labels = _Labels(score, max(1, round(density * units)))
    generator = torch.Generator().manual_seed(config.seed * 7919 + layer)
    order = torch.randperm(len(x), generator=generator)
    aside = min(int(len(x) * _HELDOUT), _HELDOUT_ROWS)
    heldout, train = order[:aside].sort().values, order[aside:]
    scale = float(x[train[:4096]].float().square().mean().sqrt().clamp_min(1e-6))
    fc1 = (torch.randn(rank, hidden, generator=generator) / (scale * hidden**0.5)).requires_grad_()
    fc2 = (torch.randn(units, rank, generator=generator) / rank**0.5).requires_grad_()
    bias = torch.full((units,), float(torch.logit(torch.tensor(density)))).requires_grad_()
    # fc1 works on inputs of size `scale`, so its rate shrinks by the same factor
    groups = [{"params": [fc1], "lr": config.rate / scale}, {"params": [fc2, bias], "lr": config.rate}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    warm = max(1, config.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warm, (config.steps - step) / max(1, config.steps - warm)))
    for _ in range(config.steps):
        at = train[torch.randint(len(train), (min(config.batch, len(train)),), generator=generator)]
        logits = F.relu(x[at].float() @ fc1.T) @ fc2.T + bias
        loss = F.binary_cross_entropy_with_logits(logits, labels.rows(at))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update()
    with torch.no_grad():
        return _settle(fc1.detach(), fc2.detach(), bias.detach(), x[heldout].float(), labels.rows(heldout).bool(), density)


def _settle(fc1: Tensor, fc2: Tensor, bias: Tensor, x: Tensor, wanted: Tensor, density: float) -> Predictor:
    """Fold bias and threshold into tau so that the held-out density meets the target; recall is the kept share of the wanted neurons."""
    raw = F.relu(x @ fc1.T) @ fc2.T
    shifted = (raw + bias).flatten()
    count = max(1, round(density * shifted.numel()))
    threshold = shifted.kthvalue(shifted.numel() - count).values if count < shifted.numel() else shifted.min() - 1
    tau = (threshold - bias).contiguous()
    kept = raw > tau
    return Predictor(fc1, fc2, tau, density=float(kept.float().mean()), recall=float((kept & wanted).sum() / wanted.sum()))

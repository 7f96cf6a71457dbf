"""Activation predictors: a two-layer network per site that says from the block's input which neurons to keep, when P2
relu(P1 x) > tau.

The default is trained end to end: `plan` gives fresh predictors that keep everything, and the training against the
dense model's distribution follows. The cheap form is trained by cross-entropy, layer by layer, on the per-token top-k
of a score; a bias and the threshold that meets the target density on held-out tokens become tau.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from ....runtime_onnx.errors import InputError
from ...arch import Arch
from ...checkpoint.plan import Plan, Predictor, SitePlan
from ...modeling.losses import dejavu_loss, dejavu_weight
from ...modeling.predictor import fresh_predictor, rank_for
from ...progress import track
from ...stats import Stats, of_kind
from ..tune import Tune

SOURCE = (
    "DejaVu, arXiv 2310.17157; PowerInfer, arXiv 2312.12456; straight-through gradients, arXiv 1308.3432",
    "logit = P2 relu(P1 x), or P2 P1 x (linear2)",
    "an output bias folded into the threshold; labels are the top-k of a score, because SwiGLU has no exact zeros; the "
    "density is set by the threshold",
)
NEEDS = ()
_HELDOUT = 0.1  # share of the samples that thresholds and recall are measured on
_HELDOUT_ROWS = 4096  # at most: their logits [rows, n] are in memory at once


class Config(BaseModel):
    """How predictors are trained.

    Attributes:
        sparsity: Share of neurons to skip.
        rank: r; None is the largest r whose weights cost at most `cost` of the network's.
        residual: Adds a head for what is skipped, which `cost` leaves out: in closed form (ridge), or from there
            trained too.
        tune: The training end to end.
        score: Of the cross-entropy only, as all that follow: makes the labels, an oracle's too.
        form: linear2 has no nonlinearity and is stored as an equal mlp2 of twice the rank.
        weighting: dejavu counts negatives by the share of positives.
        steps: Of `batch` tokens at peak `rate`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    loss: Literal["end_to_end", "cross_entropy"] = "end_to_end"
    rank: int | None = Field(default=None, ge=1)
    cost: float = Field(default=0.1, gt=0, lt=1)
    residual: Literal["none", "ridge", "trained"] = "none"
    seed: int = 0
    tune: Tune = Tune(rate=8e-3)
    score: Literal["magnitude", "abs_z", "gate", "gradient", "gxo", "snip", "fisher", "corrected_gxo"] = "magnitude"
    form: Literal["mlp2", "linear2"] = "mlp2"
    weighting: Literal["dejavu", "none"] = "dejavu"
    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=1024, ge=1)
    rate: float = Field(default=3e-3, gt=0)


def more_needs(config: Config) -> tuple[str, ...]:
    """Samples of the labels' score, or nothing but sizes."""
    return ("sizes:gate",) if config.loss == "end_to_end" else ("samples:{score}",)


def start(config: Config) -> float | None:
    """The density of `plan` where training end to end follows, else None."""
    return 1.0 if config.loss == "end_to_end" else None


def rank(config: Config, hidden: int, units: int, matrices: int) -> int:
    """The rank of the predictors beside networks of `matrices` matrices [n, d]."""
    return config.rank or rank_for(hidden, units, matrices, config.cost)


def plan_tokens(config: Config) -> int:
    """Tokens that `plan` trains every site on."""
    return config.steps * config.batch if config.loss == "cross_entropy" else 0


def plan(stats: Stats, arch: Arch, config: Config) -> Plan:
    """A Predictor for every site: fresh ones to be trained end to end, or ones trained by cross-entropy.

    Raises InputError when a site has too few samples to hold some out.
    """
    predictors: Plan = {}
    sites = of_kind(stats, "ffn")
    if config.loss == "end_to_end":
        for site, tensors in sites.items():
            hidden, units = int(tensors["sizes:gate.hidden"]), int(tensors["sizes:gate.units"])
            generator = torch.Generator().manual_seed(config.seed * 7919 + site.layer)
            width = rank(config, hidden, units, arch.matrices)
            predictors[site] = SitePlan(gate=fresh_predictor(hidden, units, width, generator))
        return predictors
    for site, tensors in track(sites.items(), unit="site"):
        x, score = tensors[f"samples:{config.score}.x"], tensors[f"samples:{config.score}.score"]
        if len(x) < 64:
            raise InputError(
                f"Predictors must be trained on at least 64 tokens a site, got {len(x)}. Give more calibration text."
            )
        width = rank(config, x.shape[1], score.shape[1], arch.matrices)
        predictors[site] = SitePlan(gate=_train(x, score, width, config, site.layer))
    return predictors


@dataclass(frozen=True)
class _Labels:
    """Top-k of the score as bool [T, n], made batch by batch."""

    score: Tensor
    k: int

    def rows(self, at: Tensor) -> Tensor:
        picked = self.score[at].float()
        return torch.zeros_like(picked).scatter_(1, picked.topk(self.k, dim=1).indices, 1.0)


def _train(x: Tensor, score: Tensor, rank: int, config: Config, layer: int) -> Predictor:
    units, hidden = score.shape[1], x.shape[1]
    density, linear = 1.0 - config.sparsity, config.form == "linear2"
    if linear:
        rank = max(1, rank // 2)  # the equal mlp2 has twice as many rows
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
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (config.steps - step) / max(1, config.steps - warm))
    )
    for _ in track(range(config.steps)):
        at = train[torch.randint(len(train), (min(config.batch, len(train)),), generator=generator)]
        inner = x[at].float() @ fc1.T
        logits, wanted = (inner if linear else F.relu(inner)) @ fc2.T + bias, labels.rows(at)
        loss = dejavu_loss(logits, wanted, dejavu_weight(wanted) if config.weighting == "dejavu" else 1.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        if linear:  # v = relu(v) - relu(-v)
            fc1, fc2 = torch.cat([fc1, -fc1]), torch.cat([fc2, -fc2], dim=1)
        return _settle(
            fc1.detach(), fc2.detach(), bias.detach(), x[heldout].float(), labels.rows(heldout).bool(), density
        )


def _settle(fc1: Tensor, fc2: Tensor, bias: Tensor, x: Tensor, wanted: Tensor, density: float) -> Predictor:
    """Fold bias and threshold into tau so that the held-out density meets the target; recall is the kept share of the
    wanted neurons.
    """
    raw = F.relu(x @ fc1.T) @ fc2.T
    shifted = (raw + bias).flatten()
    count = max(1, round(density * shifted.numel()))
    threshold = shifted.kthvalue(shifted.numel() - count).values if count < shifted.numel() else shifted.min() - 1
    tau = (threshold - bias).contiguous()
    kept = raw > tau
    return Predictor(
        fc1, fc2, tau, density=float(kept.float().mean()), recall=float((kept & wanted).sum() / wanted.sum())
    )

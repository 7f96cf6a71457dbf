"""Activation predictors: a two-layer network per site that says from the block's input which neurons to keep, when P2
relu(P1 x) > tau.

The default is trained end to end: `plan` gives fresh predictors that keep everything, and the training against the
dense model's distribution follows. The cheap form is trained by cross-entropy, layer by layer, on the per-token top-k
of a score; a bias and the threshold that meets the target density on held-out tokens become tau. The training end to
end may begin from the closed form of the method svd.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.nn import functional as F

from ...arch import Arch
from ...checkpoint.plan import Plan, Predictor, SitePlan
from ...modeling.losses import dejavu_loss, dejavu_weight
from ...modeling.predictor import fresh_predictor, rank_for
from ...progress import track
from ...stats import Stats, of_kind
from ..low_rank import LabelScore, Moments, Network, Samples, low_rank_predictor
from ..tune import Tune

SOURCE = (
    "DejaVu, arXiv 2310.17157; PowerInfer, arXiv 2312.12456; straight-through gradients, arXiv 1308.3432",
    "logit = P2 relu(P1 x), or P2 P1 x (linear2)",
    "an output bias folded into the threshold; labels are the top-k of a score, because SwiGLU has no exact zeros; the "
    "density is set by the threshold",
)
NEEDS = ()


class Config(BaseModel):
    """How predictors are trained.

    Attributes:
        sparsity: Share of neurons to skip.
        rank: r; None is the largest r whose weights cost at most `cost` of the network's.
        residual: Adds a head for what is skipped, which `cost` leaves out: in closed form (ridge), or from there
            trained too.
        tune: The training end to end.
        begin: What is trained end to end: fresh predictors that keep everything, or those of the closed form at the
            wished density, which want a lower `tune.rate` (5e-4).
        score: Makes the labels, an oracle's too, of the closed form and of the cross-entropy; all that follow are the
            cross-entropy's only.
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
    tune: Tune = Tune(rate=8e-3, local=0.2)
    begin: Literal["fresh", "svd"] = "fresh"
    score: LabelScore = "magnitude"
    form: Literal["mlp2", "linear2"] = "mlp2"
    weighting: Literal["dejavu", "none"] = "dejavu"
    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=1024, ge=1)
    rate: float = Field(default=3e-3, gt=0)


def more_needs(config: Config) -> tuple[str, ...]:
    """Samples or moments of the labels' score, or nothing but sizes."""
    if config.loss == "cross_entropy":
        return ("samples:{score}",)
    return ("sizes:gate",) if config.begin == "fresh" else ("moments:{score}",)


def start(config: Config) -> float | None:
    """The density of `plan` where training end to end follows, else None."""
    if config.loss == "cross_entropy":
        return None
    return 1.0 if config.begin == "fresh" else 1.0 - config.sparsity


def rank(config: Config, hidden: int, units: int, matrices: int) -> int:
    """The rank of the predictors beside networks of `matrices` matrices [n, d]."""
    return config.rank or rank_for(hidden, units, matrices, config.cost)


def plan_tokens(config: Config) -> int:
    """Tokens that `plan` trains every site on."""
    return config.steps * config.batch if config.loss == "cross_entropy" else 0


def plan(stats: Stats, arch: Arch, config: Config) -> Plan:
    """A Predictor for every site: fresh ones or those of the closed form to be trained end to end, or ones trained by
    cross-entropy.

    Raises InputError when a site has too few samples to hold some out.
    """
    predictors: Plan = {}
    density = 1.0 - config.sparsity
    for site, tensors in track(of_kind(stats, "ffn").items(), unit="site"):
        generator = torch.Generator().manual_seed(config.seed * 7919 + site.layer)
        if config.loss == "cross_entropy":
            samples = Samples.of(tensors, config.score, density)
            gate = _train(samples, rank(config, *samples.sizes, arch.matrices), config, generator)
        elif config.begin == "svd":
            moments = Moments.of(tensors, config.score, density)
            gate = low_rank_predictor(moments, rank(config, *moments.samples.sizes, arch.matrices))
        else:
            hidden, units = int(tensors["sizes:gate.hidden"]), int(tensors["sizes:gate.units"])
            gate = fresh_predictor(hidden, units, rank(config, hidden, units, arch.matrices), generator)
        predictors[site] = SitePlan(gate=gate)
    return predictors


def _train(samples: Samples, rank: int, config: Config, generator: torch.Generator) -> Predictor:
    hidden, units = samples.sizes
    linear = config.form == "linear2"
    if linear:
        rank = max(1, rank // 2)  # the equal mlp2 has twice as many rows
    train, heldout = samples.split(generator)
    x = samples.x
    scale = float(x[train[:4096]].float().square().mean().sqrt().clamp_min(1e-6))
    fc1 = (torch.randn(rank, hidden, generator=generator) / (scale * hidden**0.5)).requires_grad_()
    fc2 = (torch.randn(units, rank, generator=generator) / rank**0.5).requires_grad_()
    bias = torch.full((units,), float(torch.logit(torch.tensor(samples.density)))).requires_grad_()
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
        logits, wanted = (inner if linear else F.relu(inner)) @ fc2.T + bias, samples.labels(at)
        loss = dejavu_loss(logits, wanted, dejavu_weight(wanted) if config.weighting == "dejavu" else 1.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        if linear:  # v = relu(v) - relu(-v)
            fc1, fc2 = torch.cat([fc1, -fc1]), torch.cat([fc2, -fc2], dim=1)
        return Network(fc1.detach(), fc2.detach(), bias.detach()).settled(samples, heldout)

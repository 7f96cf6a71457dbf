"""What predictors are trained on: cross-entropy with DejaVu's weighting, the divergence from the dense model, and a
hard mask that gradients pass through.

Pure functions of tensors: no models, no files. Logits are natural (a unit is kept when its logit > 0), divergences are
in nats.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime_onnx.errors import InputError

SOURCE = (
    "Liu et al. 2023, Deja Vu (arXiv 2310.17157), loss of the authors' trainer: positives count 1, negatives the "
    "batch's share of positives (+ .005 for MLPs). "
    "Bengio et al. 2013 (arXiv 1308.3432): straight-through, here with the sigmoid's slope. Hinton et al. 2015 (arXiv "
    "1503.02531): divergence from a teacher."
)

_LEAST_REST = 1e-6  # probability of the tokens that are not named: what is left of 1 in fp32 is no less

MLP_MARGIN = 0.005
"""Added to the share of positives for MLP predictors, so that negatives keep some weight when hardly any unit is on."""


def dejavu_weight(labels: Tensor, margin: float = MLP_MARGIN) -> float:
    """Weight of a negative label: the share of positives in `labels` (any shape, 0/1 or bool) plus `margin` (0 for
    heads).
    """
    return float(labels.float().mean()) + margin


def dejavu_loss(logits: Tensor, labels: Tensor, weight: float | Tensor) -> Tensor:
    """Mean over all elements of w_i BCE(sigmoid(logit_i), y_i) with w_i = y_i (1 - weight) + weight: 1 on positives,
    `weight` on negatives; a scalar.

    `logits` and `labels` (0/1 or bool) are [T, n]; `weight` is a number (see `dejavu_weight`) or broadcasts to them.
    The weight multiplies the element's loss; given to torch as `pos_weight` it would touch positives only and leave the
    loss unweighted.
    """
    y = labels.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, y, weight=y * (1 - weight) + weight)


def kl_divergence(dense_logits: Tensor, sparse_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(dense || sparse) over the vocabulary, in nats, mean over positions: sum p (log p - log q); a scalar fp32.

    Both logits are [..., V]; `mask` is bool [...] with True where a position counts (all when None). A token that the
    dense model rules out (logit -inf) adds nothing. The dense logits get no gradient. Raises InputError when no
    position counts.
    """
    if mask is not None and not bool(mask.all()):
        dense_logits, sparse_logits = dense_logits[mask], sparse_logits[mask]
    if dense_logits.numel() == 0:
        raise InputError("At least one position must count, got none. Check the mask.")
    divergence: Tensor = _Divergence.apply(dense_logits.detach().float(), sparse_logits.float())
    return divergence


class _Divergence(torch.autograd.Function):
    """Sum over the last dimension of p (log p - log q), mean over the others; the gradient q - p, written down, takes
    half of the passes of autograd's.
    """

    @staticmethod
    def forward(ctx: Any, dense: Tensor, sparse: Tensor) -> Tensor:
        log_p, log_q = dense.log_softmax(-1), sparse.log_softmax(-1)
        p = log_p.exp()
        ctx.save_for_backward(p, log_q)
        return expected_difference(p, log_p, log_q).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        p, log_q = ctx.saved_tensors
        return None, log_q.exp().sub_(p).mul_(gradients[0] / p[..., 0].numel())


class Kept(NamedTuple):
    """A distribution over the vocabulary by its likeliest tokens: `tokens` [..., k] int32, their log-probabilities
    `log_p` [..., k], and the probability `rest` [...] of all others together, fp32.
    """

    tokens: Tensor
    log_p: Tensor
    rest: Tensor


def keep_likeliest(logits: Tensor, count: int) -> Kept:
    """The `count` likeliest tokens of logits [..., V], or all."""
    wide = logits.float()
    top = wide.topk(min(count, wide.shape[-1]), dim=-1)
    log_p = top.values - wide.logsumexp(-1, keepdim=True)
    return Kept(top.indices.int(), log_p, (1 - log_p.exp().sum(-1)).clamp_min(0.0))


def kept_divergence(dense: Kept, sparse_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(dense || sparse) in nats, mean over positions, where all tokens that `dense` does not name count as one; a
    scalar fp32.

    It is at most `kl_divergence`, and equal to it where every token is named. Shapes and `mask` are as there.
    """
    if mask is not None and not bool(mask.all()):
        dense, sparse_logits = Kept(*(part[mask] for part in dense)), sparse_logits[mask]
    divergence: Tensor = _KeptDivergence.apply(sparse_logits, *dense)
    return divergence


class _KeptDivergence(torch.autograd.Function):
    """Sum over named tokens of p (log p - log q) and the same for the rest as one, mean over positions. The gradient is
    q - p at named tokens and q (1 - rest_p / rest_q) at the others, in the logits' dtype.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, log_p: Tensor, rest: Tensor) -> Tensor:
        named, total = tokens.long(), logits.float().logsumexp(-1, keepdim=True)
        log_q, p = logits.gather(-1, named).float() - total, log_p.exp()
        rest_q = (1 - log_q.exp().sum(-1)).clamp_min(_LEAST_REST)
        ctx.save_for_backward(logits, named, total, p, rest / rest_q)
        others = torch.where(rest > 0, rest * (rest.clamp_min(_LEAST_REST).log() - rest_q.log()), 0.0)
        return ((p * (log_p - log_q)).sum(-1) + others).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits, named, total, p, ratio = ctx.saved_tensors
        q = (logits.float() - total).exp_()
        at_named = q.gather(-1, named) - p
        q.mul_((1 - ratio).unsqueeze(-1)).scatter_(-1, named, at_named)
        return q.mul_(gradients[0] / ratio.numel()).to(logits.dtype), None, None, None


def expected_difference(p: Tensor, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Sum over v of p_v (a_v - b_v): [...] of [..., V]. What has p_v = 0 adds nothing, be a or b infinite there.

    For probabilities p and log-probabilities a of p and b of q it is KL(p || q) in nats. `out` [..., V], which may hold
    anything, is overwritten; without it memory is taken.
    """
    terms = torch.sub(a, b, out=out).mul_(p)
    sums = terms.sum(-1)
    if bool(sums.isnan().any()):  # 0 * inf
        sums = terms.masked_fill_(p == 0, 0.0).sum(-1)
    return sums


def token_nll(logits: Tensor, target: Tensor, normaliser: Tensor | float = 0.0) -> Tensor:
    """-log p(target) in nats at every position: [...] of logits [..., V] and ids [...].

    `normaliser` [...] is the log of the sum of the logits' exponentials, 0 for log-probabilities; its dtype is the
    result's where it is the wider one.
    """
    return normaliser - logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def straight_through(logits: Tensor) -> Tensor:
    """The mask logit > 0 as exact 0 and 1 in the logits' dtype; its gradient is that of sigmoid(logit), so that units
    near the cut learn most. Any shape.
    """
    mask: Tensor = _StraightThrough.apply(logits)
    return mask


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return (logits > 0).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sigmoid_slope(ctx.saved_tensors[0]).mul_(gradients[0])


def sigmoid_slope(logits: Tensor) -> Tensor:
    """The derivative of the sigmoid at `logits`, any shape."""
    soft = torch.sigmoid(logits)
    return soft.addcmul(soft, soft, value=-1)

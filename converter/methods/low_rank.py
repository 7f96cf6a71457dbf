"""Predictors in closed form: the low-rank map of a block's input that tells best, in squares, how large a score is, as
P2 relu(P1 x) > tau.

1. The target is the root of the score relative to its mean over the token's neurons. Its regression on x of rank r is
   the truncated SVD of the whitened moments of x and targets (the statistic `moments`).
2. The op has no bias in relu. Where a direction m has m x = 1 at every token, adding c m to a row shifts its hidden
   unit by c, so that relu hardly cuts it: a linear map then takes r + 1 rows in place of 2 r.
3. Where there is no such direction every row stands beside its negative, v = relu(v) - relu(-v).
4. Of both forms the one of the higher recall on tokens that are in no moment is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...runtime_onnx.errors import InputError
from ..checkpoint.plan import Predictor

LabelScore = Literal["magnitude", "abs_z", "gate", "gradient", "gxo", "snip", "fisher", "corrected_gxo"]
"""Scores that predictors are made from, an oracle's too."""
_HELDOUT = 0.1  # share of the samples that thresholds and recall are measured on
_HELDOUT_ROWS = 4096  # at most: their logits [rows, n] are in memory at once
_LEAST = 64  # samples of a site
_RIDGE = 1e-3  # of the mean variance of an input
_SHIFT = 4.0  # standard deviations between relu's corner and a hidden unit's mean


@dataclass(frozen=True)
class Samples:
    """Inputs x [T, d] and scores [T, n] of a site; the largest scores of a token, `density` of them, are its labels."""

    x: Tensor
    score: Tensor
    density: float

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], score: str, density: float) -> Samples:
        """The samples of a site's statistics. Raises InputError when there are too few to hold some out."""
        x = tensors[f"samples:{score}.x"]
        _check_tokens(len(x))
        return cls(x, tensors[f"samples:{score}.score"], density)

    @property
    def sizes(self) -> tuple[int, int]:
        """(d, n)."""
        return self.x.shape[1], self.score.shape[1]

    def labels(self, at: Tensor) -> Tensor:
        """1 on the largest scores of the samples `at`, else 0: [len(at), n] fp32."""
        picked = self.score[at].float()
        k = max(1, round(self.density * picked.shape[1]))
        return torch.zeros_like(picked).scatter_(1, picked.topk(k, dim=1).indices, 1.0)

    def split(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(Samples to fit, samples held out in ascending order)."""
        order = torch.randperm(len(self.x), generator=generator)
        aside = min(int(len(self.x) * _HELDOUT), _HELDOUT_ROWS)
        return order[aside:], order[:aside].sort().values


@dataclass(frozen=True)
class Network:
    """A predictor before its threshold: logits relu(x fc1^T) fc2^T + bias, for fc1 [r, d], fc2 [n, r], bias [n]."""

    fc1: Tensor
    fc2: Tensor
    bias: Tensor

    def settled(self, samples: Samples, heldout: Tensor, recall: float | None = None) -> Predictor:
        """The predictor whose kept share of the samples `heldout` is their density or, given `recall`, the least that
        keeps so large a share of their labels. Bias and threshold become tau.
        """
        raw, wanted = F.relu(samples.x[heldout].float() @ self.fc1.T) @ self.fc2.T, samples.labels(heldout).bool()
        shifted = (raw + self.bias).flatten()
        counted, share = (shifted, samples.density) if recall is None else (shifted[wanted.flatten()], recall)
        count = max(1, round(share * counted.numel()))
        threshold = counted.kthvalue(counted.numel() - count).values if count < counted.numel() else counted.min() - 1
        tau = (threshold - self.bias).contiguous()
        kept = raw > tau
        return Predictor(
            self.fc1,
            self.fc2,
            tau,
            density=float(kept.float().mean()),
            recall=float((kept & wanted).sum() / wanted.sum()),
        )


@dataclass(frozen=True)
class Moments:
    """What the statistic `moments` holds of a score: means of x [d] and targets [n], covariances of x [d, d] and of x
    with the targets [d, n], and samples that none of them saw.
    """

    mean: Tensor
    target: Tensor
    covariance: Tensor
    shared: Tensor
    samples: Samples

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], score: str, density: float) -> Moments:
        """The moments of a site's statistics. Raises InputError when there are too few tokens."""
        mean, target, covariance, shared, x, values, count = (
            tensors[f"moments:{score}.{name}"]
            for name in ("mean", "target", "covariance", "shared", "x", "score", "count")
        )
        _check_tokens(int(count))
        return cls(mean, target, covariance, shared, Samples(x, values, density))

    def ridged(self) -> Tensor:
        """The covariance of x with a little of its mean variance on the diagonal."""
        least = _RIDGE * self.covariance.diagonal().mean().clamp_min(1e-30)
        return self.covariance + least * torch.eye(len(self.mean))


def _check_tokens(count: int) -> None:
    if count < _LEAST:
        raise InputError(
            f"Predictors must be trained on at least {_LEAST} tokens a site, got {count}. Give more calibration text."
        )


def low_rank_predictor(moments: Moments, rank: int, recall: float | None = None) -> Predictor:
    """The predictor of at most `rank` hidden units in closed form, with hidden units and logits of unit variance;
    `recall` as in `Network.settled`.
    """
    rows = regression(moments, rank)
    if rank == 1:
        forms = [Network(rows, *_linear(rows, moments))]
    else:
        forms = [_doubled(rows[: rank // 2], moments), _shifted(rows[: rank - 1], moments)]
    every = torch.arange(len(moments.samples.x))
    predictors = [form.settled(moments.samples, every, recall) for form in forms]
    # at one density the higher recall is better, and at one recall the lower density
    return max(predictors, key=lambda each: (each.recall or 0.0) if recall is None else -each.density)


def regression(moments: Moments, rank: int) -> Tensor:
    """Rows [r, d], of unit variance and uncorrelated, that span the best linear map of rank r from x to the targets,
    the most useful first; r is at most d (reduced-rank regression: Izenman 1975, Journal of Multivariate Analysis 5).
    """
    root = torch.linalg.cholesky(moments.ridged())
    whitened = torch.linalg.solve_triangular(root, moments.shared, upper=False)
    vectors = torch.linalg.eigh(whitened @ whitened.T).eigenvectors
    best = vectors[:, -min(rank, len(vectors)) :].flip(1)
    return torch.linalg.solve_triangular(root.T, best, upper=True).T


def _linear(rows: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """Weights [n, r] and bias [n] of logits that are linear in uncorrelated `rows` [r, d] of unit variance."""
    weights = (rows @ moments.shared).T
    scale = (weights.square().sum(1).mean() + moments.target.var(correction=0)).clamp_min(1e-12).rsqrt()
    return scale * weights, scale * (moments.target - weights @ (rows @ moments.mean))


def _shifted(rows: Tensor, moments: Moments) -> Network:
    """Rows with their corners below their means, and the direction that is nearest to 1 everywhere, which takes the
    shifts out again.
    """
    one = torch.linalg.solve(moments.ridged() + moments.mean.outer(moments.mean), moments.mean)
    weights, bias = _linear(rows, moments)
    shift = _SHIFT - rows @ moments.mean
    back = -(weights @ shift)
    return Network(torch.cat([rows + shift.outer(one), one[None]]), torch.cat([weights, back[:, None]], dim=1), bias)


def _doubled(rows: Tensor, moments: Moments) -> Network:
    """Rows and their negatives."""
    weights, bias = _linear(rows, moments)
    return Network(torch.cat([rows, -rows]), torch.cat([weights, -weights], dim=1), bias)

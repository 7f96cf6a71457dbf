"""Predictors in closed form: the low-rank map of a block's input that tells best, in squares, how large a score is, as P2
relu(P1 x) > tau.

1. The target is the root of the score relative to its mean over the token's neurons. Its regression on x of rank r is
   the truncated SVD of the whitened moments of x and targets.
2. The op has no bias in relu. Where a direction m has m x = 1 at every token, adding c m to a row shifts its hidden unit
   by c: a linear map then takes r + 1 rows in place of 2 r, and rows that are shifted less bend it.
3. Where there is no such direction every row stands beside its negative, v = relu(v) - relu(-v).
4. P2 is solved anew by ridge on what relu leaves, and of both forms the one of the higher recall on held-out tokens is
   taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
_AT_ONCE = 2048  # samples whose targets [rows, n] are in memory at once
_RIDGE = 1e-3  # of the mean variance of a feature
_SHIFT = 2.0  # standard deviations between relu's corner and a hidden unit's mean


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
        if len(x) < _LEAST:
            raise InputError(
                f"Predictors must be trained on at least {_LEAST} tokens a site, got {len(x)}. Give more calibration "
                "text."
            )
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

    def targets(self, at: Tensor) -> Tensor:
        """Root of the score relative to its mean over the token's neurons, of the samples `at`: [len(at), n] fp32."""
        picked = self.score[at].float()
        return (picked / picked.mean(dim=1, keepdim=True).clamp_min(1e-30)).sqrt()

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


def low_rank_predictor(
    samples: Samples, rank: int, generator: torch.Generator, recall: float | None = None
) -> Predictor:
    """The predictor of at most `rank` hidden units in closed form, with logits of unit variance; `recall` as in
    `Network.settled`. `generator` chooses the samples that are held out.
    """
    fit, heldout = samples.split(generator)
    moments = _moments(samples, fit, lambda x: x)
    rows = _regression(moments, rank)
    forms = [_doubled(rows, rank)] + ([_shifted(rows, moments, rank)] if rank > 1 else [])
    predictors = [_read_out(samples, fit, fc1).settled(samples, heldout, recall) for fc1 in forms]
    # at one density the higher recall is better, and at one recall the lower density
    return max(predictors, key=lambda each: (each.recall or 0.0) if recall is None else -each.density)


@dataclass(frozen=True)
class _Moments:
    """Means of features [f] and targets [n], the features' covariance [f, f] and that with the targets [f, n]."""

    mean: Tensor
    target: Tensor
    covariance: Tensor
    shared: Tensor

    def ridged(self) -> Tensor:
        """The covariance with a little of its mean variance on the diagonal."""
        least = _RIDGE * self.covariance.diagonal().mean().clamp_min(1e-30)
        return self.covariance + least * torch.eye(len(self.mean))


def _moments(samples: Samples, rows: Tensor, features: Callable[[Tensor], Tensor]) -> _Moments:
    """Moments over the samples `rows`, the features taken of their inputs."""
    count, (hidden, units) = len(rows), samples.sizes
    width = features(torch.zeros(1, hidden)).shape[1]
    mean, target = torch.zeros(width), torch.zeros(units)
    square, shared = torch.zeros(width, width), torch.zeros(width, units)
    for at in rows.split(_AT_ONCE):
        values, wanted = features(samples.x[at].float()), samples.targets(at)
        mean += values.sum(0) / count
        target += wanted.sum(0) / count
        square.addmm_(values.T, values, alpha=1 / count)
        shared.addmm_(values.T, wanted, alpha=1 / count)
    return _Moments(mean, target, square - mean.outer(mean), shared - mean.outer(target))


def _regression(moments: _Moments, rank: int) -> Tensor:
    """Rows [r, d], of unit variance and uncorrelated, that span the best linear map of rank r from x to the targets,
    the most useful first; r is at most d (reduced-rank regression: Izenman 1975, Journal of Multivariate Analysis 5).
    """
    root = torch.linalg.cholesky(moments.ridged())
    whitened = torch.linalg.solve_triangular(root, moments.shared, upper=False)
    vectors = torch.linalg.eigh(whitened @ whitened.T).eigenvectors
    best = vectors[:, -min(rank, len(vectors)) :].flip(1)
    return torch.linalg.solve_triangular(root.T, best, upper=True).T


def _shifted(rows: Tensor, moments: _Moments, rank: int) -> Tensor:
    """fc1 [r, d] of rows whose corners lie below their means, and the direction that is nearest to 1 everywhere."""
    one = torch.linalg.solve(moments.ridged() + moments.mean.outer(moments.mean), moments.mean)
    kept = rows[: rank - 1]
    return torch.cat([kept + (_SHIFT - kept @ moments.mean).outer(one), one[None]])


def _doubled(rows: Tensor, rank: int) -> Tensor:
    """fc1 of rows and their negatives."""
    kept = rows[: max(1, rank // 2)]
    return torch.cat([kept, -kept])[:rank]


def _read_out(samples: Samples, fit: Tensor, fc1: Tensor) -> Network:
    """The network with fc2 and bias by ridge on relu(fc1 x); hidden units and logits have unit variance."""
    moments = _moments(samples, fit, lambda x: F.relu(x @ fc1.T))
    spread = moments.covariance.diagonal().clamp_min(1e-12).sqrt()
    fc2 = torch.linalg.solve(moments.ridged(), moments.shared).T
    bias = moments.target - fc2 @ moments.mean
    variance = (fc2 @ moments.covariance * fc2).sum(1).mean() + moments.target.var(correction=0)
    scale = variance.clamp_min(1e-12).rsqrt()
    return Network(fc1 / spread[:, None], scale * fc2 * spread, scale * bias)

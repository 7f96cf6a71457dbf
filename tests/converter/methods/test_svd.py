"""Predictors in closed form, against brute force and on synthetic tokens; training end to end that begins there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_stats import LLAMA, D, N
from torch import Tensor
from torch.nn import functional as F

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Predictor, part_tensors
from sparsegate.converter.methods import low_rank, needs
from sparsegate.converter.methods.gating import predictor, svd
from sparsegate.converter.methods.low_rank import Moments
from sparsegate.converter.stats import StatSetup, moments
from sparsegate.runtime_onnx.errors import InputError

TOKENS = 2000


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(constant: bool, tokens: int = TOKENS) -> Tensor:
    """Drawn x [T, D]; with `constant` the last channel is 3 at every token."""
    x = drawn(0, tokens, D)
    if constant:
        x[:, -1] = 3.0
    return x


def sampled(x: Tensor, score: Tensor, name: str = "abs_z", layers: int = 1) -> Any:
    """The statistic `moments`, as the calibration pass would store it."""
    state = moments.init(StatSetup(D, score.shape[1], len(x), 0, Path(), f"moments:{name}"))
    moments.update(state, x, score, torch.arange(len(x)))
    tensors = {f"moments:{name}.{key}": tensor for key, tensor in moments.finish(state).items()}
    return {Site(layer): tensors for layer in range(layers)}


def linear_score(x: Tensor, rank: int) -> Tensor:
    """A score whose root relative to the token's mean is nearly a linear map of rank `rank`."""
    directions = drawn(1, D, rank) / D**0.5
    directions[-1] = 0  # the constant channel tells nothing
    return (3 + 0.5 * x @ directions @ drawn(2, rank, N) / rank**0.5).clamp_min(0.01).square()


def kept(entry: Predictor, x: Tensor) -> Tensor:
    return F.relu(x.half().float() @ entry.fc1.T) @ entry.fc2.T > entry.tau


def planned(stats: Any, **config: Any) -> Predictor:
    entry = svd.plan(stats, LLAMA, svd.Config(**config))[Site(0)].gating
    assert isinstance(entry, Predictor)
    return entry


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_regression_against_brute_force(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The squares that the best linear map of a rank leaves: numpy's singular values of the whole regression's
    predictions.
    """
    monkeypatch.setattr(low_rank, "_RIDGE", 1e-7)
    x = drawn(0, 500, D) @ drawn(3, D, D) + drawn(4, D)
    score = drawn(5, 500, N).abs() + 0.2 * (x @ drawn(6, D, N)).abs()
    stored = Moments.of(sampled(x, score)[Site(0)], "abs_z", 0.5)
    rows = low_rank.regression(stored, rank).double().numpy()
    fitted_on = torch.arange(500) % 8 != 0  # the others are kept whole
    x, target = x[fitted_on], moments.root(score[fitted_on]).double().numpy()
    centred_x, centred = (a - a.mean(0) for a in (x.double().numpy(), target))
    hidden = centred_x @ rows.T
    np.testing.assert_allclose(hidden.T @ hidden / len(x), np.eye(rank), atol=1e-3)
    error = float(np.square(centred - hidden @ np.linalg.lstsq(hidden, centred, rcond=None)[0]).sum())
    fitted = centred_x @ np.linalg.lstsq(centred_x, centred, rcond=None)[0]
    best = float(np.square(centred - fitted).sum() + np.square(np.linalg.svd(fitted)[1][rank:]).sum())
    assert error == pytest.approx(best, rel=1e-5)
    others = centred_x @ drawn(7, D, rank).double().numpy()
    assert np.square(centred - others @ np.linalg.lstsq(others, centred, rcond=None)[0]).sum() > 1.005 * best, (
        "the control: other directions leave more"
    )


def test_a_constant_direction_saves_half_of_the_rank() -> None:
    """A score of rank 4 takes 5 hidden units where a direction of x is constant; without one, twice its rank."""
    recalls = {}
    for constant in (True, False):
        x = inputs(constant)
        for rank in (5, 8):
            entry = planned(sampled(x, linear_score(x, 4)), rank=rank)
            assert entry.fc1.shape == (rank, D) and entry.fc2.shape == (N, rank)
            recalls[constant, rank] = entry.recall or 0.0
    assert recalls[True, 5] > recalls[False, 5] + 0.03, recalls
    assert recalls[True, 5] > 0.88 and recalls[False, 8] > 0.88, recalls


@pytest.mark.parametrize("sparsity", [0.3, 0.75])
def test_density_and_recall_hold_on_unseen_tokens(sparsity: float) -> None:
    x = inputs(True, 2 * TOKENS)
    score = linear_score(x, 4)
    entry = planned(sampled(x[:TOKENS], score[:TOKENS]), sparsity=sparsity, rank=6)
    k = round((1 - sparsity) * N)
    wanted = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(k, dim=1).indices, True)[TOKENS:]
    seen = kept(entry, x[TOKENS:])
    assert float(seen.float().mean()) == pytest.approx(1 - sparsity, abs=0.02)
    assert entry.density == pytest.approx(1 - sparsity, abs=1e-3)
    assert entry.recall == pytest.approx(float((seen & wanted).sum() / wanted.sum()), abs=0.03)
    assert not any(tensor.requires_grad for tensor in part_tensors(entry).values())


@pytest.mark.parametrize("recall", [0.8, 0.99])
def test_thresholds_for_a_recall(recall: float) -> None:
    x = inputs(True)
    score = linear_score(x, 4)
    entry = planned(sampled(x, score), sparsity=0.7, rank=4, recall=recall)
    assert entry.recall == pytest.approx(recall, abs=2e-3) and 0.3 * recall < entry.density < 0.9
    assert entry.density > planned(sampled(x, score), sparsity=0.7, rank=4, recall=recall - 0.2).density


def test_nothing_is_learnt_from_noise() -> None:
    entry = planned(sampled(inputs(False), drawn(8, TOKENS, N).abs()), sparsity=0.75, rank=8)
    assert entry.recall == pytest.approx(0.25, abs=0.04)


def test_the_rank_rule_and_few_tokens() -> None:
    x = inputs(True)
    entry = planned(sampled(x, linear_score(x, 4)), cost=0.3)
    assert 5 < entry.rank <= svd.rank(svd.Config(cost=0.3), D, N, 3) == 10
    assert planned(sampled(x, linear_score(x, 4)), rank=1).rank == 1
    with pytest.raises(InputError, match="at least 64 tokens a site, got 63"):
        planned(sampled(x[:63], linear_score(x[:63], 4)))


def test_training_may_begin_from_the_closed_form() -> None:
    """At the wished density, with the logits' spread that the slope of the sigmoid expects."""
    config = predictor.Config(begin="svd", score="corrected_gxo", sparsity=0.75, rank=6)
    assert needs("predictor", config) == ["moments:corrected_gxo"] and predictor.start(config) == 0.25
    x = inputs(True)
    stats = sampled(x, linear_score(x, 4), "corrected_gxo")
    entry = predictor.plan(stats, LLAMA, config)[Site(0)].gating
    same = planned(stats, score="corrected_gxo", sparsity=0.75, rank=6)
    assert isinstance(entry, Predictor) and entry.density == pytest.approx(0.25, abs=1e-3)
    for role, tensor in part_tensors(same).items():
        assert torch.equal(tensor, part_tensors(entry)[role]), role
    logits = F.relu(x @ entry.fc1.T) @ entry.fc2.T - entry.tau
    assert 0.8 < float(logits.std()) < 1.25

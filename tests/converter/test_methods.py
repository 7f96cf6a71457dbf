"""Methods on synthetic statistics: thresholds meet their density, predictors learn what can be learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsegate.converter.arch import Arch, Site, load_arch
from sparsegate.converter.artifact import InputError
from sparsegate.converter.methods import gate, make_config, needs, predictor
from sparsegate.converter.plans import Predictor, Threshold
from sparsegate.converter.stats import Setting, histogram

D, N, TOKENS = 16, 48, 3000
LLAMA, PHI = load_arch("llama"), load_arch("phi")


def gate_stats(*scores: Tensor) -> dict[Site, dict[str, Tensor]]:
    found = {}
    for layer, score in enumerate(scores):
        state = histogram.init(Setting(D, score.shape[1], len(score), 0, Path(), "histogram:gate"))
        histogram.update(state, torch.empty(0), score, torch.arange(len(score)))
        found[Site(layer)] = {f"histogram:gate.{name}": t for name, t in histogram.finish(state).items()}
    return found


# Gate


@pytest.mark.parametrize("sparsity", [0.02, 0.3, 0.5, 0.8, 0.97])
def test_gate_density(sparsity: float) -> None:
    g = torch.Generator().manual_seed(0)
    scores = [F.silu(torch.randn(TOKENS, N, generator=g) * (layer + 0.3)).abs() for layer in range(3)]
    plan = gate.plan(gate_stats(*scores), LLAMA, gate.Config(sparsity=sparsity))
    assert list(plan) == [Site(0), Site(1), Site(2)]
    for (entry,), score in zip(plan.values(), scores, strict=True):
        assert isinstance(entry, Threshold) and entry.score == "gate"
        assert entry.tau.shape == (N,) and entry.tau.dtype == torch.float32 and len(entry.tau.unique()) == 1
        realised = float((score > entry.tau).double().mean())
        assert realised == pytest.approx(1 - sparsity, abs=1e-3) and entry.density == pytest.approx(realised, abs=1e-3)


def test_gate_of_relu_keeps_what_is_not_zero() -> None:
    score = F.relu(torch.randn(TOKENS, N, generator=torch.Generator().manual_seed(0)) - 1)
    (entry,) = gate.plan(gate_stats(score), PHI, gate.Config(sparsity=0.5))[Site(0)]
    assert isinstance(entry, Threshold)
    assert (entry.tau == 0).all() and entry.density == pytest.approx(float((score > 0).double().mean()), abs=1e-9)


# Predictor


@pytest.mark.parametrize(
    ("hidden", "units", "matrices", "cost", "rank"),
    [
        (4096, 14336, 3, 0.1, 955),  # 0.3 * 4096 * 14336 / 18432 = 955.73
        (2048, 8192, 3, 0.1, 491),  # 0.3 * 2048 * 8192 / 10240 = 491.52
        (768, 3072, 2, 0.1, 122),  # 0.2 * 768 * 3072 / 3840 = 122.88: 0.16 d for n = 4 d
        (4096, 11008, 3, 0.05, 447),  # 0.15 * 4096 * 11008 / 15104 = 447.79
        (8, 8, 2, 0.1, 1),  # 0.8, and at least 1
    ],
)
def test_rank_rule_by_hand(hidden: int, units: int, matrices: int, cost: float, rank: int) -> None:
    assert predictor.rank_for(hidden, units, matrices, cost) == rank
    share = rank * (hidden + units) / (matrices * hidden * units)
    assert rank == 1 or share <= cost < (rank + 1) * (hidden + units) / (matrices * hidden * units)


def learnable(rank: int, tokens: int = TOKENS, seed: int = 0) -> dict[Site, dict[str, Tensor]]:
    """Scores that a network of `rank` hidden units gives exactly: a positive function of P2 relu(P1 x)."""
    g = torch.Generator().manual_seed(seed)
    x, fc1, fc2 = torch.randn(tokens, D, generator=g), torch.randn(rank, D, generator=g) / D**0.5, torch.randn(N, rank, generator=g) / rank**0.5
    score = (F.relu(x @ fc1.T) @ fc2.T).exp()
    return {Site(0): {"samples:magnitude.x": x.half(), "samples:magnitude.score": (score / score.amax(1, keepdim=True)).half()}}


def train(stats: Any, arch: Arch = LLAMA, **config: Any) -> Predictor:
    (entry,) = predictor.plan(stats, arch, predictor.Config(**({"steps": 150, "batch": 256, "rank": 8} | config)))[Site(0)]
    assert isinstance(entry, Predictor)
    return entry


def keep(entry: Predictor, x: Tensor) -> Tensor:
    return F.relu(x.float() @ entry.fc1.T) @ entry.fc2.T > entry.tau


def recall_at(kept: Tensor, score: Tensor, density: float) -> float:
    wanted = torch.zeros_like(kept).scatter_(1, score.float().topk(round(density * score.shape[1]), dim=1).indices, True)
    return float((kept & wanted).sum() / wanted.sum())


@pytest.fixture(scope="module")
def fresh() -> tuple[Tensor, Tensor]:
    """Tokens that no training saw, of the same problem."""
    (found,) = learnable(6, 2 * TOKENS).values()
    return found["samples:magnitude.x"][TOKENS:], found["samples:magnitude.score"][TOKENS:]


def first_half(stats: dict[Site, dict[str, Tensor]]) -> dict[Site, dict[str, Tensor]]:
    return {site: {name: t[:TOKENS] for name, t in tensors.items()} for site, tensors in stats.items()}


@pytest.mark.parametrize("sparsity", [0.3, 0.75])
def test_shapes_and_density(sparsity: float, fresh: tuple[Tensor, Tensor]) -> None:
    stats = first_half(learnable(6, 2 * TOKENS))
    entry = train(stats, sparsity=sparsity)
    assert entry.fc1.shape == (8, D) and entry.fc2.shape == (N, 8) and entry.tau.shape == (N,) and entry.residual is None and entry.rank == 8
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in entry.tensors().values())
    heldout = TOKENS // 10 * N
    assert abs(entry.density * heldout - round((1 - sparsity) * heldout)) <= 2, "exact on the held-out tokens, up to rounding of the fold"
    x, score = fresh
    assert float(keep(entry, x).float().mean()) == pytest.approx(1 - sparsity, abs=0.02)
    assert entry.recall == pytest.approx(recall_at(keep(entry, x), score, 1 - sparsity), abs=0.03), "the reported recall is that of unseen tokens"


def test_recall_beats_chance_and_grows_with_rank(fresh: tuple[Tensor, Tensor]) -> None:
    stats = first_half(learnable(6, 2 * TOKENS))
    x, score = fresh
    recalls = [recall_at(keep(train(stats, sparsity=0.75, rank=rank, rate=1e-2), x), score, 0.25) for rank in (1, 4, 16)]
    assert recalls[0] > 0.25 + 0.1 and recalls[1] > recalls[0] + 0.05 and recalls[2] > recalls[1] + 0.05, recalls


def test_nothing_is_learnt_from_noise(fresh: tuple[Tensor, Tensor]) -> None:
    """The control: recall of a score that x says nothing about stays at chance, where marginals do not differ either."""
    g = torch.Generator().manual_seed(5)
    stats = {Site(0): {"samples:magnitude.x": torch.randn(TOKENS, D, generator=g).half(), "samples:magnitude.score": torch.rand(TOKENS, N, generator=g).half()}}
    entry = train(stats, sparsity=0.75)
    assert entry.recall is not None and entry.recall == pytest.approx(0.25, abs=0.04)


def test_recall_is_reported_on_tokens_that_training_did_not_see() -> None:
    """Noise that a wide predictor learns by heart: the reported recall stays at chance all the same."""
    g = torch.Generator().manual_seed(6)
    x, score = torch.randn(200, D, generator=g).half(), torch.rand(200, N, generator=g).half()
    entry = train({Site(0): {"samples:magnitude.x": x, "samples:magnitude.score": score}}, sparsity=0.75, rank=128, steps=400, rate=1e-2)
    assert recall_at(keep(entry, x), score, 0.25) > 0.8, "nine tenths of these tokens were seen"
    assert entry.recall is not None and entry.recall < 0.4


def test_learns_a_realisable_mask() -> None:
    stats = first_half(learnable(6, 2 * TOKENS))
    entry = train(stats, sparsity=0.5, rank=32, steps=900, rate=1e-2)
    assert entry.recall is not None and entry.recall > 0.95


def test_seeded_and_without_side_effects() -> None:
    stats = learnable(6)
    state = torch.get_rng_state()
    first, second, other = train(stats, seed=3, steps=20), train(stats, seed=3, steps=20), train(stats, seed=4, steps=20)
    assert torch.equal(torch.get_rng_state(), state)
    for role, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[role]) and not torch.equal(tensor, other.tensors()[role]), role
    assert (first.density, first.recall) == (second.density, second.recall)


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 21, 40])
def test_any_number_of_steps(steps: int) -> None:
    assert train(learnable(6), steps=steps).recall


def test_layers_start_differently() -> None:
    (one,) = learnable(6).values()
    plan = predictor.plan({Site(0): one, Site(1): one}, LLAMA, predictor.Config(steps=2, rank=4))
    left, right = plan[Site(0)][0], plan[Site(1)][0]
    assert isinstance(left, Predictor) and isinstance(right, Predictor) and not torch.equal(left.fc1, right.fc1)


def test_inputs_of_any_size_train_alike() -> None:
    """The rate follows the size of x, so scaling x scales fc1 the other way and keeps the mask nearly."""
    recalls = []
    for scale in (0.05, 1.0, 50.0):
        stats = learnable(6)
        stats[Site(0)]["samples:magnitude.x"] = (stats[Site(0)]["samples:magnitude.x"].float() * scale).half()
        recalls.append(train(stats, steps=80, sparsity=0.75).recall or 0.0)
    assert max(recalls) - min(recalls) < 0.02, recalls


def test_rank_follows_the_rule_unless_given() -> None:
    (one,) = learnable(6).values()
    for arch, matrices in ((LLAMA, 3), (PHI, 2)):
        (entry,) = predictor.plan({Site(0): one}, arch, predictor.Config(steps=1, cost=0.3))[Site(0)]
        assert isinstance(entry, Predictor) and entry.rank == predictor.rank_for(D, N, matrices, 0.3)


def test_the_score_names_the_statistic() -> None:
    assert needs("predictor", make_config("predictor", {"score": "gate"})) == ["samples:gate"] and needs("gate", make_config("gate", {})) == ["histogram:gate"]
    (one,) = learnable(6).values()
    named = {name.replace("magnitude", "gate"): t for name, t in one.items()}
    assert train({Site(0): named}, score="gate", steps=5).recall == train({Site(0): one}, steps=5).recall


def test_too_few_samples() -> None:
    with pytest.raises(InputError, match="at least 64 tokens a site, got 63"):
        train(learnable(6, 63), steps=1)
    train(learnable(6, 64), steps=1)


def test_large_samples_hold_a_bounded_part_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "_HELDOUT_ROWS", 50)
    entry = train(learnable(6), steps=5, sparsity=0.5)
    assert abs(entry.density * 50 * N - 50 * N / 2) <= 2

"""The predictor method on synthetic statistics: predictors learn what can be learnt, and meet their density."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from method_stats import LLAMA, PHI, TOKENS, D, N, chess_stats, linear_stats
from plan_checks import gates
from torch import Tensor
from torch.nn import functional as F

from sparsegate.converter.arch import Arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Predictor, Threshold, part_tensors
from sparsegate.converter.methods import low_rank, make_config, needs
from sparsegate.converter.methods.gating import chess, predictor, trained_gate
from sparsegate.converter.modeling import predictor as modeling_predictor
from sparsegate.converter.scores import load_score
from sparsegate.runtime_onnx.errors import InputError

CROSS_ENTROPY: dict[str, Any] = {"loss": "cross_entropy"}


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
    assert modeling_predictor.rank_for(hidden, units, matrices, cost) == rank
    share = rank * (hidden + units) / (matrices * hidden * units)
    assert rank == 1 or share <= cost < (rank + 1) * (hidden + units) / (matrices * hidden * units)


def learnable(rank: int, tokens: int = TOKENS, seed: int = 0) -> dict[Site, dict[str, Tensor]]:
    """Scores that a network of `rank` hidden units gives exactly: a positive function of P2 relu(P1 x)."""
    g = torch.Generator().manual_seed(seed)
    x, fc1, fc2 = (
        torch.randn(tokens, D, generator=g),
        torch.randn(rank, D, generator=g) / D**0.5,
        torch.randn(N, rank, generator=g) / rank**0.5,
    )
    score = (F.relu(x @ fc1.T) @ fc2.T).exp()
    return {
        Site(0): {
            "samples:magnitude.x": x.half(),
            "samples:magnitude.score": (score / score.amax(1, keepdim=True)).half(),
        }
    }


def train(stats: Any, arch: Arch = LLAMA, **config: Any) -> Predictor:
    entry = predictor.plan(
        stats, arch, predictor.Config(**(CROSS_ENTROPY | {"steps": 150, "batch": 256, "rank": 8} | config))
    )[Site(0)].gating
    assert isinstance(entry, Predictor)
    return entry


def keep(entry: Predictor, x: Tensor) -> Tensor:
    return F.relu(x.float() @ entry.fc1.T) @ entry.fc2.T > entry.tau


def recall_at(kept: Tensor, score: Tensor, density: float) -> float:
    wanted = torch.zeros_like(kept).scatter_(
        1, score.float().topk(round(density * score.shape[1]), dim=1).indices, True
    )
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
    assert entry.fc1.shape == (8, D) and entry.fc2.shape == (N, 8) and entry.tau.shape == (N,) and entry.rank == 8
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in part_tensors(entry).values())
    heldout = TOKENS // 10 * N
    assert abs(entry.density * heldout - round((1 - sparsity) * heldout)) <= 2, (
        "exact on the held-out tokens, up to rounding of the fold"
    )
    x, score = fresh
    assert float(keep(entry, x).float().mean()) == pytest.approx(1 - sparsity, abs=0.02)
    assert entry.recall == pytest.approx(recall_at(keep(entry, x), score, 1 - sparsity), abs=0.03), (
        "the reported recall is that of unseen tokens"
    )


def test_recall_beats_chance_and_grows_with_rank(fresh: tuple[Tensor, Tensor]) -> None:
    stats = first_half(learnable(6, 2 * TOKENS))
    x, score = fresh
    recalls = [
        recall_at(keep(train(stats, sparsity=0.75, rank=rank, rate=1e-2), x), score, 0.25) for rank in (1, 4, 16)
    ]
    assert recalls[0] > 0.25 + 0.1 and recalls[1] > recalls[0] + 0.05 and recalls[2] > recalls[1] + 0.05, recalls


def test_nothing_is_learnt_from_noise(fresh: tuple[Tensor, Tensor]) -> None:
    """The control: recall of a score that x says nothing about stays at chance, where marginals do not
    differ either.
    """
    g = torch.Generator().manual_seed(5)
    stats = {
        Site(0): {
            "samples:magnitude.x": torch.randn(TOKENS, D, generator=g).half(),
            "samples:magnitude.score": torch.rand(TOKENS, N, generator=g).half(),
        }
    }
    entry = train(stats, sparsity=0.75)
    assert entry.recall is not None and entry.recall == pytest.approx(0.25, abs=0.04)


def test_recall_is_reported_on_tokens_that_training_did_not_see() -> None:
    """Noise that a wide predictor learns by heart: the reported recall stays at chance all the same."""
    g = torch.Generator().manual_seed(6)
    x, score = torch.randn(200, D, generator=g).half(), torch.rand(200, N, generator=g).half()
    entry = train(
        {Site(0): {"samples:magnitude.x": x, "samples:magnitude.score": score}},
        sparsity=0.75,
        rank=128,
        steps=400,
        rate=1e-2,
    )
    assert recall_at(keep(entry, x), score, 0.25) > 0.8, "nine tenths of these tokens were seen"
    assert entry.recall is not None and entry.recall < 0.4


def test_learns_a_realisable_mask() -> None:
    stats = first_half(learnable(6, 2 * TOKENS))
    entry = train(stats, sparsity=0.5, rank=32, steps=900, rate=1e-2)
    assert entry.recall is not None and entry.recall > 0.95


def test_seeded_and_without_side_effects() -> None:
    stats = learnable(6)
    state = torch.get_rng_state()
    first, second, other = (
        train(stats, seed=3, steps=20),
        train(stats, seed=3, steps=20),
        train(stats, seed=4, steps=20),
    )
    assert torch.equal(torch.get_rng_state(), state)
    for role, tensor in part_tensors(first).items():
        assert torch.equal(tensor, part_tensors(second)[role]), role
        assert not torch.equal(tensor, part_tensors(other)[role]), role
    assert (first.density, first.recall) == (second.density, second.recall)


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 21, 40])
def test_any_number_of_steps(steps: int) -> None:
    assert train(learnable(6), steps=steps).recall


def test_layers_start_differently() -> None:
    (one,) = learnable(6).values()
    plan = predictor.plan({Site(0): one, Site(1): one}, LLAMA, predictor.Config(loss="cross_entropy", steps=2, rank=4))
    left, right = plan[Site(0)].gating, plan[Site(1)].gating
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
        entry = predictor.plan({Site(0): one}, arch, predictor.Config(loss="cross_entropy", steps=1, cost=0.3))[
            Site(0)
        ].gating
        assert isinstance(entry, Predictor) and entry.rank == modeling_predictor.rank_for(D, N, matrices, 0.3)


LABELS = get_args(predictor.Config.model_fields["score"].annotation)


@pytest.mark.parametrize("score", LABELS)
def test_labels_come_from_the_named_score(score: str) -> None:
    assert needs("predictor", make_config("predictor", CROSS_ENTROPY | {"score": score})) == [f"samples:{score}"]
    (one,) = learnable(6).values()
    named = {name.replace("magnitude", score): t for name, t in one.items()}
    assert train({Site(0): named}, score=score, steps=5).recall == train({Site(0): one}, steps=5).recall
    if score != "magnitude":
        with pytest.raises(KeyError):
            train({Site(0): one}, score=score, steps=5)


def test_labels_are_only_those_scores_that_a_pass_can_give() -> None:
    """One forward, or one forward and one backward; not what only a prompt, a path of gradients or weights alone would
    give.
    """
    given = {"x", "gate", "up", "z", "w_gate", "w_up", "w_down"}
    for name in LABELS:
        asked = set(load_score(name).NEEDS)
        assert asked <= given or asked <= {"z", "grad", "label", "w_down"}, name
    with pytest.raises(InputError, match="predictor.score must be valid, got 'griffin'"):
        make_config("predictor", CROSS_ENTROPY | {"score": "griffin"})


@pytest.mark.parametrize(("weighting", "weight"), [("dejavu", 12 / N + 0.005), ("none", 1.0)])
def test_weighting(weighting: str, weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negatives count the share of positives, here exactly 12 of 48, and the margin of MLPs; or as much as
    positives.
    """
    seen: list[float] = []
    real = predictor.dejavu_loss
    monkeypatch.setattr(predictor, "dejavu_loss", lambda logits, labels, w: seen.append(w) or real(logits, labels, w))
    found = train(learnable(6), weighting=weighting, sparsity=0.75, steps=60, rate=1e-2)
    assert seen == pytest.approx([weight] * 60, rel=1e-6)
    assert found.recall is not None and found.recall > 0.25 + 0.1 and found.density == pytest.approx(0.25, abs=1e-3)
    default = train(learnable(6), sparsity=0.75, steps=60, rate=1e-2)
    assert torch.equal(default.fc2, found.fc2) == (weighting == "dejavu")


def test_linear2_is_stored_as_an_equal_mlp2() -> None:
    """v = relu(v) - relu(-v): the stored network of twice the rank is W2 W1 x, negative parts included, for any x."""
    entry = train(learnable(6), form="linear2", rank=8, sparsity=0.75)
    w1, w2 = entry.fc1[:4], entry.fc2[:, :4]
    assert entry.fc1.shape == (8, D) and entry.fc2.shape == (N, 8)
    assert torch.equal(entry.fc1[4:], -w1) and torch.equal(entry.fc2[:, 4:], -w2)
    x = torch.randn(500, D, generator=torch.Generator().manual_seed(3)) * 10
    linear = (x.double() @ w1.double().T) @ w2.double().T
    stored = F.relu(x.double() @ entry.fc1.double().T) @ entry.fc2.double().T
    torch.testing.assert_close(stored, linear, rtol=0, atol=1e-12)
    assert entry.density == pytest.approx(0.25, abs=1e-3) and entry.recall is not None and entry.recall > 0.25 + 0.1
    bent = train(learnable(6), rank=8, sparsity=0.75)
    assert float((F.relu(x @ bent.fc1.T) @ bent.fc2.T - (x @ bent.fc1.T) @ bent.fc2.T).abs().max()) > 1, (
        "the control: mlp2 is not linear"
    )


# Trained end to end


def sizes_stats(layers: int = 2, hidden: int = D, units: int = N) -> Any:
    return {
        Site(layer): {"sizes:gate.hidden": torch.tensor(hidden), "sizes:gate.units": torch.tensor(units)}
        for layer in range(layers)
    }


def test_end_to_end_is_the_default_and_needs_sizes_only() -> None:
    assert predictor.Config().loss == "end_to_end" and needs("predictor", predictor.Config()) == ["sizes:gate"]
    assert (
        predictor.start(predictor.Config()) == 1.0 and predictor.start(predictor.Config(loss="cross_entropy")) is None
    )


@pytest.mark.parametrize(("arch", "matrices"), [(LLAMA, 3), (PHI, 2)])
def test_a_fresh_predictor_keeps_everything(arch: Arch, matrices: int) -> None:
    hidden, units = 96, 320
    plan = predictor.plan(
        sizes_stats(3, hidden, units) | linear_stats("input", 1)[0], arch, predictor.Config(sparsity=0.9)
    )
    assert list(plan) == [Site(0), Site(1), Site(2)]
    x = torch.randn(200, hidden, generator=torch.Generator().manual_seed(0))
    for entry in gates(plan).values():
        assert (
            isinstance(entry, Predictor)
            and entry.rank == modeling_predictor.rank_for(hidden, units, matrices, 0.1)
            and entry.density == 1.0
        )
        assert (
            entry.recall is None and entry.fc1.shape == (entry.rank, hidden) and entry.fc2.shape == (units, entry.rank)
        )
        assert float(keep(entry, x).double().mean()) > 0.99
        logits = F.relu(x @ entry.fc1.T) @ entry.fc2.T - entry.tau
        assert float(logits.mean()) == pytest.approx(1, abs=0.1) and 0.05 < float(logits.std()) < 0.5, (
            "directions differ, so that there is what to train"
        )
    again, other = (
        predictor.plan(sizes_stats(1, hidden, units), arch, predictor.Config(seed=seed))[Site(0)].gating.fc1
        for seed in (0, 1)
    )
    assert (
        torch.equal(again, plan[Site(0)].gating.fc1)
        and not torch.equal(again, other)
        and not torch.equal(again, plan[Site(1)].gating.fc1)
    )


@pytest.mark.parametrize(("sparsity", "start"), [(0.5, 0.5), (0.75, 0.25), (0.1, 0.9)])
def test_trained_gate_begins_from_chess(sparsity: float, start: float) -> None:
    """With the thresholds of CHESS at the wished density."""
    g = torch.Generator().manual_seed(0)
    activated = [F.silu(torch.randn(TOKENS, N, generator=g)).abs() for _ in range(2)]
    stats = chess_stats(
        activated, [torch.randn(TOKENS, N, generator=g) * (torch.rand(N, generator=g) + 0.1) for _ in range(2)]
    )
    config = trained_gate.Config(sparsity=sparsity)
    assert trained_gate.start(config) == pytest.approx(start) and needs("trained_gate", config) == [
        "unit_histogram:gate"
    ]
    plan, expected = trained_gate.plan(stats, LLAMA, config), chess.plan(stats, LLAMA, chess.Config(sparsity=1 - start))
    for site, score in zip(stats, activated, strict=True):
        entry, wanted = plan[site].gating, expected[site].gating
        assert (
            isinstance(entry, Threshold) and entry.score == "gate" and entry.density == pytest.approx(start, abs=1e-5)
        )
        assert isinstance(wanted, Threshold)
        torch.testing.assert_close(entry.tau, wanted.tau, rtol=1e-5, atol=0)
        assert float((score > entry.tau).double().mean()) == pytest.approx(start, abs=5e-3)


# Few or many samples


def test_too_few_samples() -> None:
    with pytest.raises(InputError, match="at least 64 tokens a site, got 63"):
        train(learnable(6, 63), steps=1)
    train(learnable(6, 64), steps=1)


def test_large_samples_hold_a_bounded_part_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_HELDOUT_ROWS", 50)
    entry = train(learnable(6), steps=5, sparsity=0.5)
    assert abs(entry.density * 50 * N - 50 * N / 2) <= 2

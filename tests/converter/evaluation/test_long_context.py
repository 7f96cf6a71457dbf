"""Loss by position, on repetitions and on needles against full softmaxes in fp64, in windows of a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import TEXT, make_tokenizer
from torch import Tensor

from sparsegate.converter.arch import load_arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import SitePlan, Threshold, uniform_tau
from sparsegate.converter.evaluation import long_context
from sparsegate.converter.evaluation.long_context import (
    LongTests,
    Sequences,
    bin_edges,
    far_loss,
    measure_positions,
    needles,
    repeated,
    whole_windows,
)
from sparsegate.converter.evaluation.quality import clustered_error
from sparsegate.converter.modeling.gated import apply_plan, gates_of, load_dense
from sparsegate.converter.text.windows import Batches, make_long_batches

LENGTH = 128
PLAN = {Site(layer): SitePlan(gate=Threshold("gate", uniform_tau(0.6, 176), 0.5)) for layer in range(2)}


@pytest.fixture(scope="module")
def batches() -> Batches:
    return make_long_batches(make_tokenizer(), TEXT, 3, LENGTH, seed=1)


@torch.no_grad()
def brute_force(dense: Any, sparse: Any, tokens: Tensor) -> np.ndarray:
    """[T - 1, 6] fp64 of one sequence [T]: NLL dense, NLL, KL, equal argmax, argmax that is the token, dense and
    sparse.
    """
    p, q = (model(input_ids=tokens[None]).logits[0, :-1].double().log_softmax(-1) for model in (dense, sparse))
    target = tokens[1:]
    best = [logits.argmax(-1) for logits in (p, q)]
    parts = [-p.gather(1, target[:, None])[:, 0], -q.gather(1, target[:, None])[:, 0], (p.exp() * (p - q)).sum(-1)]
    return torch.stack([*parts, best[0] == best[1], best[0] == target, best[1] == target], dim=1).double().numpy()


@pytest.mark.parametrize("reference_type", [None, "qwen3"])
def test_loss_by_position_equals_a_full_softmax(
    reference_type: str | None, tiny_model: Callable[[str], Path], batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the model itself, and of another dense one, as for weights that were trained."""
    monkeypatch.setattr(long_context, "_LOGITS_AT_ONCE", 7 * 290)
    arch, model = load_arch("llama"), load_dense(tiny_model("llama"))
    reference = None if reference_type is None else load_dense(tiny_model(reference_type))
    measured = measure_positions(model, {"half": PLAN}, batches, reference)["half"]
    assert not gates_of(model), "dense again"
    dense = load_dense(tiny_model("llama")) if reference is None else reference
    sparse = apply_plan(model, PLAN, arch, "silu")
    whole = np.stack([brute_force(dense, sparse, tokens) for tokens in batches.tokens])
    assert whole.shape == (3, LENGTH - 1, 6) and measured.length == LENGTH and measured.windows == 3
    edges = [(1, 15), (16, 31), (32, 63), (64, 127)]
    assert [(row.first, row.last) for row in measured.positions] == edges == bin_edges(LENGTH)
    for row, (first, last) in zip(measured.positions, edges, strict=True):
        part = whole[:, first - 1 : last]
        means = part.mean((0, 1))
        assert (row.nll_dense, row.nll, row.kl, row.agreement) == pytest.approx(tuple(means[:4]), rel=1e-6)
        assert row.tokens == 3 * (last - first + 1)
        spread = part[..., 2].mean(1).std(ddof=1) / 3**0.5
        assert row.kl_error == pytest.approx(spread, rel=1e-5) and spread > 1e-4
        rise = (part[..., 1] - part[..., 0]).mean(1).std(ddof=1) / 3**0.5
        assert row.nll_error == pytest.approx(rise, rel=1e-4)
    assert measured.far.kl == pytest.approx(whole[:, 63:, 2].mean(), rel=1e-6)
    others = {row.kl for row in measured.positions[:-1]}
    assert min(abs(measured.far.kl - kl) for kl in others) > 1e-3, "bins differ, so that a shifted one is seen"
    rows = Sequences(sparse, whole_windows(batches), dense).rows(gates_of(sparse))
    assert far_loss(rows) == (
        pytest.approx(measured.far.kl, rel=1e-12),
        pytest.approx(measured.far.kl_error, rel=1e-9),
    )
    sums, counts = torch.tensor(whole[:, 63:, 2].sum(1)), torch.full((3,), 64.0, dtype=torch.float64)
    assert far_loss(rows)[1] == pytest.approx(clustered_error(sums, counts), rel=1e-5)


def test_bins_are_powers_of_two_and_cover_every_token() -> None:
    for length in (2, 4, 16, 32, 2048):
        edges = bin_edges(length)
        assert [k for low, high in edges for k in range(low, high + 1)] == list(range(1, length))
        assert edges[-1][1] == length - 1 and (length < 32 or edges[-1][0] == length // 2)


def test_long_windows_are_whole_and_of_a_power_of_two(batches: Batches) -> None:
    tokenizer = make_tokenizer()
    count = len(tokenizer(TEXT)["input_ids"])
    assert batches.mask.all() and batches.tokens.shape == (3, LENGTH)
    most = make_long_batches(tokenizer, TEXT, 100, 10**6, seed=1)
    length = most.tokens.shape[1]
    assert length & (length - 1) == 0 and 2 * length <= count < 4 * length and len(most.tokens) == count // length
    assert make_long_batches(tokenizer, TEXT, 100, 100, seed=1).tokens.shape[1] == 64
    fewer = make_long_batches(tokenizer, TEXT, 2, LENGTH, seed=1)
    assert torch.equal(fewer.tokens, batches.tokens[:2]), "fewer are the first of more"


def test_repetitions_score_the_second_copy(batches: Batches) -> None:
    known = torch.arange(5, 50)
    for kind, start in (("random", 0), ("text", 2)):
        found = repeated(kind, batches, 24, known, start, seed=3)  # type: ignore[arg-type]
        assert len(found) == 2
        for scored in found:
            tokens, places = scored.tokens, scored.places
            assert len(tokens) == start + 48 and torch.equal(tokens[start : start + 24], tokens[start + 24 :])
            assert places.tolist() == list(range(start + 25, start + 48))
            assert torch.equal(tokens[places], tokens[places - 24])
        assert torch.equal(found[0].tokens[:start], batches.tokens[0, :start])
    drawn = torch.cat([scored.tokens for scored in repeated("random", batches, 24, known, 0, seed=3)])
    assert torch.isin(drawn, known).all() and len(drawn.unique()) > 20


def test_a_needle_lies_at_its_depth_and_its_answer_at_the_end(batches: Batches) -> None:
    tokenizer, places = make_tokenizer(), []
    for depth in (0.0, 0.5, 1.0):
        (scored, other) = needles(batches, tokenizer, depth, 0, seed=4)
        text, answer = tokenizer.decode(scored.tokens), tokenizer.decode(scored.tokens[scored.places])
        assert len(scored.tokens) == LENGTH and answer.strip().isdigit() and len(answer.strip()) == 5
        assert text.count(answer) == 2 and text.endswith(f"The pass key is{answer}")
        assert answer not in tokenizer.decode(other.tokens), "every prompt has a key of its own"
        places.append(text.index("\nThe pass key is"))
    assert places[0] == 0 < places[1] < places[2]
    assert needles(Batches(batches.tokens[:, :32], batches.mask[:, :32]), tokenizer, 0.5, 0, seed=4) == []


def test_all_of_it_equals_a_full_softmax(tiny_model: Callable[[str], Path], batches: Batches) -> None:
    dense, model = load_dense(tiny_model("llama")), load_dense(tiny_model("llama"))
    tests = LongTests(model, batches, make_tokenizer())
    sparse = apply_plan(model, PLAN, load_arch("llama"), "silu")
    measured = tests.measured(gates_of(sparse))
    assert measured == tests.measured(gates_of(sparse)), "the dense side is kept"
    assert measured.positions == measure_positions(dense, {"": PLAN}, batches)[""].positions
    assert [(row.kind, row.distance) for row in measured.repetitions] == [("random", 64), ("text", 64)]
    assert [row.depth for row in measured.needles] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for (_, part), row in zip([*tests.copies, *tests.needles], [*measured.repetitions, *measured.needles], strict=True):
        whole = [brute_force(dense, sparse, scored.tokens)[scored.places.numpy() - 1] for scored in part]
        if hasattr(row, "distance"):
            means = np.concatenate(whole).mean(0)
            wanted = (means[0], means[1], means[2], means[4], means[5])
            assert (row.nll_dense, row.nll, row.kl, row.accuracy_dense, row.accuracy) == pytest.approx(wanted, rel=1e-6)
        else:
            sums, hits = np.stack([-rows.sum(0) for rows in whole]), np.stack([rows.prod(0) for rows in whole])
            wanted = (sums[:, 0].mean(), sums[:, 1].mean(), hits[:, 4].mean(), hits[:, 5].mean())
            values = (row.log_probability_dense, row.log_probability, row.exact_dense, row.exact)
            assert values == pytest.approx(wanted, rel=1e-6)
    assert tests.measured({}).far.kl == pytest.approx(0.0, abs=1e-6), "nothing is lost without gates"

"""Selectors against loops and the golden counts of the paper's own functions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.converter.evaluation.analysis.selectors import (
    global_pool,
    nonzero,
    paper_cut,
    quantile_tau,
    threshold,
    top_k,
    unit_count,
    used_groups,
)
from sparsegate.runtime_onnx.errors import InputError

SURVIVORS = (32, 29, 26, 23, 20, 16, 13, 10, 7, 4)


def test_f01_paper_cut_survivors() -> None:
    scores = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    for i, survivors in enumerate(SURVIVORS):
        keep = paper_cut(scores, i * 0.1)
        assert bool((keep.sum(-1) == survivors).all())
        assert bool((scores.masked_fill(~keep, math.inf).amin(-1) > scores.masked_fill(keep, -math.inf).amax(-1)).all())


def test_f01_ties_at_the_cut_all_survive() -> None:
    tied = torch.tensor([1.0, 1, 1, *[0.0] * 7])
    assert int(paper_cut(tied, 0.5).sum()) == 10
    assert int(top_k(tied, 0.5).sum()) == 5


@pytest.mark.parametrize("sparsity", [1.0, -0.1])
def test_paper_cut_refuses(sparsity: float) -> None:
    with pytest.raises(InputError, match="sparsity must be"):
        paper_cut(torch.ones(3), sparsity)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.floats(0, 1))
def test_top_k_against_sorting(values: list[int], density: float) -> None:
    """Exactly k, the largest, lower index first among equals."""
    k = math.floor(density * len(values) + 0.5)
    expected = set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])
    keep = top_k(torch.tensor([values, values[::-1]], dtype=torch.float32), density)[0]
    assert set(keep.nonzero().flatten().tolist()) == expected and unit_count(density, len(values)) == k


def test_top_k_refuses_a_density_outside() -> None:
    with pytest.raises(InputError, match="density must be"):
        top_k(torch.ones(3), 1.5)


def test_threshold_is_strict() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.5, -1.0]])
    assert threshold(scores, 1.0).tolist() == [[False, False, True], [False, True, False]]
    assert threshold(scores, torch.tensor([0.5, 1.0, -2.0])).tolist() == [[False, False, True], [True, True, True]]
    assert nonzero(scores).tolist() == [[False, True, True], [True, True, True]]


@given(st.floats(0, 1), st.integers(0, 99))
def test_quantile_keeps_the_share_exactly(density: float, seed: int) -> None:
    scores = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert int(threshold(scores, quantile_tau(scores, density)).sum()) == unit_count(density, 35)


def test_quantile_drops_ties_at_it() -> None:
    assert int(threshold(torch.tensor([0.0, 0, 0, 5]), quantile_tau(torch.tensor([0.0, 0, 0, 5]), 0.5)).sum()) == 1


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_global_pool_against_a_loop(density: float, part: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.randn(4, n, generator=generator) * scale
        for name, n, scale in (("a", 7, 1.0), ("b", 5, 10.0), ("c", 3, 0.1))
    }
    floor = density * part
    keep = global_pool(scores, density, floor)
    for t in range(4):
        chosen = [
            (name, i)
            for name, s in scores.items()
            for i in sorted(range(len(s[t])), key=lambda i, s=s: -float(s[t, i]))[: int(floor * len(s[t]))]
        ]
        rest = sorted(
            (
                (float(s[t, i]), name, i)
                for name, s in scores.items()
                for i in range(len(s[t]))
                if (name, i) not in chosen
            ),
            reverse=True,
        )
        chosen += [(name, i) for _, name, i in rest[: math.floor(density * 15 + 0.5) - len(chosen)]]
        assert {(name, i) for name, mask in keep.items() for i in mask[t].nonzero().flatten().tolist()} == set(chosen)


def test_global_pool_floor() -> None:
    scores = {"low": torch.arange(4.0)[None], "high": 100 + torch.arange(4.0)[None]}
    assert {name: int(mask.sum()) for name, mask in global_pool(scores, 0.5).items()} == {"low": 0, "high": 4}
    assert {name: int(mask.sum()) for name, mask in global_pool(scores, 0.5, 0.25).items()} == {"low": 1, "high": 3}
    with pytest.raises(InputError, match="floor must be"):
        global_pool(scores, 0.5, 0.6)


def test_a_group_stays_while_any_head_does() -> None:
    heads = torch.tensor([[True, False, False, False, False, True], [False] * 6])
    assert used_groups(heads, 3).tolist() == [[True, False, True], [False] * 3]
    assert used_groups(heads, 6).tolist() == heads.tolist()

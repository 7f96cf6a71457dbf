"""Calibration rules against golden values of the authors' own functions, and against brute force."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsegate.converter.methods.thresholds import along, chess_taus, one_cett, share_at
from sparsegate.converter.stats.bins import (
    BINS,
    UNIT_BINS,
    bins,
    cut,
    dropped_norm,
    edges,
    greedy_split,
    unit_bins,
    unit_edges,
)

WIDTH = 2.0**-8


def count_of(score: Tensor) -> Tensor:
    return torch.bincount(bins(score).flatten(), minlength=BINS)


def unit_counts(score: Tensor) -> Tensor:
    return torch.stack([torch.bincount(unit_bins(column), minlength=UNIT_BINS) for column in score.T]).int()


def million(seed: int = 0) -> Tensor:
    return torch.randn(1_000_000, generator=torch.Generator().manual_seed(seed))


# TEAL


def symmetric_rule(x: Tensor, sparsity: float) -> float:
    """TEAL's threshold: the quantile 1/2 + s/2 of x itself, which cuts the share s of |x| only where x is symmetric
    about 0.
    """
    return float(x.sort().values[int((0.5 + sparsity / 2) * x.numel())])


@pytest.mark.parametrize(
    ("shape", "sparsity", "tau", "realised"),
    [
        ("normal", 0.25, 0.3175, 0.2491),
        ("normal", 0.4, 0.5237, 0.3994),
        ("normal", 0.5, 0.6731, 0.4993),
        ("normal", 0.9, 1.6434, 0.8997),
        ("laplace", 0.25, 0.2876, None),
        ("laplace", 0.4, 0.5097, None),
        ("laplace", 0.5, 0.6915, None),
        ("laplace", 0.9, 2.3006, None),
    ],
)
def test_f13_quantiles_of_teal(shape: str, sparsity: float, tau: float, realised: float | None) -> None:
    """The authors' `icdf` on a million samples, whose bins are wider than ours; on symmetric data both rules are the
    same quantile.
    """
    x = million()
    if shape == "laplace":
        u = torch.rand(x.numel(), generator=torch.Generator().manual_seed(1)) - 0.5
        x = -u.sign() * torch.log1p(-2 * u.abs())
    found, _ = cut(count_of(x), 1 - sparsity)
    assert found == pytest.approx(tau, abs=6e-3) and found == pytest.approx(symmetric_rule(x, sparsity), abs=6e-3)
    zeros = float((x.abs() <= found).double().mean())
    assert zeros == pytest.approx(sparsity, abs=1e-4 + WIDTH * sparsity)
    assert realised is None or zeros == pytest.approx(realised, abs=1.5e-3)


def test_f13_data_off_centre() -> None:
    """The symmetric rule misses its target by far; the quantile of |x| does not."""
    x = million() + 0.3
    assert float((x.abs() <= symmetric_rule(x, 0.5)).double().mean()) == pytest.approx(0.6484, abs=2e-3)
    assert float((x.abs() <= cut(count_of(x), 0.5)[0]).double().mean()) == pytest.approx(0.5, abs=1e-3)


# CATS


def rule_of_cats(score: Tensor, sparsity: float) -> float:
    """20 000 edges on [-2, 2] and infinities; the left edge of the bin in which the cumulated count passes
    the share.
    """
    inner = torch.linspace(-2, 2, 20_000, dtype=torch.float64)
    at = torch.bucketize(score.double(), inner, right=True)  # bin k lies between inner[k - 1] and inner[k]
    share = torch.bincount(at, minlength=20_001).cumsum(0).double() / score.numel()
    return float(inner[max(0, int((share > sparsity).nonzero()[0]) - 1)])


@pytest.mark.parametrize(
    ("sparsity", "tau", "zeros"), [(0.5, 0.26754, 0.4992), (0.7, 0.53978, 0.7000), (0.9, 1.67375, 0.9000)]
)
def test_f14_thresholds_of_cats(sparsity: float, tau: float, zeros: float) -> None:
    score = F.silu(1.5 * million()).abs()
    theirs, (ours, said) = rule_of_cats(score, sparsity), cut(count_of(score), 1 - sparsity)
    assert theirs == pytest.approx(tau, rel=6e-3), "one million other samples"
    assert ours == pytest.approx(theirs, rel=WIDTH, abs=2e-4) and said == pytest.approx(1 - sparsity, abs=1e-9)
    for found in (theirs, ours):
        assert float((score <= found).double().mean()) == pytest.approx(zeros, abs=1.5e-3)


def test_f14_no_saturation() -> None:
    """A fixed range caps the threshold at 2; bins of relative width do not."""
    score = F.silu(4 * million()).abs()
    assert rule_of_cats(score, 0.9) == 2.0 and float((score <= 2.0).double().mean()) < 0.8
    assert float((score <= cut(count_of(score), 0.1)[0]).double().mean()) == pytest.approx(0.9, abs=1e-3)


def test_cut_at_no_density() -> None:
    assert cut(count_of(torch.rand(100)), 0.0) == (torch.inf, 0.0)


# CHESS


def gates(units: int = 40, tokens: int = 4000, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    gate = F.silu(torch.randn(tokens, units, generator=g) * (0.5 + torch.rand(units, generator=g))).abs()
    return gate, torch.rand(units, generator=g) * 4 + 0.01


def test_unit_bins_lie_between_their_edges() -> None:
    values = torch.cat([torch.zeros(1), torch.logspace(-8.5, 5.5, 3001)])
    at, lower = unit_bins(values).long(), unit_edges()
    assert int(at.min()) == 0 and int(at.max()) == UNIT_BINS - 1 and len(lower) == UNIT_BINS + 1
    inside = values < 2.0**16
    assert bool((lower[at[inside]] <= values[inside]).all() and (values[inside] < lower[at[inside] + 1]).all())
    assert float((lower[2:] / lower[1:-1]).max()) <= 1 + 1 / 16


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.9])
def test_f15_one_constant_a_layer(density: float) -> None:
    gate, moment = gates()
    tau, said = chess_taus(unit_counts(gate), moment, density)
    constant = tau.double().square() * moment.double()
    assert float(constant.max() / constant.min()) == pytest.approx(1, rel=1e-6) and tau.dtype == torch.float32
    assert said == pytest.approx(density, abs=1e-6) and float((gate > tau).double().mean()) == pytest.approx(
        density, abs=4e-3
    )
    by_sorting = torch.quantile((gate.square() * moment).flatten().double(), 1 - density)
    assert float(constant[0]) == pytest.approx(float(by_sorting), rel=0.03)
    assert len(tau.unique()) == len(tau), "the control: thresholds do differ"


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_f15_equal_moments_are_cats(density: float) -> None:
    gate, _ = gates()
    tau, _ = chess_taus(unit_counts(gate), torch.full((40,), 2.5), density)
    assert len(tau.unique()) == 1 and float(tau[0]) == pytest.approx(cut(count_of(gate), density)[0], rel=0.01)


def test_chess_at_the_ends() -> None:
    gate, moment = gates(tokens=200)
    moment[3], gate[:, 5] = 0.0, 0.0
    for density in (0.5, 1.0):
        tau, said = chess_taus(unit_counts(gate), moment, density)
        assert (
            tau[3] == torch.inf
            and not bool(tau.isnan().any())
            and said == pytest.approx(float((gate > tau).double().mean()), abs=0.01)
        )
    assert float((gate > chess_taus(unit_counts(gate), moment, 1.0)[0]).double().mean()) == pytest.approx(
        38 / 40, abs=1e-3
    ), "all but the two dead neurons"
    assert bool((chess_taus(unit_counts(gate), moment, 0.0)[0] == torch.inf).all())
    assert bool((chess_taus(unit_counts(gate), torch.zeros(40), 0.5)[0] == torch.inf).all())


# CETT


@pytest.mark.parametrize(
    ("cett", "eps", "achieved", "sparsity"),
    [(0.1, 0.07345, 0.1, 0.6284), (0.2, 0.1372, 0.1998, 0.7381), (0.4, 0.26953, 0.3993, 0.8592)],
)
def test_f19_bisection(cett: float, eps: float, achieved: float, sparsity: float) -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(32, 96, generator=g) / 10
    z = torch.randn(64, 96, generator=g) * torch.rand(64, 96, generator=g) ** 3
    size = z.abs() * w.norm(dim=0)
    low, high = 0.0, float(size.max())
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if dropped_norm(z, w.T, size > middle) <= cett else (low, middle)
    keep = size > low
    reached = dropped_norm(z, w.T, keep)
    assert low == pytest.approx(eps, abs=2e-5) and reached == pytest.approx(achieved, abs=6e-5)
    assert 1 - float(keep.double().mean()) == pytest.approx(sparsity, abs=6e-5)
    by_hand = (
        sum(
            float(sum(z[t, i] * w[:, i] for i in range(96) if not keep[t, i]).norm() / (w @ z[t]).norm())
            for t in range(64)
        )
        / 64
    )  # type: ignore[union-attr]
    assert reached == pytest.approx(by_hand, rel=1e-4)


def test_cett_bounds() -> None:
    z, w = torch.randn(8, 5), torch.randn(5, 4)
    everything = torch.ones(8, 5, dtype=torch.bool)
    assert (
        dropped_norm(z, w, everything) == 0
        and dropped_norm(z, w, ~everything) == pytest.approx(1)
        and dropped_norm(z * 0, w, ~everything) == 0
    )


def test_share_on_a_curve() -> None:
    share, error = torch.tensor([0.25, 0.5, 0.75]), torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64)
    assert [share_at(share, error, e) for e in (0.0, 0.05, 0.1, 0.2)] == pytest.approx([0.0, 0.125, 0.25, 0.375])
    assert share_at(share, error, 0.3) == pytest.approx(0.75), (
        "errors never fall again: the largest share with this error"
    )
    assert share_at(share, error, 0.65) == pytest.approx(0.875) and share_at(share, error, 1.0) == 1.0
    assert share_at(share, torch.tensor([0.0, 0.0, 0.4]), 0.0) == pytest.approx(0.5), "exact zeros cost nothing"


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_one_cett_meets_the_mean(sparsity: float) -> None:
    share = torch.arange(1, 32) / 32
    curves = [(share, share**power) for power in (1.0, 2.0, 3.5)]
    common = one_cett(curves, sparsity)
    found = [share_at(s, e, common) for s, e in curves]
    assert sum(found) / 3 == pytest.approx(sparsity, abs=1e-9) and found[0] < found[1] < found[2], (
        "layers that bear more drop more"
    )
    assert found == pytest.approx([common ** (1 / power) for power in (1.0, 2.0, 3.5)], abs=5e-3)


# Greedy split


def exhaustive(sizes: dict[str, int], error, step: float, widest: float, last: float) -> list[list[float]]:  # noqa: ANN001
    """The greedy split as written down: every linear's rise is measured at every step."""
    total, now = sum(sizes.values()), dict.fromkeys(sizes, 0.0)
    path = [list(now.values())]
    while any(last - share > 1e-9 for share in now.values()):
        best = None
        for name, size in sizes.items():
            further = min(widest, step * total / size, last - now[name])
            if further > 1e-9:
                rise = (error(now | {name: now[name] + further}) - error(now)) / (further * size)
                best = min(best, (rise, name, further)) if best else (rise, name, further)
        assert best is not None
        now[best[1]] += best[2]
        path.append(list(now.values()))
    return path


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.1, 10), st.floats(1.5, 4)), min_size=2, max_size=5))
@settings(max_examples=25)
def test_greedy_split_equals_the_exhaustive_search(parts: list[tuple[int, float, float]]) -> None:
    sizes = {str(k): size for k, (size, _, _) in enumerate(parts)}

    def error(shares: Mapping[str, float]) -> float:
        return sum(weight * shares[str(k)] ** power for k, (_, weight, power) in enumerate(parts))

    found = greedy_split(sizes, error)
    expected = torch.tensor(exhaustive(sizes, error, 0.05, 0.1, 0.95), dtype=torch.float64)
    assert found.shape == expected.shape
    costs = [[error(dict(zip(sizes, row.tolist(), strict=True))) for row in path] for path in (found, expected)]
    torch.testing.assert_close(torch.tensor(costs[0]), torch.tensor(costs[1]), rtol=1e-9, atol=1e-9)


def test_greedy_split_spares_what_hurts() -> None:
    sizes = {"a": 10, "b": 10, "c": 1}
    path = greedy_split(sizes, lambda s: 5 * s["a"] ** 2 + s["b"] ** 2 + 0.1 * s["c"] ** 2)
    assert (
        bool((path[1:] >= path[:-1]).all())
        and torch.allclose(path[-1], torch.full((3,), 0.95, dtype=torch.float64))
        and not bool(path[0].any())
    )
    weights = torch.tensor([10.0, 10.0, 1.0])
    for sparsity in (0.1, 0.37, 0.6, 0.95, 0.99):
        a, b, c = shares = along(path, weights, sparsity)
        assert float((shares * weights).sum() / 21) == pytest.approx(sparsity, abs=1e-9)
        assert sparsity > 0.9 or (a < b and a < c)
    assert not bool(along(path, weights, 0.0).any())
    assert all(
        float(later - now) <= 0.1 + 1e-9
        for row, following in pairwise(path)
        for now, later in zip(row, following, strict=True)
    )


def test_edges_are_monotonic() -> None:
    found = edges(0, BINS - 300)
    assert found[0] == 0 and bool((found[1:] > found[:-1]).all())

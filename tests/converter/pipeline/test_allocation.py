"""Allocations against brute force: hulls and mutations on curves that are known, sensitivities on a tiny model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from models import VOCAB
from torch import Tensor

from sparsegate.converter.arch import Arch, load_arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Plan, SitePlan, Threshold, uniform_tau
from sparsegate.converter.modeling.gated import load_dense, make_gates, switched
from sparsegate.converter.modeling.losses import kl_divergence
from sparsegate.converter.modeling.taps import tapped_inputs
from sparsegate.converter.pipeline import allocation
from sparsegate.converter.pipeline.allocation import GRID, allocate, evolve
from sparsegate.converter.pipeline.families import Densities, Family
from sparsegate.converter.pipeline.sensitivities import few_windows, sensitivities
from sparsegate.converter.pipeline.shares import fitted
from sparsegate.converter.text.windows import Batches

D, N = 64, 176
WEIGHTS = {"a": 1.0, "b": 3.0, "c": 0.5}
ARCH: Arch = load_arch("llama")


def curve(scale: float, power: float) -> list[float]:
    return [scale * (1 - density) ** power for density in GRID]


def value(values: list[float], density: float) -> float:
    """A curve over GRID between its points, (1, 0) being one."""
    return float(np.interp(density, [*reversed(GRID), 1.0], [*reversed(values), 0.0]))


@pytest.mark.parametrize("mean", [0.8, 0.7, 0.5, 0.35])
def test_allocation_is_as_cheap_as_the_best_of_a_grid(mean: float) -> None:
    curves = {"a": curve(1.0, 3), "b": curve(0.6, 2), "c": curve(2.0, 4)}
    found = allocate(curves, WEIGHTS, mean)
    total = sum(WEIGHTS.values())
    assert sum(WEIGHTS[key] * found[key] for key in WEIGHTS) / total == pytest.approx(mean, abs=1e-12)
    assert all(GRID[-1] <= density <= 1 for density in found.values())

    def lost(densities: Mapping[str, float]) -> float:
        return sum(value(curves[key], densities[key]) for key in curves)

    best = math.inf
    for a, c in itertools.product(np.arange(0.1, 1.001, 0.02), repeat=2):
        b = (mean * total - WEIGHTS["a"] * a - WEIGHTS["c"] * c) / WEIGHTS["b"]
        if GRID[-1] <= b <= 1:
            best = min(best, lost({"a": a, "b": b, "c": c}))
    assert lost(found) <= best + 1e-9
    assert lost(found) >= best - 0.02 * best - 1e-3, "the grid is fine enough to come close"
    assert lost(found) < lost(dict.fromkeys(curves, mean)) - 1e-3, "the same density everywhere must be worse"


@pytest.mark.parametrize("mean", [0.0, 0.02, 0.1, 0.99, 1.0])
def test_the_mean_is_met_exactly_down_to_nothing(mean: float) -> None:
    curves = {
        "a": [0.5, 0.1, 0.4, 0.4, 0.3, 2.0, 1.0],
        "b": [0.0] * 7,
        "c": curve(1.0, 2),
    }  # measured curves have noise
    found = allocate(curves, WEIGHTS, mean)
    assert sum(WEIGHTS[key] * found[key] for key in WEIGHTS) / sum(WEIGHTS.values()) == pytest.approx(mean, abs=1e-12)
    assert all(0 <= density <= 1 for density in found.values())
    if mean == 0.99:
        assert found["b"] < 1 and found["a"] == found["c"] == 1, "what costs nothing goes first"


def test_hull_equals_a_naive_one() -> None:
    random = np.random.default_rng(0)
    for _ in range(60):
        values = random.uniform(0, 1, len(GRID)).tolist()
        pieces = allocation._hull(values)
        rates = [rate for *_, rate in pieces]
        assert rates == sorted(rates) and pieces[0][0] == 1.0 and pieces[-1][1] == 0.0
        assert all(one[1] == other[0] for one, other in itertools.pairwise(pieces))
        height, corners = 0.0, {1.0: 0.0}
        for start, stop, rate in pieces:
            height += rate * (start - stop)
            corners[stop] = height
        assert corners[0.0] >= values[-1]
        points = [(1.0, 0.0), *zip(GRID, values, strict=True), (0.0, corners[0.0])]
        for x, y in points:
            chords = [
                a[1] + (b[1] - a[1]) * (a[0] - x) / (a[0] - b[0])
                for a, b in itertools.combinations(points, 2)
                if a[0] >= x >= b[0]
            ]
            lowest = min([y, *chords])
            hull = float(np.interp(x, sorted(corners), [corners[at] for at in sorted(corners)]))
            assert hull == pytest.approx(lowest, abs=1e-9)


# Evolution


def known_family(sites: Mapping[str, Site], weights: Mapping[str, float]) -> Family:
    """Of plans that are never made."""
    return Family(lambda densities: {}, sites, weights, dict.fromkeys(sites, "chess"))


BLOCKS = known_family({key: Site(at) for at, key in enumerate("abcd")}, {"a": 1.0, "b": 2.0, "c": 1.0, "d": 0.5})


def coupled(densities: Densities) -> float:
    """Divergences that do not add up: the first two blocks make each other worse."""
    a, b, c, d = (1 - densities[key] for key in "abcd")
    return a**2 + b**2 + 4 * a * b + 0.5 * c**2 + 0.2 * d**2


def test_evolution_comes_close_to_the_best_of_a_grid() -> None:
    mean = 0.6
    start = dict.fromkeys("abcd", mean)
    found = evolve(BLOCKS, start, coupled, seed=0, evaluations=200)
    assert BLOCKS.mean(found) == pytest.approx(mean, abs=1e-9) and all(0 <= share <= 1 for share in found.values())
    steps, best = np.arange(0.0, 1.0001, 0.05), math.inf
    for a, b, c in itertools.product(steps, repeat=3):
        d = (mean * 4.5 - a - 2 * b - c) / 0.5
        if 0 <= d <= 1:
            best = min(best, coupled({"a": a, "b": b, "c": c, "d": d}))
    assert coupled(found) <= 1.05 * best < 0.6 * coupled(start)
    again = evolve(BLOCKS, start, coupled, seed=0, evaluations=200)
    other = evolve(BLOCKS, start, coupled, seed=1, evaluations=200)
    assert found == again != other, "the seed decides"


def test_evolution_measures_as_often_as_it_may_and_keeps_a_start_that_is_best() -> None:
    seen: list[Densities] = []
    start = {"a": 0.0, "b": 1.0, "c": 0.3, "d": 1.0}
    found = evolve(BLOCKS, start, lambda densities: seen.append(dict(densities)) or float(len(seen)), 0, 30)
    assert found == start == seen[0] and len(seen) == 30
    for child in seen:
        assert BLOCKS.mean(child) == pytest.approx(BLOCKS.mean(start), abs=1e-9)
        assert all(0 <= share <= 1 for share in child.values())


def test_evolution_splits_inside_blocks_last() -> None:
    sites = {f"layers.{k}.linear.{name}": Site(k, kind=f"linear:{name}") for k in range(2) for name in ("q", "o")}
    family = known_family(sites, dict.fromkeys(sites, 1.0))
    seen: list[Densities] = []
    evolve(family, dict.fromkeys(sites, 0.5), lambda densities: seen.append(dict(densities)) or len(seen), 0, 30)

    def of_blocks(densities: Densities) -> list[float]:
        return [sum(densities[key] for key, site in sites.items() if site.layer == k) for k in range(2)]

    assert all(of_blocks(child) != pytest.approx([1, 1]) for child in seen[1:20])
    assert all(of_blocks(child) == pytest.approx([1, 1]) for child in seen[20:])
    assert all(len(set(child.values())) > 1 for child in seen[20:])


@pytest.mark.parametrize("mean", [0.0, 0.3, 0.6, 1.0])
def test_densities_are_shifted_to_a_mean(mean: float) -> None:
    found = fitted(BLOCKS, {"a": -0.5, "b": 0.4, "c": 1.7, "d": 0.5}, mean)
    assert BLOCKS.mean(found) == pytest.approx(mean, abs=1e-9) and all(0 <= share <= 1 for share in found.values())
    assert found["a"] <= found["b"] <= found["d"] <= found["c"]


# Sensitivities


@pytest.fixture(scope="module", name="model")
def _model(tiny_model: Callable[[str], Path]) -> Any:
    return load_dense(tiny_model("llama"))


def windows(count: int, length: int = 24) -> Batches:
    """Windows of which the last is padded."""
    tokens = torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[-1, 7:] = False
    return Batches(tokens, mask)


def small_family(scale: float) -> Family:
    """Both networks, and q of the second layer; thresholds rise with what is skipped."""
    sites = {site.key: site for site in (Site(0), Site(1), Site(1, kind="linear:q_proj"))}

    def make(densities: Densities) -> Plan:
        plan: Plan = {}
        for key, site in sites.items():
            tau, units = scale * (1 - densities[key]), N if site.kind == "ffn" else D
            plan[site] = SitePlan(gate=Threshold("gate" if site.kind == "ffn" else "input", uniform_tau(tau, units), 1))
        return plan

    return Family(make, sites, dict.fromkeys(sites, 1.0), dict.fromkeys(sites, "gate"))


@torch.no_grad()
def test_sensitivities_equal_the_divergence_of_the_whole_model(model: Any) -> None:
    family, batches = small_family(0.15), windows(9, 64)
    found = sensitivities(model, ARCH, "silu", batches, family)
    assert found == sensitivities(model, ARCH, "silu", batches, family)
    full = batches.tokens[:-1]
    dense = model(input_ids=full).logits
    for key, site in family.sites.items():
        for at in (1, 3, 5):
            gates = make_gates(model, {site: family.make(dict.fromkeys(family.sites, GRID[at]))[site]}, ARCH, "silu")
            with switched(model, gates):
                kl = float(kl_divergence(dense, model(input_ids=full).logits))
            assert kl > 1e-7 and found[key][at] == pytest.approx(kl, rel=0.2)


def test_sensitivities_run_a_block_for_its_own_keys_alone(model: Any) -> None:
    """One pass with gradients, one in which blocks are passed by, then every block once a key and density: linear in
    depth.
    """
    family, calls = small_family(0.3), {layer: [] for layer in range(2)}
    blocks = model.get_decoder().layers
    with tapped_inputs({blocks[layer]: cast("list[Tensor]", seen).append for layer, seen in calls.items()}):
        sensitivities(model, ARCH, "silu", windows(3), family)
    keys = {layer: sum(site.layer == layer for site in family.sites.values()) for layer in calls}
    assert {layer: len(seen) for layer, seen in calls.items()} == {
        layer: 3 * (2 + keys[layer] * len(GRID)) for layer in calls
    }


def test_few_windows_are_from_all_over_a_text() -> None:
    assert torch.equal(few_windows(windows(9), 3).tokens, windows(9).tokens[[0, 4, 8]])
    assert torch.equal(few_windows(windows(3), 8).tokens, windows(3).tokens)

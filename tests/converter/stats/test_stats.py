"""Statistics: additive, independent of how tokens are batched, and exact where they say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from sparsegate.converter.arch.site import Site
from sparsegate.converter.stats import (
    Probe,
    SiteStats,
    StatSetup,
    dropped,
    file_name,
    greedy,
    histogram,
    moments,
    of_kind,
    samples,
    scale,
    sizes,
    unit_histogram,
)
from sparsegate.converter.stats.bins import UNIT_BINS, cut, unit_edges

D, N = 6, 10
RELATIVE_WIDTH = 2.0**-8


def setup(folder: Path, tokens: int, seed: int = 0, units: int = N) -> StatSetup:
    return StatSetup(D, units, tokens, seed, folder, "samples:magnitude")


def count_of(*parts: Tensor) -> Tensor:
    state = histogram.init(StatSetup(D, N, 0, 0, Path(), "histogram:gate"))
    for score in parts:
        histogram.update(state, torch.empty(len(score), D), score, torch.arange(len(score)))
    return histogram.finish(state)["count"]


# Histogram


@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(0, 60), st.floats(1e-30, 1e30))
@settings(max_examples=12, deadline=None)
def test_histogram_is_additive(seed: int, tokens: int, at: int, scale: float) -> None:
    score = torch.randn(tokens, N, generator=torch.Generator().manual_seed(seed)) * scale
    at = min(at, tokens)
    whole = count_of(score)
    assert torch.equal(whole, count_of(score[:at], score[at:])) and torch.equal(
        whole, count_of(score[:at]) + count_of(score[at:])
    )
    assert int(whole.sum()) == score.numel() and whole.dtype == torch.int64


def test_bins_hold_what_their_edges_say() -> None:
    for value in (0.0, 1e-40, 1e-20, 0.1, 1.0, 1.0038, 3.14159, 65504.0, 3e38):
        (bin_,) = count_of(torch.full((1, 1), value)).nonzero().flatten().tolist()
        low, high = histogram.edges(bin_, bin_ + 2).tolist()
        assert low <= torch.tensor(value).item() < high and (value < 1e-37 or (high - low) / low <= RELATIVE_WIDTH), (
            value
        )
        assert torch.equal(count_of(torch.full((1, 1), -value)), count_of(torch.full((1, 1), value)))


@given(
    st.integers(0, 2**31),
    st.floats(0.01, 0.99),
    st.floats(1e-6, 1e6),
    st.sampled_from([torch.square, torch.abs, lambda v: F.silu(v).abs(), lambda v: F.relu(v)]),
)
@settings(max_examples=30, deadline=None)
def test_cut_meets_the_quantile_of_raw_scores(
    seed: int, density: float, scale: float, shape: Callable[[Tensor], Tensor]
) -> None:
    score = shape(torch.randn(400, N, generator=torch.Generator().manual_seed(seed))) * scale
    tau, said = cut(count_of(score), density)
    realised = float((score > tau).double().mean())
    flat, width = score.flatten().double(), 1 + 1.01 * RELATIVE_WIDTH
    low, high = (
        float(torch.quantile(flat, 1 - density + shift / flat.numel(), interpolation=side))
        for shift, side in ((-1, "lower"), (1, "higher"))
    )
    if high == 0.0:
        assert tau == 0.0 and said == pytest.approx(realised, abs=1e-9), "zeros are never kept"
    elif low > 0.0:
        assert low / width <= tau <= high * width, (
            "within the bin's width of the two scores that the quantile lies between"
        )
        assert said == pytest.approx(density, abs=1e-9)
        inside = float(((flat >= low / width**2) & (flat <= high * width**2)).double().mean())
        assert abs(realised - density) <= inside


def test_cut_at_the_ends() -> None:
    score = torch.rand(100, N) + 0.5
    assert cut(count_of(torch.zeros(5, N)), 0.5) == (0.0, 0.0)
    assert float((score > cut(count_of(score), 1 - 1e-9)[0]).float().mean()) == 1.0
    assert float((score > cut(count_of(score), 1e-9)[0]).float().mean()) <= 0.002


def test_cut_is_monotonic() -> None:
    count = count_of(torch.randn(500, N).abs())
    taus = [cut(count, k / 50)[0] for k in range(1, 50)]
    assert all(a > b for a, b in zip(taus, taus[1:], strict=False))


# Samples


def make_rows(tokens: int, units: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, D, generator=g), torch.randn(tokens, units, generator=g).abs()


def sample(folder: Path, x: Tensor, score: Tensor, sizes: list[int], seed: int = 0) -> dict[str, Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    state = samples.init(setup(folder, len(x), seed, score.shape[1]))
    start = 0
    for size in sizes:
        at = slice(start, start + size)
        samples.update(state, x[at], score[at], torch.arange(start, start + size))
        start += size
    assert start == len(x)
    assert samples.finish(state) == {}
    return load_file(folder / file_name("samples:magnitude"))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 100), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_samples_do_not_depend_on_batches(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], cap: int, seed: int
) -> None:
    tokens = sum(sizes) + 1
    x, score = make_rows(tokens)
    root = tmp_path_factory.mktemp("samples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "CAP", cap)
        whole, split = sample(root / "a", x, score, [tokens], seed), sample(root / "b", x, score, [*sizes, 1], seed)
    assert whole["x"].shape == (min(cap, tokens), D) and whole["score"].shape == (min(cap, tokens), N), "capped exactly"
    assert torch.equal(whole["x"], split["x"]) and torch.equal(whole["score"], split["score"])
    known = {tuple(row) for row in x.half().tolist()}
    assert len({tuple(row) for row in whole["x"].tolist()}) == min(cap, tokens) and all(
        tuple(row) in known for row in whole["x"].tolist()
    )


def test_rows_of_x_and_score_belong_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "CAP", 40)
    x = torch.arange(200.0)[:, None].expand(-1, D)
    score = F.one_hot(torch.arange(200) % N, N).float() * 7
    found = sample(tmp_path, x, score, [64, 64, 72])
    assert torch.equal(found["score"].argmax(1), found["x"][:, 0].long() % N)


def test_sample_is_seeded_and_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "CAP", 200)
    x, score = torch.arange(2000.0)[:, None].expand(-1, D), torch.rand(2000, N)
    draws = [sample(tmp_path / str(seed), x, score, [2000], seed)["x"][:, 0] for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    per_quarter = torch.histc(draws[0].float(), 4, 0, 2000)
    assert per_quarter.min() > 25, "no part of the text is left out"


def test_hash_is_splitmix64() -> None:
    """The first outputs of the generator seeded with 0, as published with its reference code."""
    golden = 0x9E3779B97F4A7C15
    position = torch.tensor([0])
    assert int(samples.mix(position, 0)[0]) % 2**64 == 0xE220A8397B1DCDAF
    assert int(samples.mix(position, 1)[0]) % 2**64 == 0x6E789E6AA1B965F4 and golden % 2


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_fp16_keeps_the_order_of_scores(tmp_path: Path, scale: float) -> None:
    x, score = make_rows(300, 64)
    score *= scale
    found = sample(tmp_path, x, score, [300])
    order = score.argsort(1)
    stored = found["score"].gather(1, order)
    assert (
        (stored[:, 1:] >= stored[:, :-1]).all() and (stored[:, -1] == 1).all() and bool(found["score"].isfinite().all())
    )
    k = 16
    top, expected = found["score"].float().topk(k).indices.sort().values, score.topk(k).indices.sort().values
    assert float((top == expected).all(1).float().mean()) > 0.9, "rounding may swap near ties at the edge, rarely"


def test_extremes_stay_finite(tmp_path: Path) -> None:
    x, score = make_rows(4)
    x[0] = 1e9
    score[1] = 0
    found = sample(tmp_path, x, score, [4])
    assert bool(found["x"].isfinite().all()) and bool((found["score"][1] == 0).all())


def test_a_full_disk_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory map would end the process with SIGBUS instead; /dev/full gives ENOSPC to the first byte that
    is flushed.
    """
    x, score = make_rows(4)
    state: dict[str, Any] = samples.init(setup(tmp_path, 4))
    state["path"] = Path("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        samples.update(state, x, score, torch.arange(4))


def test_stored_tensors_are_read_by_full_name(tmp_path: Path) -> None:
    x, score = make_rows(5)
    stored = sample(tmp_path, x, score, [5])
    found = SiteStats(tmp_path, ["samples:magnitude"])
    assert sorted(found) == ["samples:magnitude.score", "samples:magnitude.x"] and len(found) == 2
    assert torch.equal(found["samples:magnitude.x"], stored["x"])
    with pytest.raises(KeyError):
        found["samples:gate.x"]


# Statistics of thresholds


def feed(
    statistic: Any, score: Tensor, sizes: list[int], fields: dict[str, Tensor], setup: StatSetup
) -> dict[str, Any]:
    """A state after the rows of `score` [T, n] came in batches of `sizes`; a field of T rows is cut like the score."""
    state, start = statistic.init(setup), 0
    for size in sizes:
        at = slice(start, start + size)
        state["fields"] = {name: t[at] if t.ndim == 2 else t for name, t in fields.items()}
        statistic.update(state, torch.empty(size, D), score[at], torch.arange(size))
        start += size
    assert start == len(score)
    state.pop("fields")
    return state


@given(st.integers(0, 2**31), st.integers(1, 80), st.floats(1e-4, 1e3))
@settings(max_examples=10)
def test_unit_histogram_by_hand(seed: int, at: int, size: float) -> None:
    g = torch.Generator().manual_seed(seed)
    score, up = torch.randn(81, N, generator=g).abs() * size, torch.randn(81, N, generator=g)
    place = StatSetup(D, N, 81, 0, Path(), "unit_histogram:gate")
    whole, split = (
        unit_histogram.finish(feed(unit_histogram, score, sizes, {"up": up}, place)) for sizes in ([81], [at, 81 - at])
    )
    assert (
        torch.equal(whole["count"], split["count"])
        and whole["count"].shape == (N, UNIT_BINS)
        and whole["count"].dtype == torch.int32
    )
    torch.testing.assert_close(whole["up_moment"], split["up_moment"])
    torch.testing.assert_close(whole["up_moment"], up.square().mean(0))
    lower = unit_edges()
    for unit in (0, N - 1):
        for bin_ in whole["count"][unit].nonzero().flatten().tolist():
            inside = (score[:, unit].double() >= lower[bin_]) & (score[:, unit].double() < lower[bin_ + 1])
            assert int(whole["count"][unit, bin_]) == int(inside.sum())


def test_scale_is_the_last_field() -> None:
    given_scale = torch.rand(N) + 1
    state = feed(
        scale, torch.rand(9, N), [4, 5], {"scale": given_scale}, StatSetup(N, N, 9, 0, Path(), "scale:wina", 3)
    )
    assert torch.equal(scale.finish(state)["scale"], given_scale)


def test_sizes_are_those_of_the_site() -> None:
    state = sizes.init(StatSetup(D, N, 9, 0, Path(), "sizes:gate", 3))
    sizes.update(state, torch.rand(9, D), torch.rand(9, N), torch.arange(9))
    assert {name: int(t) for name, t in sizes.finish(state).items()} == {"hidden": D, "units": N}


def test_dropped_measures_what_falls_out() -> None:
    """On every share of the grid: the dropped neurons' sum, token by token, over the sum of all."""
    g = torch.Generator().manual_seed(0)
    gate, up, w_down = (
        torch.randn(300, N, generator=g),
        torch.randn(300, N, generator=g),
        torch.randn(N, D, generator=g),
    )
    state = feed(dropped, gate.abs(), [100, 200], {}, StatSetup(D, N, 300, 0, Path(), "dropped:gate", D))
    few = slice(0, 40)

    def neurons(score: str) -> tuple[Tensor, Tensor, Tensor]:
        assert score == "gate"
        return gate[few].abs(), (gate * up)[few], w_down

    dropped.settle({Site(0): state}, Probe(lambda taus: torch.empty(0), neurons), "gate")
    found = dropped.finish(state)
    assert set(found) == {"share", "error"} and found["share"].shape == found["error"].shape == dropped.SHARES.shape
    assert bool((found["share"].diff() > 0).all()) and float((found["share"] - dropped.SHARES).abs().max()) < 0.08, (
        "few tokens of all"
    )
    for k in (0, 15, 30):
        tau = cut(count_of(gate.abs()), 1 - float(dropped.SHARES[k]))[0]
        errors = []
        for t in range(40):
            terms = [(gate[t, i] * up[t, i] * w_down[i], float(gate[t, i].abs()) <= tau) for i in range(N)]
            lost = sum((term for term, falls in terms if falls), torch.zeros(D))
            errors.append(float(lost.norm() / sum((term for term, _ in terms), torch.zeros(D)).norm()))
        assert float(found["error"][k]) == pytest.approx(sum(errors) / 40, rel=1e-4)
    assert 0 < float(found["error"][0]) < float(found["error"][15]) < float(found["error"][30])


def test_greedy_spares_the_linear_that_hurts() -> None:
    """A block of two linears side by side, one of which gives nearly all of the output."""
    g = torch.Generator().manual_seed(0)
    x, weights = (
        torch.randn(200, N, generator=g),
        {"q_proj": torch.randn(D, N, generator=g), "k_proj": torch.randn(D, N, generator=g) / 50},
    )
    scales = {"q_proj": torch.rand(N, generator=g) + 0.5, "k_proj": torch.ones(N)}
    sites = {name: Site(0, kind=f"linear:{name}") for name in weights}
    states = {
        sites[name]: feed(
            greedy,
            x.abs() * scales[name],
            [50, 150],
            {"scale": scales[name]},
            StatSetup(N, N, 200, 0, Path(), "greedy:wina", D),
        )
        for name in weights
    }
    asked: list[dict[str, Tensor]] = []

    def block(taus: Any) -> Tensor:
        asked.append(dict(taus))
        return sum(
            ((torch.where(x.abs() > taus[name], x, 0.0) if name in taus else x) @ w.T for name, w in weights.items()),
            torch.zeros(200, D),
        )

    greedy.settle(states, Probe(block, lambda score: (x, x, x)), "wina")
    paths = {name: greedy.finish(states[sites[name]])["path"] for name in weights}
    assert list(greedy.finish(states[sites["q_proj"]])) == ["path"] and paths["q_proj"].dtype == torch.float32
    first = int((paths["q_proj"] > 0).nonzero()[0])
    assert float(paths["k_proj"][first]) > 0.9 and float(paths["q_proj"][-1]) == pytest.approx(0.95)
    middle = next(taus["q_proj"] for taus in asked if "q_proj" in taus)
    assert float((x.abs() <= middle).double().mean()) == pytest.approx(0.1, abs=0.01), (
        "the first step of a linear drops a tenth of its scaled inputs"
    )
    constant = middle * scales["q_proj"]
    assert float(constant.max() / constant.min()) == pytest.approx(1, abs=1e-5)


def test_sites_of_a_kind() -> None:
    stats: Any = {Site(0): 1, Site(0, kind="linear:q_proj"): 2, Site(1, kind="attn"): 3, Site(1): 4}
    assert of_kind(stats, "ffn") == {Site(0): 1, Site(1): 4} and of_kind(stats, "linear") == {
        Site(0, kind="linear:q_proj"): 2
    }


# Moments


def moments_of(x: Tensor, score: Tensor, cuts: tuple[int, ...] = (), flip: bool = False) -> dict[str, Tensor]:
    """Fed in parts that end at `cuts`; with `flip` the last part comes first."""
    state = moments.init(StatSetup(D, N, len(x), 0, Path(), "moments:abs_z"))
    bounds = [0, *cuts, len(x)]
    parts = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    for part in parts[::-1] if flip else parts:
        moments.update(state, x[part], score[part], torch.arange(len(x))[part])
    return moments.finish(state)


def test_moments_against_brute_force() -> None:
    """Of all tokens but every 8th, which are kept whole; however the tokens are batched."""
    g = torch.Generator().manual_seed(0)
    x, score = torch.randn(203, D, generator=g) + 2, torch.rand(203, N, generator=g)
    stored, whole = moments_of(x, score), torch.arange(203) % 8 == 0
    inside, target = x[~whole].double(), (score / score.mean(1, keepdim=True))[~whole].double().sqrt()
    for name, expected in {
        "mean": inside.mean(0),
        "target": target.mean(0),
        "covariance": torch.cov(inside.T, correction=0),
        "shared": (inside - inside.mean(0)).T @ (target - target.mean(0)) / len(inside),
    }.items():
        torch.testing.assert_close(stored[name].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(stored["x"], x[whole].half()) and int(stored["count"]) == 203
    torch.testing.assert_close(stored["score"], (score / score.amax(1, keepdim=True))[whole].half())
    for cuts in ((1,), (8, 100, 202)):
        for flip in (False, True):
            for name, tensor in moments_of(x, score, cuts, flip).items():
                torch.testing.assert_close(tensor, stored[name], rtol=1e-5, atol=1e-5)


def test_moments_keep_few_tokens_of_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "ROWS", 10)
    stored = moments_of(torch.randn(205, D), torch.rand(205, N), (50,))
    assert len(stored["x"]) == len(stored["score"]) == 10 and int(stored["count"]) == 205

"""bench of ops: pairing, dropping and medians; forced densities; the dense graphs compute what they should; rows hold
what they claim. No timings.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_folders as folders
import pytest

from sparsegate.runtime_onnx.bench import graphs, op, op_timer, samples, stream
from sparsegate.runtime_onnx.bench.op import OpTiming, OpWorkload, bench_op
from sparsegate.runtime_onnx.bench.op_cases import POOL, LinearCase, MlpCase, mlp_weights
from sparsegate.runtime_onnx.bench.op_graphs import BASELINES, FORMATS
from sparsegate.runtime_onnx.bench.op_timer import OpTimer, Peer
from sparsegate.runtime_onnx.bench.relu_case import ReluCase
from sparsegate.runtime_onnx.ops import gated_mlp, sparse_linear

D, N, R = 64, 96, 32


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which no thread ever waits, and a small buffer to read."""
    monkeypatch.setattr(samples, "waited", lambda: 0.0)
    monkeypatch.setattr(op_timer, "MemoryStream", lambda threads: stream.MemoryStream(threads, 1 << 16))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_order_is_fair(count: int) -> None:
    roles = [str(k) for k in range(count)]
    rounds = [samples.order(roles, number) for number in range(2 * count)]
    assert all(sorted(found) == roles for found in rounds)
    for place in (0, -1):
        assert sorted(found[place] for found in rounds) == sorted(roles * 2)


def test_pairs_are_cold_alternate_and_drop_what_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pair 2 waits in its second half: it is dropped whole. Every call comes after `before`, and both halves get the
    same number.
    """
    log: list[str] = []
    readings = itertools.chain(
        [0.0] * 11, itertools.repeat(9.0)
    )  # two a call; the twelfth is the end of the third pair's second call
    monkeypatch.setattr(samples, "waited", lambda: next(readings))
    clock = itertools.count()
    monkeypatch.setattr(samples.time, "perf_counter", lambda: float(next(clock)))
    found = samples.pairs(
        lambda i: log.append(f"a{i}"), lambda i: log.append(f"b{i}"), 3, 60.0, lambda: log.append("cold"), warm=1
    )
    assert found.dropped == 1 and len(found.baseline) == len(found.candidate) == 3
    assert log[::2] == ["cold"] * 10
    calls = log[1::2]
    assert all(
        {first[1:]} == {second[1:]} and first[0] != second[0]
        for first, second in zip(calls[::2], calls[1::2], strict=True)
    )
    assert {call[0] for call in calls[2::2]} == {"a", "b"}


def test_bursts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two readings a burst: the first burst waited and is thrown away, and of the second all calls but the
    first count.
    """
    readings = iter([0.0, 9.0, 9.0, 9.0])
    monkeypatch.setattr(samples, "waited", lambda: next(readings))
    done: list[int] = []
    assert len(samples.bursts(done.append, 3, 60.0, length=4)) == 3 and done == list(range(8))


def test_compare() -> None:
    found = samples.compare([4.0, 6.0, 8.0, 10.0, 100.0], [2.0, 2.0, 2.0, 2.0, 2.0])
    assert (
        found["ratio"] == 4.0
        and found["quartiles"] == [3.0, 5.0]
        and (found["lowest"], found["highest"], found["pairs"]) == (2.0, 50.0, 5)
    )
    assert (
        samples.compare([1.0], [1.0])["verdict"] == "not faster"
        and samples.compare([1.01], [1.0])["verdict"] == "faster"
    )


def test_stream_reads_every_way() -> None:
    found = stream.MemoryStream(2, 1 << 20).bandwidth(2)
    assert len(found) == 4 and all(np.isfinite(value) and value > 0 for value in found.values())
    made = stream.MemoryStream(1, 1 << 16)
    for _ in range(7):
        made.evict()
    assert sorted(made.noted()) == ["max", "or", "sum"] and made.noted() == {}
    assert stream.best({"a": 1.0, "b": 4.0}, {"a": 5.0, "b": 1.0}) == 3.0


@pytest.mark.parametrize("case", [MlpCase, LinearCase])
@pytest.mark.parametrize("density", [0.5, 0.2])
def test_density_is_forced_for_every_unit(case: Any, density: float, tmp_path: Path) -> None:
    made = case(FORMATS["int8"], D, N, R, tmp_path)
    kept = made.score > made.thresholds(density)
    assert abs(kept.mean(0) - density).max() <= 1 / POOL + 1e-9
    assert kept[0].mean() == pytest.approx(density, abs=0.2) and (kept[0] != kept[1]).any()
    assert not (made.score > made.thresholds(0.0)).any() and (made.score > made.thresholds(1.0)).all()


@pytest.mark.parametrize(("baseline", "bound"), [("fp32", 1e-11), ("int8", 2e-3), ("int4", 0.1)])
def test_dense_graphs_are_the_mlp(baseline: str, bound: float, tmp_path: Path) -> None:
    """Against numpy on the float weights, within the format's rounding; a control with one matrix changed
    is far off.
    """
    case = MlpCase(FORMATS["fp32"], D, N, R, tmp_path)
    run = OpTimer(1, 1, 1.0, ()).open(case.dense(baseline, tmp_path))
    weights, x = (
        {role: value.astype(np.float64) for role, value in mlp_weights(D, N, R).items()},
        case.pool[:5].astype(np.float64),
    )

    def mlp(down: Any) -> Any:
        gate = x @ weights["w_gate"].T
        return (gate / (1 + np.exp(-gate)) * (x @ weights["w_up"].T)) @ down

    def error(expected: Any) -> float:
        return float(((run(case.pool[:5]) - expected) ** 2).sum() / (expected**2).sum())

    assert error(mlp(weights["w_down"])) < bound
    assert error(mlp(weights["w_down"][::-1])) > 0.5


def test_rows_of_the_mlp(still: None) -> None:
    seen: list[int] = []
    peer = Peer("other", ("fp32",), lambda weights, threads: lambda x: x @ weights["w_up"].T)
    result = bench_op(
        OpWorkload("gated_mlp", D, N, R, ["fp32", "int8"], (1.0, 0.25), (1, 4)),
        OpTiming(threads=1, pairs=2),
        peers=[peer],
        command="x",
        keep=lambda found: seen.append(len(found["rows"])),
    )
    assert (
        json.loads(json.dumps(result)) == result and seen == list(range(1, 15)) and result["cuda"].startswith("not run")
    )
    by = {(row["format"], row["tokens"], row["asked"], row["score"]): row for row in result["rows"]}
    assert len(by) == 14 and all(row["status"] == "run" for row in by.values())
    for (name, tokens, asked, score), row in by.items():
        if score == "nothing":
            assert row["density"] == 0.0 and row["warm_ms"] > 0
            continue
        assert row["density"] == pytest.approx(asked, abs=2e-3) and row["union"] >= row["density"] - 0.05
        assert row["union"] == pytest.approx(1 - (1 - asked) ** tokens, abs=0.05)
        variant = gated_mlp.Variant.parse(row["variant"])
        assert row["bytes"] == pytest.approx(gated_mlp.traffic(variant, D, N, 0 if score == "all" else R, row["union"]))
        assert row["operations"] == pytest.approx(
            2 * tokens * (3 * D * N * row["density"] + (0 if score == "all" else R * (D + N)))
        )
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6) and row[
            "share_of_stream"
        ] == pytest.approx(row["gb_per_s"] / row["stream_gb_per_s"])
        names = [f"ONNX Runtime {BASELINES[key].name}" for key in FORMATS[name].baselines] + ["other"] * (
            name == "fp32"
        )
        names = names if tokens == 1 else names[:1]
        assert [dense["name"] for dense in row["dense"]] == names
    again: list[int] = []
    more = bench_op(
        OpWorkload("gated_mlp", D, N, R, ["fp32", "int8"], (1.0, 0.25), (1, 4)),
        OpTiming(threads=1, pairs=2),
        finished=result["rows"][:-1],
        keep=lambda _: again.append(1),
    )
    assert len(again) == 1 and more["rows"][:-1] == result["rows"][:-1]


@pytest.mark.parametrize(
    ("activation", "both"), [("drelu", True), ("relu2", False), ("fatrelu(0.5)", False), ("shifted_relu(-0.25)", False)]
)
def test_gates_are_opened_by_force(activation: str, both: bool, tmp_path: Path) -> None:
    """The shares of the pool are those asked for, of every neuron, and the pool's own reference agrees with them."""
    case = ReluCase(FORMATS["fp32"], 256, N, R, tmp_path, activation)
    for score, share in (("exact", 0.09), ("predictor", 0.5)):
        case.aim(score, 0.09)
        kept = case.kept(case.thresholds(0.09))
        assert kept.mean() == pytest.approx(0.09 if score == "exact" else 0.18, abs=0.01)
        assert case._used.mean() == pytest.approx(share, abs=0.02) and case._open.mean() == pytest.approx(
            share**0.5 if both else share, abs=0.02
        )
        assert 0.4 * share < case._used.mean(0).min() and case._used.mean(0).max() < 1.6 * share + 0.05
        x = case.pool[:64]
        tensors = {**case._arrays, "tau": case.thresholds(0.09)}
        assert (gated_mlp.opened(case.variant, x, tensors) == case._open[:64]).mean() > 0.999
        assert (gated_mlp.active(case.variant, x, tensors) == kept[:64]).mean() > 0.999
        shares = case.shares(kept)
        assert shares["nonzero"] == pytest.approx(0.09, abs=0.02) and shares["opened"] >= shares["nonzero"]


@pytest.mark.slow
def test_rows_of_a_relu(still: None) -> None:
    result = bench_op(
        OpWorkload("gated_mlp", D, N, R, ["fp32", "int4"], (0.09,), (1, 4), activation="drelu"), OpTiming(1, 2)
    )
    rows = result["rows"]
    assert result["settings"]["activation"] == "drelu" and [row["score"] for row in rows] == ["exact", "predictor"] * 4
    for row in rows:
        variant = gated_mlp.Variant.parse(row["variant"])
        assert row["status"] == "run" and (variant.activation, variant.score) == ("drelu", row["score"])
        exact = row["score"] == "exact"
        assert row["nonzero"] == pytest.approx(0.09, abs=0.03) and (row["density"] == row["nonzero"]) == exact
        assert row["nonzero"] < row["opened"] and (exact or row["opened"] < row["density"])
        if row["tokens"] == 1:
            assert row["bytes"] == pytest.approx(
                gated_mlp.traffic(variant, D, N, 0 if exact else R, row["density"], row["opened"], row["nonzero"]),
                rel=0.1,
            )
            shares = (1.0 if exact else row["density"]) + row["opened"] + row["nonzero"]
            assert row["operations"] == pytest.approx(2 * (D * N * shares + (0 if exact else R * (D + N))), rel=0.1)
        assert row["dense"][0]["name"] == f"ONNX Runtime {BASELINES[FORMATS[row['format']].baselines[0]].name}"


def test_rows_of_the_linear(still: None) -> None:
    (row, nothing) = bench_op(OpWorkload("sparse_linear", D, N, R, ["int4"], (0.5,)), OpTiming(1, 2))["rows"]
    variant = sparse_linear.Variant.parse(row["variant"])
    assert (
        row["bytes"] == pytest.approx(sparse_linear.traffic(variant, D, N, row["union"]))
        and nothing["score"] == "nothing"
    )


def test_a_wrong_kernel_is_not_timed(still: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = MlpCase.expected
    monkeypatch.setattr(MlpCase, "expected", lambda self, x, tau: right(self, x, tau) * (1 + 1e-4))
    with pytest.raises(ValueError, match="error of fp32 must be at most .*The kernel is wrong"):
        bench_op(OpWorkload("gated_mlp", D, N, R, ["fp32"], (0.5,)), OpTiming(1, 1))


def test_a_busy_machine_gives_no_number(still: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ever = itertools.count()
    monkeypatch.setattr(samples, "waited", lambda: float(next(ever)))
    with pytest.raises(ValueError, match="must have 15 clean pairs in 0 s, got 0 of"):
        bench_op(OpWorkload("gated_mlp", D, N, R, ["fp32"], (0.5,)), OpTiming(1, patience=0.2))


def test_a_variant_without_a_kernel_is_said(still: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op.library, "supports", lambda *_: False)
    result = bench_op(OpWorkload("gated_mlp", D, N, R, ["fp32"], (0.5,)), OpTiming(1, 1))
    assert {row["status"] for row in result["rows"]} == {"not run: the library has no kernel for it"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"op": "conv"}, "op must be gated_mlp or sparse_linear, got 'conv'"),
        ({"formats": ["fp8"]}, "must be one of fp32; .*got 'fp8'"),
        ({"densities": [0.0]}, "above 0 and be at most 1, got 0.0"),
        ({"tokens": [0]}, "tokens must be 1 to 1024, got 0"),
        ({"d": 65}, "multiples of 32, got 65"),
        ({"pairs": 0}, "pairs must be at least 1"),
        ({"activation": "gelu"}, "activation must be silu, or for gated_mlp one of relu, .*got gelu"),
        ({"op": "sparse_linear", "activation": "relu"}, "got relu for sparse_linear"),
        ({"activation": "drelu", "densities": [1.0]}, "density of drelu must be below 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pairs = arguments.pop("pairs", 21)
        bench_op(OpWorkload(**{"d": D, "n": N, **arguments}), OpTiming(pairs=pairs))


def test_bytes_and_density_of_a_folder() -> None:
    """By hand from the sizes; the thresholds of the folder are medians of its neurons' scores on these very tokens."""
    import torch

    dense, sparse = folders.dense(), folders.sparse("predictor")
    h, n, layers, r = folders.HIDDEN, folders.NEURONS, folders.LAYERS, folders.RANK
    mlp = 3 * h * n * 4
    tokens = torch.randint(2, folders.VOCABULARY, (1, 200), generator=torch.Generator().manual_seed(1))[0].tolist()
    found = graphs.realised(sparse, tokens)
    assert (
        len(found) == layers
        and all(value.kept == pytest.approx(0.5, abs=0.01) for value in found.values())
        and graphs.realised(dense, tokens) == {}
    )
    predictor = (r * (h + n) + n) * 4
    saved = graphs.token_bytes(dense) - graphs.token_bytes(sparse, dict.fromkeys(found, 0.25))
    assert saved == pytest.approx(layers * (0.75 * mlp - predictor))
    rest = 4 * (layers * (h * (h + 2 * (h // 2)) + h * h + 2 * h) + h + h * folders.VOCABULARY)
    assert graphs.token_bytes(dense) == pytest.approx(rest + layers * mlp, rel=0.01)


def test_thresholds_are_set_again(tmp_path: Path) -> None:
    folder = folders.copy(folders.sparse("predictor"), tmp_path / "copy")
    tokens = np.random.default_rng(5).integers(2, folders.VOCABULARY, 128).tolist()
    for _ in range(3):
        graphs.set_density(folder, [tokens[:64], tokens[64:]], 0.25)
    assert all(value.kept == pytest.approx(0.25, abs=0.03) for value in graphs.realised(folder, tokens[:64]).values())
    assert all(
        value.kept == value.opened == value.nonzero > 0.4
        for value in graphs.realised(folders.sparse("predictor"), tokens).values()
    )


def test_share_of_the_mlp() -> None:
    def node(name: str, start: int, duration: int) -> dict[str, Any]:
        return {"cat": "Node", "name": name, "ts": start, "dur": duration}

    calls = [{"cat": "Session", "name": "model_run", "ts": start, "dur": 100} for start in (0, 200, 400)]
    inside = [node("/model/layers.0/mlp/up/MatMul_kernel_time", start + 10, 30) for start in (0, 200, 400)]
    outside = [
        node("/model/layers.0/attn/MatMul_kernel_time", 250, 50),
        node("/model/layers.0/mlp/up/MatMul_fence_before", 260, 50),
    ]
    assert graphs.share_of([*calls, *inside, *outside], 2) == 0.3


def test_share_of_a_real_profile() -> None:
    assert 0 < graphs.mlp_share(folders.dense(), [2, 3, 4], [5, 6, 7], 1) < 1

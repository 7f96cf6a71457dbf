"""bench: the ratio is what the samples say, disturbed pairs do not count, and the record holds what is needed to judge it."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator
from typing import Any

import onnx_folders as folders
import pytest

from sparsegate.runtime_onnx import bench as bench_module
from sparsegate.runtime_onnx.bench import bench

SHORT = {"prompt_tokens": 16, "new_tokens": 8, "pairs": 3, "threads": 1}


def fixed(seconds: dict[str, Iterator[float]]) -> Any:
    """Passes that report given decode seconds, and twice that for prefill."""
    return lambda *_: {role: lambda values=values: (2 * (value := next(values)), value) for role, values in seconds.items()}


def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which no thread ever waits."""
    monkeypatch.setattr(bench_module, "_waited", lambda: 0.0)


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai"])
def test_record(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real folders: everything the record must hold, the ratio recomputed from its own samples, all of it JSON."""
    quiet(monkeypatch)
    counted: list[int] = []
    result = bench(folders.dense(), folders.sparse("predictor"), runtime=runtime, command="the command", progress=counted.append, **SHORT)
    assert json.loads(json.dumps(result)) == result
    assert counted == [1, 2, 3] and len(result["samples"]) == 3 and result["dropped"] == 0
    assert result["command"] == "the command" and result["versions"]["onnxruntime"] and result["machine"]["cpus"] >= 1
    for phase, count in (("prefill", 16), ("decode", 8)):
        seconds = {role: [sample[role][f"{phase}_s"] for sample in result["samples"]] for role in ("baseline", "candidate")}
        assert all(value > 0 for values in seconds.values() for value in values)
        ratios = [a / b for a, b in zip(seconds["baseline"], seconds["candidate"], strict=True)]
        assert result[phase]["ratio"] == statistics.median(ratios)
        assert result[phase]["verdict"] == ("faster" if statistics.median(ratios) > 1 else "not faster")
        assert result["candidate"][f"{phase}_tokens_per_s"] == pytest.approx(count / statistics.median(seconds["candidate"]))
    assert result["baseline"]["precision"]["variants"] == [] and "dense" in result["baseline"]["executor"]
    assert result["candidate"]["precision"]["variants"][0].startswith("GatedMLP.1/silu/predictor/float/")
    assert "native kernel" in result["candidate"]["executor"]
    weights = 3 * folders.HIDDEN * folders.NEURONS + folders.RANK * (folders.HIDDEN + folders.NEURONS) + folders.NEURONS
    extra = folders.LAYERS * (weights - 3 * folders.HIDDEN * folders.NEURONS) * 4
    assert result["candidate"]["precision"]["bytes"]["fp32"] == result["baseline"]["precision"]["bytes"]["fp32"] + extra


@pytest.mark.parametrize(("candidate", "ratio", "verdict"), [(0.05, 2.0, "faster"), (0.1, 1.0, "not faster"), (0.2, 0.5, "not faster")])
def test_verdict(candidate: float, ratio: float, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidate over baseline in tokens per second; 1 or less is not faster. One wild sample does not move the median."""
    quiet(monkeypatch)
    seconds = {"baseline": iter([9.0] + [0.1] * 5), "candidate": iter([0.001] + [candidate] * 3 + [5.0, candidate])}
    monkeypatch.setitem(bench_module._PASSES, "onnxruntime", fixed(seconds))
    result = bench(folders.dense(), folders.sparse("gate"), prompt_tokens=4, new_tokens=8, pairs=5)
    assert (result["decode"]["ratio"], result["decode"]["verdict"]) == (pytest.approx(ratio), verdict)
    assert result["decode"]["lowest"] == pytest.approx(0.02)
    assert result["candidate"]["decode_tokens_per_s"] == pytest.approx(8 / candidate)


def test_waiting_pairs_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair whose threads waited for a CPU does not count, here the slow one; if all waited, or waiting is unknown, the record says so."""
    waits = iter([0, 0, 0, 0, 0, 0, 50, 50, 50, 50, 50])  # one reading at the start, then two a pair: warm-up and three that count
    monkeypatch.setattr(bench_module, "_waited", lambda: next(waits))
    monkeypatch.setitem(bench_module._PASSES, "onnxruntime", fixed({"baseline": iter([1.0] * 4), "candidate": iter([1.0, 0.5, 8.0, 0.5])}))
    result = bench(folders.dense(), folders.sparse("gate"), prompt_tokens=4, new_tokens=8, pairs=3)
    assert result["dropped"] == 1 and len(result["samples"]) == 2 and result["decode"]["lowest"] == 2.0 and result["quiet"] is True
    ever = iter(range(100))
    monkeypatch.setattr(bench_module, "_waited", lambda: next(ever))
    ones = {"baseline": itertools.repeat(1.0), "candidate": itertools.repeat(1.0)}
    monkeypatch.setitem(bench_module._PASSES, "onnxruntime", fixed(ones))
    result = bench(folders.dense(), folders.sparse("gate"), **SHORT)
    assert result["quiet"] is False and len(result["samples"]) == 3 and result["dropped"] == 0 and "do not quote" in result["waits"]
    monkeypatch.setattr(bench_module, "_waited", lambda: None)
    result = bench(folders.dense(), folders.sparse("gate"), **SHORT)
    assert result["quiet"] is None and "not measured" in result["waits"]


def test_order_alternates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither model always goes first."""
    quiet(monkeypatch)
    calls: list[str] = []
    monkeypatch.setitem(
        bench_module._PASSES, "onnxruntime", lambda *_: {role: lambda role=role: (calls.append(role), (1.0, 1.0))[1] for role in ("baseline", "candidate")}
    )
    bench(folders.dense(), folders.sparse("gate"), prompt_tokens=4, new_tokens=8, pairs=2)
    assert calls[2:] == ["candidate", "baseline", "baseline", "candidate"] or calls[2:] == ["baseline", "candidate", "candidate", "baseline"]


def test_bad_arguments() -> None:
    """One line each."""
    dense, sparse = folders.dense(), folders.sparse("gate")
    for arguments, message in (
        ({"pairs": 0}, "pairs must be at least 1"),
        ({"new_tokens": 0}, "new_tokens must be at least 1"),
        ({"runtime": "torch"}, "runtime must be onnxruntime or onnxruntime-genai, got 'torch'"),
        ({"prompt_tokens": 250, "new_tokens": 10}, f"must fit the context of {folders.CONTEXT} tokens, got 250 \\+ 10"),
    ):
        with pytest.raises(ValueError, match=message):
            bench(dense, sparse, **arguments)
    with pytest.raises(ValueError, match="must be an ONNX folder"):
        bench(dense, sparse.parent / "none")

"""bench of folders: the ratio is what the samples say, disturbed pairs do not count, and the record holds what is
needed to judge it.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_folders as folders
import pytest

from sparsegate.runtime_onnx.bench import folders as folders_module
from sparsegate.runtime_onnx.bench import samples as samples_module
from sparsegate.runtime_onnx.bench.folders import BenchTiming, bench

SHORT = BenchTiming(16, 8, 3, threads=1)


class Fake:
    """A model that reports given decode seconds, and twice that for prefill."""

    def __init__(self, seconds: Iterator[float], called: Callable[[], Any] = lambda: None) -> None:
        self.seconds, self.called = seconds, called

    def greedy(self, ids: list[int], count: int) -> list[int]:
        return [1] * count

    def run(self, ids: list[int], following: list[int]) -> tuple[float, float]:
        self.called()
        value = next(self.seconds)
        return 2 * value, value


def fixed(monkeypatch: pytest.MonkeyPatch, baseline: Fake, candidate: Fake) -> None:
    """Folders open as these models: the dense one as the baseline."""
    monkeypatch.setitem(
        folders_module.RUNTIMES, "onnxruntime", lambda folder, *_: baseline if folder == folders.dense() else candidate
    )


def waits(monkeypatch: pytest.MonkeyPatch, readings: Iterator[Any]) -> None:
    monkeypatch.setattr(samples_module, "waited", lambda: next(readings))


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai"])
def test_record(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real folders: everything the record must hold, the ratio recomputed from its own samples, all of it JSON."""
    waits(monkeypatch, itertools.repeat(0.0))
    counted: list[int] = []
    result = bench(
        folders.dense(),
        folders.sparse("predictor"),
        SHORT,
        runtime=runtime,
        command="the command",
        progress=counted.append,
    )
    assert json.loads(json.dumps(result)) == result
    assert counted == [1, 2, 3] and len(result["samples"]) == 3 and result["dropped"] == 0
    assert result["command"] == "the command" and result["versions"]["onnxruntime"] and result["machine"]["cpus"] >= 1
    for phase, count in (("prefill", 16), ("decode", 8)):
        seconds = {
            role: [sample[role][f"{phase}_s"] for sample in result["samples"]] for role in ("baseline", "candidate")
        }
        assert all(value > 0 for values in seconds.values() for value in values)
        ratios = [a / b for a, b in zip(seconds["baseline"], seconds["candidate"], strict=True)]
        assert result[phase]["ratio"] == statistics.median(ratios)
        assert result[phase]["verdict"] == ("faster" if statistics.median(ratios) > 1 else "not faster")
        assert result["candidate"][f"{phase}_tokens_per_s"] == pytest.approx(
            count / statistics.median(seconds["candidate"])
        )
    assert result["baseline"]["precision"]["variants"] == [] and "dense" in result["baseline"]["executor"]
    assert result["candidate"]["precision"]["variants"][0].startswith("GatedMLP.1/silu/predictor/float/")
    assert "native kernel" in result["candidate"]["executor"]
    weights = 3 * folders.HIDDEN * folders.NEURONS + folders.RANK * (folders.HIDDEN + folders.NEURONS) + folders.NEURONS
    extra = folders.LAYERS * (weights - 3 * folders.HIDDEN * folders.NEURONS) * 4
    assert result["candidate"]["precision"]["bytes"]["fp32"] == result["baseline"]["precision"]["bytes"]["fp32"] + extra


@pytest.mark.parametrize(
    ("candidate", "ratio", "verdict"), [(0.05, 2.0, "faster"), (0.1, 1.0, "not faster"), (0.2, 0.5, "not faster")]
)
def test_verdict(candidate: float, ratio: float, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidate over baseline in tokens per second; 1 or less is not faster. One wild sample does not move
    the median.
    """
    waits(monkeypatch, itertools.repeat(0.0))
    fixed(monkeypatch, Fake(iter([9.0] + [0.1] * 5)), Fake(iter([0.001] + [candidate] * 3 + [5.0, candidate])))
    result = bench(folders.dense(), folders.sparse("gate"), BenchTiming(4, 8, 5))
    assert (result["decode"]["ratio"], result["decode"]["verdict"]) == (pytest.approx(ratio), verdict)
    assert result["decode"]["lowest"] == pytest.approx(0.02)
    assert result["candidate"]["decode_tokens_per_s"] == pytest.approx(8 / candidate)


def test_waiting_pairs_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair in which either waited for a CPU does not count, here the slow one; if all waited, or waiting is unknown,
    the record says so.
    """
    waits(
        monkeypatch, iter([0.0] * 9 + [50.0] + [50.0] * 6)
    )  # two readings a run: warm-up, a quiet pair, a disturbed one, a quiet one
    fixed(monkeypatch, Fake(iter([1.0] * 4)), Fake(iter([1.0, 0.5, 8.0, 0.5])))
    result = bench(folders.dense(), folders.sparse("gate"), BenchTiming(4, 8, 3))
    assert (
        result["dropped"] == 1
        and len(result["samples"]) == 2
        and result["decode"]["lowest"] == 2.0
        and result["quiet"] is True
    )
    ever = itertools.count()
    waits(monkeypatch, (float(value) for value in ever))
    fixed(monkeypatch, Fake(itertools.repeat(1.0)), Fake(itertools.repeat(1.0)))
    result = bench(folders.dense(), folders.sparse("gate"), SHORT)
    assert (
        result["quiet"] is False
        and len(result["samples"]) == 3
        and result["dropped"] == 0
        and "do not quote" in result["waits"]
    )
    for module in (samples_module, folders_module):
        monkeypatch.setattr(module, "waited", lambda: None)
    result = bench(folders.dense(), folders.sparse("gate"), SHORT)
    assert result["quiet"] is None and "not measured" in result["waits"]


def test_order_alternates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither model always goes first."""
    waits(monkeypatch, itertools.repeat(0.0))
    calls: list[str] = []
    fixed(
        monkeypatch,
        Fake(itertools.repeat(1.0), lambda: calls.append("b")),
        Fake(itertools.repeat(1.0), lambda: calls.append("c")),
    )
    bench(folders.dense(), folders.sparse("gate"), BenchTiming(4, 8, 4))
    rounds = ["".join(calls[k : k + 2]) for k in range(2, 10, 2)]
    assert sorted(rounds) == ["bc", "bc", "cb", "cb"]


def test_bad_arguments(tmp_path: Path) -> None:
    """One line each."""
    dense, sparse = folders.dense(), folders.sparse("gate")
    for arguments, message in (
        ({"timing": BenchTiming(pairs=0)}, "pairs must be at least 1"),
        ({"timing": BenchTiming(new_tokens=0)}, "new_tokens must be at least 1"),
        ({"runtime": "torch"}, "runtime must be onnxruntime or onnxruntime-genai, got 'torch'"),
        ({"timing": BenchTiming(250, 10)}, f"must fit the context of {folders.CONTEXT} tokens, got 250 \\+ 10"),
    ):
        with pytest.raises(ValueError, match=message):
            bench(dense, sparse, **arguments)
    with pytest.raises(ValueError, match="must be an ONNX folder"):
        bench(dense, tmp_path / "none")

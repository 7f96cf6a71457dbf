"""The harness's modes over all ops: a sample in which all pairs of properties occur; every variant in the
slow group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from sparsegate.runtime_onnx import library
from sparsegate.runtime_onnx.ops import OPS

from . import CASES, breaking, cases_of, support, testing, timing
from .case import ISAS, STORED, TOKENS, Case, formats, pairwise
from .sessions import forced_isa, has_isa, make_model, open_model, run

CPU, CUDA = library.PROVIDERS
SAMPLED = [pytest.param(stem, case, id=f"{stem}:{case.name}") for stem in CASES for case in cases_of(stem).SAMPLED]


def test_every_op_has_cases() -> None:
    assert set(CASES) == set(OPS)
    assert all(cases_of(stem).OP.__name__ == OPS[stem] for stem in OPS)


# test


@pytest.mark.parametrize(("stem", "case"), SAMPLED)
def test_kernel_meets_its_bound(stem: str, case: Case) -> None:
    """See `testing.check`: the bound, a dropped unit, and what must not change a bit."""
    if not has_isa(case.isa):
        pytest.skip(f"this CPU or library has no {case.isa}")
    assert testing.check(stem, case).problems == ()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("stem", CASES)
def test_every_variant_meets_its_bound(stem: str, part: int) -> None:
    cases = [case for i, case in enumerate(cases_of(stem).every_case()) if i % 8 == part and has_isa(case.isa)]
    results = [testing.check(stem, case) for case in cases]
    assert len(results) > 30
    assert [(result.case.name, result.problems) for result in results if result.problems] == []


def test_the_sample_holds_all_pairs() -> None:
    rows = pairwise({"a": (1, 2, 3), "b": (1, 2), "c": (0, 1)}, lambda row: not row["a"] == row["b"] == 1)
    pairs = {(row["a"], row["b"]) for row in rows}
    assert pairs == {(1, 2), (2, 1), (2, 2), (3, 1), (3, 2)}
    assert len({(row["a"], row["c"]) for row in rows}) == 6 and len({(row["b"], row["c"]) for row in rows}) == 4
    for stem in CASES:
        cases = cases_of(stem).SAMPLED
        assert {(case.variant.weights, case.isa) for case in cases} >= {
            (w, isa) for w in ("float", *STORED[3:]) for isa in ISAS
        }
        assert {(case.tokens, case.isa) for case in cases} == {(tokens, isa) for tokens in TOKENS for isa in ISAS}


@pytest.mark.parametrize("stem", CASES)
def test_a_wrong_kernel_is_seen(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expectation that is off by 1e-4, and one that depends on the number of tokens."""
    first = next(c for c in cases_of(stem).SAMPLED if c.variant.weights == "int8_row" and "tau" in c.variant.inputs)
    case = replace(
        first,
        variant=replace(first.variant, x="float32"),
        tokens=12,
        keep=0.5,
        sizes=cases_of(stem).SIZES[0],
        isa="portable",
    )
    assert testing.check(stem, case).problems == ()
    with monkeypatch.context() as patch:
        expected = cases_of(stem).expected
        patch.setattr(cases_of(stem), "expected", lambda *given: expected(*given) * 1.0001)
        assert "is above" in testing.check(stem, case).problems[0]
    real = testing.run
    monkeypatch.setattr(testing, "run", lambda session, x: real(session, x) + np.float32(len(x) == case.tokens))
    assert any("other bits" in problem for problem in testing.check(stem, case).problems)


@pytest.mark.parametrize("stem", CASES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stored", STORED)
def test_result_does_not_depend_on_the_number_of_tokens(stem: str, isa: str, stored: str) -> None:
    """Bit for bit: one call of 130 tokens (two passes) against calls of every smaller size; also one thread against
    two.
    """
    if not has_isa(isa):
        pytest.skip(f"this CPU or library has no {isa}")
    cases = cases_of(stem)
    first = next(
        c
        for c in cases.SAMPLED
        if c.variant.weights == formats(stored)[0] and c.variant.w == formats(stored)[1] and "tau" in c.variant.inputs
    )
    case = replace(
        first,
        variant=replace(first.variant, x="float32"),
        tokens=130,
        keep=0.4,
        sizes=cases.SIZES[1 if stored == "int4_g32" else -1],
    )
    x, tensors = cases.make(case, 130)
    model = make_model(cases.OP, case.variant, tensors, body=False)
    session = open_model(model)
    with forced_isa(isa):
        y = run(session, x)
        for step in (1, 2, 4, 5, 7, 64):
            np.testing.assert_array_equal(
                np.concatenate([run(session, x[i : i + step]) for i in range(0, 130, step)]), y
            )
        np.testing.assert_array_equal(run(open_model(model, threads=1), x), y)


# perf


def test_perf_prints_a_row_per_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """With the measurement itself, which has tests of its own, replaced."""
    dense = [{"name": "ONNX Runtime MatMul fp32", "ratio": 3.456}]
    speed = {"ms": 1.25, "gb_per_s": 20.0, "share_of_stream": 0.75, "dense": dense}
    row = {"format": "fp16", "tokens": 1, "score": "predictor", "asked": 0.2, "status": "run", **speed}
    rows = [row, {**row, "asked": 0.0, "warm_ms": 0.05}, {**row, "status": "not run: no kernel"}]

    def bench_op(workload: object, timing: object, keep: Callable[[dict], None]) -> None:
        for i in range(len(rows)):
            keep({"rows": rows[: i + 1]})

    monkeypatch.setattr(timing, "bench_op", bench_op)
    assert timing.main(["gated_mlp"], ISAS, False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "GatedMLP" in lines[0]
    assert "20%: 1.250 ms, 20.0 GB/s, 75% of the stream, 3.46 x ONNX Runtime MatMul fp32" in lines[1]
    assert "0%: 0.050 ms warm" in lines[2] and lines[3].endswith("not run: no kernel")


# support


@pytest.mark.parametrize("stem", CASES)
def test_the_cpu_runs_every_variant(stem: str) -> None:
    assert support.unsupported(stem, CPU) == []
    assert not any(value for row in support.table(stem, "TensorrtExecutionProvider").values() for value in row.values())


@pytest.mark.parametrize("stem", CASES)
def test_cuda_is_claimed_only_where_it_was_built(stem: str) -> None:
    built = CUDA.encode() in library.library_path().read_bytes()
    claimed = [value for row in support.table(stem, CUDA).values() for value in row.values()]
    assert any(claimed) == built


# break


@pytest.mark.parametrize("stem", CASES)
def test_broken_input_gives_an_error_or_the_documented_result(stem: str) -> None:
    """Every input on one of the builds, in turns."""
    isas = [isa for isa in ISAS if has_isa(isa)]
    names = [broken.name for broken in cases_of(stem).broken()]
    assert len(names) == len(set(names)) > 100
    for i, isa in enumerate(isas):
        found = breaking.survive(stem, isa, names[i :: len(isas)])
        assert {(isa, name, problem) for name, problem in found.items() if problem} == set()


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stem", CASES)
def test_broken_input_on_every_build(stem: str, isa: str) -> None:
    if not has_isa(isa):
        pytest.skip(f"this CPU or library has no {isa}")
    assert {name: problem for name, problem in breaking.survive(stem, isa).items() if problem} == {}


def test_a_crash_is_seen_and_the_rest_goes_on() -> None:
    name = next(iter(cases_of("gated_mlp").broken())).name
    found = breaking.survive("gated_mlp", "portable", [breaking.CONTROL, name])
    assert "died" in found[breaking.CONTROL] and found[name] == ""


@pytest.mark.parametrize("stem", CASES)
def test_a_wrong_outcome_is_seen(stem: str) -> None:
    inputs = list(cases_of(stem).broken())
    refused = next(broken for broken in inputs if broken.error)
    assert "expected another message" in breaking.attempt(stem, replace(refused, error="another message"))
    assert "expected a result" in breaking.attempt(stem, replace(refused, error=None))
    fine = next(broken for broken in inputs if broken.name.endswith("x inf others"))
    assert breaking.attempt(stem, fine) == ""
    assert "expected the error" in breaking.attempt(stem, replace(fine, error="x"))
    everything = breaking.others_untouched(
        fine.x, fine.tensors, np.zeros_like(fine.x), fine.tensors, np.ones(len(fine.x), bool)
    )
    assert "changed" in breaking.attempt(stem, replace(fine, judge=everything))
    assert breaking.same_numbers(np.array([1.0, np.nan]), np.array([1.0, 2.0])) and breaking.same_numbers(
        np.array([1.0]), np.array([1.01])
    )

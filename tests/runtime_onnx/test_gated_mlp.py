"""GatedMLP: variants, float64 reference, body in standard ops, and what of the CPU kernel the op harness
does not vary.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import checker, load_model_from_string
from op_harness.case import Case
from op_harness.gated_mlp import ACTIVATIONS, OP, make_tensors, make_variant, make_x, with_tau
from op_harness.sessions import make_model, nmse, open_model, run
from op_harness.testing import check

from sparsegate.runtime_onnx import library
from sparsegate.runtime_onnx.ops.activation import is_relu
from sparsegate.runtime_onnx.ops.gated_mlp import (
    BOUNDS,
    FLOATS,
    ROLES,
    SCORES,
    Variant,
    active,
    emulate,
    function,
    reference,
    scores,
    traffic,
)
from sparsegate.runtime_onnx.ops.margins import settled, sum_energy
from sparsegate.runtime_onnx.ops.vocabulary import WEIGHTS


def valid(activation: str, score: str, plain: bool) -> bool:
    return not (plain and activation == "drelu") and not (score == "exact" and not is_relu(activation))


COMBINATIONS = [c for c in itertools.product(ACTIVATIONS, SCORES, (False, True)) if valid(*c)]


# variants


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_name_is_inverted_by_parse(combination: tuple[str, str, bool], weights: str) -> None:
    activation, score, plain = combination
    variant = make_variant(activation, score, weights, plain=plain, bias=True, x="float16")
    assert Variant.parse(variant.name) == variant
    assert variant.attributes() == {
        "inputs": " ".join(variant.inputs),
        "activation": activation,
        "score": score,
        "weights": weights,
    }


def test_name_is_spelled_as_the_format_says() -> None:
    name = "GatedMLP.1/silu/predictor/float/x=float32,w=float16,p=int8/w_gate+w_up+w_down+tau+p1+p2+s_p1+s_p2"
    assert make_variant(w="float16", p="int8").name == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swish"}, "activation must be one of"),
        ({"score": "topk"}, "score must be one of"),
        ({"weights": "int3"}, "weights must be one of"),
        ({"x": "float64"}, "x must be one of"),
        ({"inputs": ("w_up", "w_gate", "w_down", "tau", "p1", "p2")}, "in the order"),
        ({"inputs": ("w_gate", "w_up", "tau", "p1", "p2")}, "Add or remove w_down"),
        ({"inputs": ("w_gate", "w_up", "w_down", "p1", "p2")}, "Add or remove tau"),
        ({"inputs": ("w_gate", "w_up", "w_down", "s_up", "tau", "p1", "p2")}, "Add or remove s_up"),
        ({"score": "all"}, "Add or remove tau p1 p2"),
        ({"p": "int8"}, "Add or remove s_p1 s_p2"),
        (
            {"score": "exact", "inputs": ("w_gate", "w_up", "w_down")},
            "relu, relu2, drelu, fatrelu, shifted_relu with score exact",
        ),
        ({"activation": "drelu", "inputs": ("w_up", "w_down", "tau", "p1", "p2")}, "must not be drelu without w_gate"),
    ],
)
def test_impossible_variants_are_refused(change: dict, message: str) -> None:
    fields = {
        "activation": "silu",
        "score": "predictor",
        "weights": "float",
        "inputs": ("w_gate", "w_up", "w_down", "tau", "p1", "p2"),
    }
    with pytest.raises(ValueError, match=message):
        Variant(**{**fields, **change})


@pytest.mark.parametrize(
    "name",
    [
        "",
        "GatedMLP.2/silu/all/float/x=float32,w=float32,p=float32/w_up+w_down",
        "GatedMLP.1/silu/all/float/w_up+w_down",
        "GatedMLP.1/silu/all/float/w=float32,x=float32,p=float32/w_up+w_down",
        "GatedMLP.1/silu/all/float/x=float32,w=float32,p=float32/",
    ],
)
def test_other_spellings_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must"):
        Variant.parse(name)


# reference


def by_hand(variant: Variant, x: list[float], t: dict[str, np.ndarray]) -> list[float]:
    """One token, one neuron after the other, in Python's own floats."""
    act = {
        "silu": lambda v: v / (1 + math.exp(-v)),
        "gelu": lambda v: v * 0.5 * math.erfc(-v / math.sqrt(2)),
        "gelu_tanh": lambda v: v / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
        "relu": lambda v: max(v, 0.0),
        "relu2": lambda v: max(v, 0.0) ** 2,
        "drelu": lambda v: max(v, 0.0),
        "identity": lambda v: v,
        "fatrelu(0.2)": lambda v: v if v > float(np.float32(0.2)) else 0.0,
        "shifted_relu(0.2)": lambda v: max(v - float(np.float32(0.2)), 0.0),
    }[variant.activation]

    def dot(row: np.ndarray, other: list[float]) -> float:
        return math.fsum(float(a) * b for a, b in zip(row, other, strict=True))

    hidden = [max(dot(row, x), 0.0) for row in t["p1"]] if "p1" in t else []
    y = [float(v) for v in t["b_down"]] if "b_down" in t else [0.0] * len(x)
    for i in range(len(t["w_up"])):
        up = dot(t["w_up"][i], x) + float(t["b_up"][i] if "b_up" in t else 0)
        gate = act(up) if variant.plain else act(dot(t["w_gate"][i], x) + float(t["b_gate"][i] if "b_gate" in t else 0))
        z = gate if variant.plain else gate * (max(up, 0.0) if variant.activation == "drelu" else up)
        s = {"predictor": lambda i=i: dot(t["p2"][i], hidden), "gate": lambda g=gate: abs(g)}.get(variant.score)
        if s is not None and not s() > float(t["tau"][i]):
            continue
        y = [a + z * float(b) for a, b in zip(y, t["w_down"][i], strict=True)]
    for h, row in zip(hidden, t.get("res", []), strict=False):
        y = [a + h * float(b) for a, b in zip(y, row, strict=True)]
    return y


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_reference_is_the_formula(combination: tuple[str, str, bool]) -> None:
    activation, score, plain = combination
    variant = make_variant(activation, score, plain=plain, bias=True, res=score != "all")
    x = make_x(variant, (3, 7))
    tensors = with_tau(variant, x, make_tensors(variant, 7, 11, 4), 0.4)
    expected = [by_hand(variant, [float(v) for v in row], tensors) for row in x]
    np.testing.assert_allclose(reference(variant, x, tensors), expected, rtol=1e-12, atol=1e-12)


def test_traffic_counts_what_a_token_reads() -> None:
    d, n, r = 64, 256, 16
    gate = make_variant(score="gate")
    assert traffic(gate, d, n, 0, 0.25) == 3 * n * d * 4 * (1 / 3 + 2 / 3 * 0.25) + 4 * n
    predictor = make_variant(w="float16", p="float16")
    assert traffic(predictor, d, n, r, 0.25) == 3 * n * d * 2 * 0.25 + 2 * (r * d + n * r) + 4 * n
    assert traffic(make_variant(score="all", weights="int8_row", bias=True), d, n, 0, 0.25) == 3 * n * (d + 4) + 4 * (
        2 * n + d
    )
    assert traffic(make_variant(score="all", weights="int4_g32"), d, n, 0, 1.0) == 3 * n * (d / 2 + d / 32 * 2)
    assert traffic(make_variant(p="int8"), d, n, r, 0.0) == r * (d + 4) + n * (r + 4) + 4 * n
    assert traffic(make_variant(score="gate", plain=True), d, n, 0, 0.5) == 2 * n * d * 4 * 0.75 + 4 * n


# body and kernel


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_body_and_kernel_compute_the_reference(combination: tuple[str, str, bool], extras: bool) -> None:
    activation, score, plain = combination
    variant = make_variant(activation, score, plain=plain, bias=extras, res=extras)
    d, n = 37, 101
    x = make_x(variant, (5, d))
    tensors = with_tau(variant, x, make_tensors(variant, d, n), 0.3)
    model = make_model(OP, variant, tensors)
    checker.check_model(load_model_from_string(model))
    body, kernel = run(open_model(model, native=False), x), run(open_model(model), x)
    assert nmse(kernel, reference(variant, x, tensors)) < BOUNDS["float32"]
    assert nmse(body, reference(variant, x, tensors)) < 1e-11  # ORT's own sums in float32
    assert nmse(body, kernel.astype(np.float64)) < 1e-11


@pytest.mark.parametrize("plain", [False, True])
def test_terms_that_cancel_leave_what_their_rounding_makes_of_them(plain: bool) -> None:
    """Of two tokens one has large channels that cancel in every product: its y is as inexact in float32 as these are,
    and the other's is not.
    """
    d, n = 256, 64
    variant = make_variant("silu", "all", "float", plain=plain)
    tensors, x = make_tensors(variant, d, n, 0, 0), make_x(variant, (2, d), 0)
    for part in ("up",) if plain else ("gate", "up"):
        tensors[f"w_{part}"][:, 1::2] = tensors[f"w_{part}"][:, ::2]
    x[0, ::2], x[0, 1::2] = 1e3 * x[0, ::2] + x[0, 1::2] / 100, -1e3 * x[0, ::2]
    expected, y = reference(variant, x, tensors), run(open_model(make_model(OP, variant, tensors)), x)
    size = np.square(expected).sum(1)
    error, own = np.square(y - expected).sum(1) / size, sum_energy(variant, x, tensors) / size
    assert 10 * BOUNDS["float32"] < error[0] < own[0] < 1000 * error[0]
    assert error[1] < BOUNDS["float32"] and own[1] < BOUNDS["float32"], "an ordinary token's bound stays as it is"


@pytest.mark.parametrize("opset", [20, 21, 22])
def test_body_takes_the_opset_of_the_graph(opset: int) -> None:
    assert function(make_variant("gelu_tanh"), "v3", opset).overload == "v3"
    assert [o.version for o in function(make_variant(), opset=opset).opset_import] == [opset]
    with pytest.raises(ValueError, match="opset must be at least 20, got 18"):
        function(make_variant(), opset=18)


@pytest.mark.parametrize("isa", [library.isa(), "portable"])
@pytest.mark.parametrize(
    ("weights", "score", "keep", "sizes"),
    [
        ("float", "predictor", 0.2, (1024, 4096, 64)),
        ("float", "predictor", 1.0, (1024, 4096, 64)),
        ("float", "gate", 0.2, (1024, 4096, 64)),
        ("float", "all", 1.0, (1024, 4096, 64)),
        ("int8_row", "gate", 0.2, (256, 4096, 64)),
        ("int4_g32", "predictor", 0.2, (64, 4096, 64)),
        ("int4_g32", "all", 1.0, (2048, 64, 64)),
    ],
)
def test_bound_holds_at_the_width_of_a_real_layer(
    weights: str, score: str, keep: float, sizes: tuple[int, int, int], isa: str
) -> None:
    """Rounding errors grow with the length of the sums. (4 bits: fewer values are rounded, so that tokens without one
    at a boundary are left.)
    """
    assert check("gated_mlp", Case(make_variant(score=score, weights=weights), sizes, 2, keep, isa)).problems == ()


def test_narrow_results_round_as_numpy_does() -> None:
    """y = x through an identity: subnormals, the largest values, infinity and NaN."""
    d = 16
    for name in ("float16", "bfloat16"):
        variant = make_variant("identity", "all", plain=True, x=name)
        tensors = {
            "w_up": np.eye(d, dtype=np.float32),
            "w_down": np.eye(d, dtype=np.float32) * np.float32(1.00048828125),
        }
        x = np.zeros((6, d), name)
        x[:, 0] = [65504 if name == "float16" else 3e38, 6e-8, 6.1e-5, -1.5, np.inf, np.nan]
        y = run(open_model(make_model(OP, variant, tensors)), x)[:, 0]
        with np.errstate(over="ignore"):
            expected = (x[:, 0].astype(np.float32) * np.float32(1.00048828125)).astype(name).astype(np.float32)
        np.testing.assert_array_equal(y[:4], expected[:4])
        assert np.isnan(y[5]) and np.isinf(expected[4])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("score", ["predictor", "gate"])
def test_a_score_at_the_threshold_is_not_kept(native: bool, score: str) -> None:
    """Small integers, so that scores are exact: at tau dropped, one step below tau kept."""
    variant = make_variant("identity", score)
    rng = np.random.default_rng(3)
    d, n, r, tokens = 24, 40, 6, 4
    x = rng.integers(-3, 4, (tokens, d)).astype(np.float32)
    tensors = {
        k: rng.integers(-3, 4, s).astype(np.float32)
        for k, s in {"w_gate": (n, d), "w_up": (n, d), "p1": (r, d), "p2": (n, r)}.items()
    }
    tensors |= {"w_down": np.eye(n, d, dtype=np.float32)}
    tensors = {k: v for k, v in tensors.items() if k in variant.inputs}
    tensors["w_gate"][:, 0] = 100  # no product is 0
    tensors["w_up"][:, 0] = 100
    x[:, 0] = 1
    at = scores(variant, x, {**tensors, "tau": np.zeros(n, np.float32)})[0].astype(np.float32)
    for tau, kept in ((at, False), (np.nextafter(at, np.float32(-np.inf)), True)):
        full = {**tensors, "tau": tau}
        y = run(open_model(make_model(OP, variant, full), native), x)[0, : min(n, d)]
        assert (active(variant, x, full)[0] == kept).all()
        assert ((y != 0) == kept).all()


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("native", [True, False])
def test_active_set_is_exact(native: bool, tokens: int) -> None:
    """Gate and up are 1, w_down is the identity: y is the mask itself."""
    n = d = 97
    variant = make_variant("identity", bias=True)
    x = make_x(variant, (tokens, d))
    tensors = make_tensors(variant, d, n)
    tensors |= {
        "w_gate": np.zeros((n, d), np.float32),
        "w_up": np.zeros((n, d), np.float32),
        "w_down": np.eye(n, dtype=np.float32),
    }
    tensors |= {"b_gate": np.ones(n, np.float32), "b_up": np.ones(n, np.float32), "b_down": np.zeros(d, np.float32)}
    tensors = with_tau(variant, x, tensors, 0.3)
    keep = active(variant, x, tensors)
    assert 0.2 < keep.mean() < 0.4
    np.testing.assert_array_equal(run(open_model(make_model(OP, variant, tensors), native), x), keep.astype(np.float32))


@pytest.mark.parametrize("native", [True, False])
def test_a_dropped_neuron_reaches_no_result(native: bool) -> None:
    """NaN in rows that no token, or only another token, keeps. (The body multiplies w_down by 0, so NaN there is the
    kernel's part.)
    """
    variant = make_variant()
    d, n = 40, 70
    x = make_x(variant, (2, d))
    tensors = with_tau(variant, x, make_tensors(variant, d, n), 0.5)
    keep = active(variant, x, tensors)
    lost, second = np.flatnonzero(~keep.any(0))[0], np.flatnonzero(~keep[0] & keep[1])[0]
    clean = run(open_model(make_model(OP, variant, tensors), native), x)
    for role in ("w_gate", "w_up", "w_down") if native else ("w_gate", "w_up"):
        for row in (lost, second):
            broken = tensors[role].copy()
            broken[row, 3] = np.nan
            y = run(open_model(make_model(OP, variant, {**tensors, role: broken}), native), x)
            np.testing.assert_array_equal(y[0], clean[0])
            assert np.isnan(y[1]).any() == (row == second)


@pytest.mark.parametrize("native", [True, False])
def test_x_of_any_rank(native: bool) -> None:
    variant = make_variant()
    tensors = make_tensors(variant, 24, 40)
    x = make_x(variant, (2, 3, 4, 24))
    tensors = with_tau(variant, x, tensors, 0.5)
    y = run(open_model(make_model(OP, variant, tensors, x_rank=4), native), x)
    for shape in ((24, 24), (4, 6, 24)):
        same = run(open_model(make_model(OP, variant, tensors, x_rank=len(shape)), native), x.reshape(shape))
        np.testing.assert_allclose(same, y.reshape(shape), rtol=1e-5, atol=1e-5)
    one = run(open_model(make_model(OP, variant, tensors, x_rank=1), native), x[0, 0, 0])
    np.testing.assert_allclose(one, y[0, 0, 0], rtol=1e-5, atol=1e-5)
    assert run(open_model(make_model(OP, variant, tensors, x_rank=3), native), x[0][:0]).shape == (0, 4, 24)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_kernel_is_the_reference_for_any_shape(data: st.DataObject) -> None:
    activation, score, plain = data.draw(st.sampled_from(COMBINATIONS))
    res, bias = data.draw(st.booleans()), data.draw(st.booleans())
    weights = data.draw(st.sampled_from(WEIGHTS))
    w = data.draw(st.sampled_from(FLOATS)) if weights == "float" else "float32"
    p = data.draw(st.sampled_from(FLOATS if res else (*FLOATS, "int8"))) if res or score == "predictor" else "float32"
    variant = make_variant(activation, score, weights, plain=plain, bias=bias, res=res, w=w, p=p)
    d = 32 * data.draw(st.integers(1, 9)) if weights == "int4_g32" else data.draw(st.integers(1, 280))
    n, r, tokens = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 9))
    seed = data.draw(st.integers(0, 99))
    x = make_x(variant, (tokens, d), seed)
    tensors = with_tau(
        variant, x, make_tensors(variant, d, n, r, seed), data.draw(st.sampled_from([0.0, "one", 0.2, 1.0]))
    )
    good = settled(variant, x, tensors)
    y = run(open_model(make_model(OP, variant, tensors)), x)
    expected = emulate(variant, x, tensors)
    scale = np.sqrt((expected**2).mean()) + 1
    assert np.abs(y - expected)[good].max(initial=0) < 2e-5 * scale
    assert set(variant.inputs) <= set(ROLES)

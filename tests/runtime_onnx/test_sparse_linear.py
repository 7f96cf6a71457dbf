"""SparseLinear: variants, float64 reference, body in standard ops, and what of the kernels the op harness does not
vary.
"""

from __future__ import annotations

import itertools
import math
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import checker, load_model_from_string
from op_harness.case import STORED, Case, formats
from op_harness.sessions import make_model, nmse, open_model, run
from op_harness.sparse_linear import OP, make_tensors, make_variant, make_x, with_tau
from op_harness.testing import check

from sparsegate.runtime_onnx import library
from sparsegate.runtime_onnx.ops.margins import sum_energy
from sparsegate.runtime_onnx.ops.sparse_linear import (
    BOUNDS,
    FLOATS,
    ROLES,
    Variant,
    active,
    emulate,
    function,
    reference,
    traffic,
)
from sparsegate.runtime_onnx.ops.vocabulary import WEIGHTS

CPU = "CPUExecutionProvider"


def stored_variant(stored: str, bias: bool = False, x: str = "float32") -> Variant:
    weights, w = formats(stored)
    return make_variant(weights, bias=bias, x=x, w=w)


# variants


@given(
    st.sampled_from(WEIGHTS),
    st.sets(st.sampled_from(ROLES), min_size=1),
    st.sampled_from((*FLOATS, "float64", "int8")),
    st.sampled_from((*FLOATS, "int8")),
)
@settings(max_examples=300, deadline=None)
def test_grammar_is_one_in_python_and_in_the_library(weights: str, roles: set[str], x: str, w: str) -> None:
    """A combination either makes a variant, whose name `parse` inverts and the library knows, or neither knows it."""
    inputs = tuple(role for role in ROLES if role in roles)
    name = f"SparseLinear.1/{weights}/x={x},w={w}/{'+'.join(inputs)}"
    try:
        variant = Variant(weights, inputs, x, w)
    except ValueError:
        assert not library.supports(name, CPU)
        with pytest.raises(ValueError, match="must"):
            Variant.parse(name)
    else:
        assert variant.name == name and Variant.parse(name) == variant and library.supports(name, CPU)
        assert variant.attributes() == {"inputs": " ".join(inputs), "weights": weights}


@pytest.mark.parametrize("order", itertools.permutations(("w", "b", "tau")))
def test_roles_have_one_order(order: tuple[str, ...]) -> None:
    name = "SparseLinear.1/float/x=float32,w=float32/" + "+".join(order)
    if order == ("w", "b", "tau"):
        assert Variant.parse(name).name == name
        return
    assert not library.supports(name, CPU)
    with pytest.raises(ValueError, match="in the order"):
        Variant.parse(name)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("SparseLinear.1", "SparseLinear.2"),
        ("float/", "int2/"),
        ("+tau", "+tau+zeta"),
        ("+tau", "+tau/more"),
        ("x=", "y="),
        ("w+b", "w b"),
    ],
)
def test_other_spellings_are_refused(old: str, new: str) -> None:
    name = make_variant(bias=True).name
    assert library.supports(name, CPU) and old in name
    assert not library.supports(name.replace(old, new, 1), CPU)
    with pytest.raises(ValueError, match="must"):
        Variant.parse(name.replace(old, new, 1))


def test_an_op_does_not_claim_the_other_s_names() -> None:
    assert not library.supports(make_variant().name.replace("SparseLinear", "GatedMLP"), CPU)
    assert not library.supports(make_variant().name, "TensorrtExecutionProvider")


# reference


@pytest.mark.parametrize("weights", WEIGHTS)
def test_reference_is_the_formula(weights: str) -> None:
    """One token, one channel after the other, in Python's own floats."""
    variant = make_variant(weights, bias=True)
    x = make_x(variant, (3, 7))
    t = with_tau(variant, x, make_tensors(variant, 7, 32), 0.5)
    for row, y in zip(x, reference(variant, x, t), strict=True):
        scale = t.get("s_w", np.ones(7)).reshape(7, -1)[:, 0]
        stored = (
            [[(int(b) >> 4 * half & 15) - 8 for b in line for half in (0, 1)] for line in t["w"]]
            if weights == "int4_g32"
            else t["w"].tolist()
        )
        kept = [j for j in range(7) if abs(float(row[j])) > float(t["tau"][j])]
        expected = [
            math.fsum([float(t["b"][c]), *(float(row[j]) * float(scale[j]) * stored[j][c] for j in kept)])
            for c in range(32)
        ]
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    assert reference(variant, x.reshape(3, 1, 7), t).shape == (3, 1, 32)


def test_traffic_counts_what_a_token_reads() -> None:
    assert traffic(make_variant(), 64, 256, 0.25) == 16 * 256 * 4 + 64 * 4
    assert traffic(make_variant(w="float16", bias=True), 64, 256, 0.5) == 32 * 256 * 2 + 256 * 4 + 64 * 4
    assert traffic(make_variant("int8_row"), 64, 256, 0.5) == 32 * (256 + 4) + 64 * 4
    assert traffic(make_variant("int4_g32"), 64, 256, 0.5) == 32 * (128 + 8 * 2) + 64 * 4


# body and kernel


@pytest.mark.parametrize("x_type", FLOATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stored", STORED)
def test_body_computes_the_reference(stored: str, bias: bool, x_type: str) -> None:
    """And for float weights what the kernel computes."""
    variant = stored_variant(stored, bias, x_type)
    x = make_x(variant, (5, 37))
    tensors = with_tau(variant, x, make_tensors(variant, 37, 96), 0.4)
    model = make_model(OP, variant, tensors)
    checker.check_model(load_model_from_string(model))
    body = run(open_model(model, native=False), x)
    assert nmse(body, reference(variant, x, tensors)) < (
        1e-11 if x_type == "float32" else BOUNDS[x_type]
    )  # ORT's own sums in float32
    if x_type == "float32" and variant.weights == "float":
        assert nmse(body, run(open_model(model), x).astype(np.float64)) < 1e-11


def test_body_takes_the_opset_of_the_graph() -> None:
    assert function(make_variant(), "v3", 21).overload == "v3"
    assert [o.version for o in function(make_variant(), opset=18).opset_import] == [18]
    with pytest.raises(ValueError, match="opset must be at least 18, got 17"):
        function(make_variant(), opset=17)


@pytest.mark.parametrize("isa", [library.isa(), "portable"])
@pytest.mark.parametrize("stored", ["float32", "int8_row", "int4_g32"])
@pytest.mark.parametrize("keep", [0.2, 1.0])
def test_bound_holds_at_the_width_of_a_real_layer(keep: float, stored: str, isa: str) -> None:
    """Rounding errors grow with the length of the sums."""
    assert check("sparse_linear", Case(stored_variant(stored), (8192, 256), 2, keep, isa)).problems == ()


@pytest.mark.parametrize("x_type", FLOATS)
@pytest.mark.parametrize("native", [True, False])
def test_active_set_is_exact_and_a_value_at_the_threshold_is_not_kept(native: bool, x_type: str) -> None:
    """w is the identity: y is the masked x itself. Of both signs; at tau dropped, one step below tau kept."""
    d = 97
    variant = make_variant(x=x_type)
    x = make_x(variant, (9, d))
    x[:, 0] = 0
    tensors = {"w": np.eye(d, dtype=np.float32)}
    at = np.abs(x[0].astype(np.float32))
    for tau, kept in ((at, False), (np.nextafter(at, np.float32(-np.inf)), True)):
        full = {**tensors, "tau": tau}
        y = run(open_model(make_model(OP, variant, full), native), x)
        assert (active(variant, x, full)[0] == kept).all()
        np.testing.assert_array_equal(y, np.where(active(variant, x, full), x.astype(np.float32), 0))
        assert 0.1 < active(variant, x[1:], full).mean() < 0.9


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("native", [True, False])
def test_a_nan_is_not_kept_and_infinity_is(native: bool, tokens: int) -> None:
    variant = make_variant(bias=True)
    x = make_x(variant, (tokens, 50))
    tensors = with_tau(variant, x, make_tensors(variant, 50, 70), 0.6)
    session = open_model(make_model(OP, variant, tensors), native)
    broken, zero = x.copy(), x.copy()
    broken[0, 11], zero[0, 11] = np.nan, 0.0
    np.testing.assert_array_equal(run(session, broken), run(session, zero))
    broken[0, 11] = np.inf
    y = run(session, broken)
    assert not np.isfinite(y[0]).any()
    np.testing.assert_array_equal(y[1:], run(session, x)[1:])


def test_terms_that_cancel_leave_what_their_rounding_makes_of_them() -> None:
    """As for GatedMLP: of two tokens one has large channels that cancel in every column."""
    d_in, d_out = 256, 64
    variant = make_variant()
    x = make_x(variant, (2, d_in))
    tensors = with_tau(variant, x, make_tensors(variant, d_in, d_out), 1.0)
    tensors["w"][1::2] = tensors["w"][::2]
    x[0, ::2], x[0, 1::2] = 1e3 * x[0, ::2] + x[0, 1::2] / 100, -1e3 * x[0, ::2]
    expected, y = reference(variant, x, tensors), run(open_model(make_model(OP, variant, tensors)), x)
    size = np.square(expected).sum(1)
    error, own = np.square(y - expected).sum(1) / size, sum_energy(variant, x, tensors) / size
    assert 10 * BOUNDS["float32"] < error[0] < own[0] < 1000 * error[0]
    assert error[1] < BOUNDS["float32"] and own[1] < 2 * BOUNDS["float32"], "an ordinary token's bound hardly moves"


def test_a_dropped_channel_reaches_no_result() -> None:
    """NaN in rows that no token, or only another token, keeps. (The body multiplies the row by 0, so this is the
    kernel's part.)
    """
    variant = make_variant()
    x = make_x(variant, (7, 40))
    tensors = with_tau(variant, x, make_tensors(variant, 40, 70), 0.3)
    keep = active(variant, x, tensors)
    lost, second = np.flatnonzero(~keep.any(0))[0], np.flatnonzero(~keep[0] & keep[1])[0]
    clean = run(open_model(make_model(OP, variant, tensors)), x)
    for row in (lost, second):
        w = tensors["w"].copy()
        w[row, 3] = np.nan
        y = run(open_model(make_model(OP, variant, {**tensors, "w": w})), x)
        np.testing.assert_array_equal(np.isnan(y[:, 3]), keep[:, row])
        np.testing.assert_array_equal(y[~keep[:, row]], clean[~keep[:, row]])


@pytest.mark.parametrize("native", [True, False])
def test_x_of_any_rank(native: bool) -> None:
    variant = make_variant()
    x = make_x(variant, (2, 3, 4, 24))
    tensors = with_tau(variant, x, make_tensors(variant, 24, 40), 0.5)
    y = run(open_model(make_model(OP, variant, tensors, x_rank=4), native), x)
    assert y.shape == (2, 3, 4, 40)
    for shape in ((24, 24), (4, 6, 24)):
        same = run(open_model(make_model(OP, variant, tensors, x_rank=len(shape)), native), x.reshape(shape))
        np.testing.assert_allclose(same, y.reshape(*shape[:-1], 40), rtol=1e-5, atol=1e-5)
    one = run(open_model(make_model(OP, variant, tensors, x_rank=1), native), x[0, 0, 0])
    np.testing.assert_allclose(one, y[0, 0, 0], rtol=1e-5, atol=1e-5)
    assert run(open_model(make_model(OP, variant, tensors, x_rank=3), native), x[0][:0]).shape == (0, 4, 40)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_kernel_is_the_reference_for_any_shape(data: st.DataObject) -> None:
    variant = stored_variant(data.draw(st.sampled_from(STORED)), data.draw(st.booleans()))
    d_in, tokens = data.draw(st.integers(1, 1200)), data.draw(st.integers(1, 9))
    d_out = 32 * data.draw(st.integers(1, 20)) if variant.weights == "int4_g32" else data.draw(st.integers(1, 600))
    seed = data.draw(st.integers(0, 99))
    x = make_x(variant, (tokens, d_in), seed)
    tensors = with_tau(
        variant, x, make_tensors(variant, d_in, d_out, seed), data.draw(st.sampled_from([0.0, "one", 0.2, 1.0]))
    )
    y = run(open_model(make_model(OP, variant, tensors)), x)
    expected = emulate(variant, x, tensors)
    assert np.abs(y - expected).max() < 2e-5 * (np.sqrt((expected**2).mean()) + 1)


# threads and inputs


def test_weights_may_be_graph_inputs_and_another_width_is_named() -> None:
    variant = make_variant(bias=True)
    x = make_x(variant, (3, 24))
    tensors = with_tau(variant, x, make_tensors(variant, 24, 40), 0.4)
    session = open_model(make_model(OP, variant, tensors, fed=variant.inputs))
    np.testing.assert_array_equal(run(session, x, **tensors), run(open_model(make_model(OP, variant, tensors)), x))
    with pytest.raises(
        Exception, match=re.escape("SparseLinear node: input x must be float32 [..., 24], got float32 [3, 23]")
    ):
        run(session, x[:, :23], **tensors)


def test_concurrent_runs_get_their_own_results() -> None:
    """Six threads on one session, each with other tokens and another number of them."""
    variant = make_variant(bias=True)
    x = make_x(variant, (40, 547))
    tensors = with_tau(variant, x, make_tensors(variant, 547, 683), 0.3)
    session = open_model(make_model(OP, variant, tensors))
    expected = run(session, x)

    def work(seed: int) -> int:
        rng = np.random.default_rng(seed)
        wrong = 0
        for _ in range(30):
            first, last = np.sort(rng.choice(41, 2, replace=False))
            wrong += not np.array_equal(run(session, x[first:last]), expected[first:last])
        return wrong

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(work, range(6))) == 0

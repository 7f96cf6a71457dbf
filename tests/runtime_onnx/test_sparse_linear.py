"""SparseLinear: variants, float64 reference, body in standard ops, and the CPU kernel against both."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest
from gated_mlp_cases import nmse, open_model, run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import checker, load_model_from_string
from sparse_linear_cases import make_model, make_tensors, make_variant, make_x, with_tau, without_one

from sparsegate.runtime_onnx import library
from sparsegate.runtime_onnx.ops.sparse_linear import BOUNDS, FLOATS, ROLES, WEIGHTS, Variant, active, emulate, function, reference, traffic

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
STORED = ["float32", "float16", "bfloat16", "int8_row"]


@pytest.fixture(params=["avx512vnni", "avx512", "avx2", "portable"])
def force_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on every build of the CPU kernels that this machine has."""
    handle = library._open(library.library_path())
    if not handle.sparsegate_force_isa(request.param.encode()):
        pytest.skip(f"this CPU or library has no {request.param}")
    assert library.isa() == request.param
    yield request.param
    handle.sparsegate_force_isa(b"auto")


def stored_variant(stored: str, bias: bool = False, x: str = "float32") -> Variant:
    return make_variant("int8_row", bias=bias, x=x) if stored == "int8_row" else make_variant(w=stored, bias=bias, x=x)


def checked(variant: Variant, x: np.ndarray, tensors: dict[str, np.ndarray], y: np.ndarray) -> None:
    """y meets the variant's bound, and the reference with one channel dropped does not."""
    bound = BOUNDS["int8_row"] if variant.weights == "int8_row" and variant.x == "float32" else BOUNDS[variant.x]
    expected = (reference if variant.weights == "float" else emulate)(variant, x, tensors)
    assert nmse(y, expected) < bound
    control = without_one(variant, x, tensors)
    if control is not None:
        assert nmse(y, control) > bound


# variants


@given(st.sampled_from(WEIGHTS), st.sets(st.sampled_from(ROLES), min_size=1), st.sampled_from((*FLOATS, "float64", "int8")), st.sampled_from((*FLOATS, "int8")))
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
    ("old", "new"), [("SparseLinear.1", "SparseLinear.2"), ("float/", "int4_g32/"), ("+tau", "+tau+zeta"), ("+tau", "+tau/more"), ("x=", "y="), ("w+b", "w b")]
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
    t = with_tau(variant, x, make_tensors(variant, 7, 5), 0.5)
    for row, y in zip(x, reference(variant, x, t), strict=True):
        scale = t.get("s_w", np.ones(7))
        kept = [j for j in range(7) if abs(float(row[j])) > float(t["tau"][j])]
        expected = [math.fsum([float(t["b"][c]), *(float(row[j]) * float(scale[j]) * float(t["w"][j, c]) for j in kept)]) for c in range(5)]
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    assert reference(variant, x.reshape(3, 1, 7), t).shape == (3, 1, 5)


def test_traffic_counts_what_a_token_reads() -> None:
    assert traffic(make_variant(), 64, 256, 0.25) == 16 * 256 * 4 + 64 * 4
    assert traffic(make_variant(w="float16", bias=True), 64, 256, 0.5) == 32 * 256 * 2 + 256 * 4 + 64 * 4
    assert traffic(make_variant("int8_row"), 64, 256, 0.5) == 32 * (256 + 4) + 64 * 4


# body and kernel


@pytest.mark.parametrize("x_type", FLOATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stored", STORED)
def test_body_and_kernel_compute_the_reference(stored: str, bias: bool, x_type: str) -> None:
    variant = stored_variant(stored, bias, x_type)
    x = make_x(variant, (5, 37))
    tensors = with_tau(variant, x, make_tensors(variant, 37, 101), 0.4)
    model = make_model(variant, tensors)
    checker.check_model(load_model_from_string(model))
    body, kernel = run(open_model(model, native=False), x), run(open_model(model), x)
    checked(variant, x, tensors, kernel)
    assert nmse(body, reference(variant, x, tensors)) < (1e-11 if x_type == "float32" else BOUNDS[x_type])  # ORT's own sums in float32
    if x_type == "float32":
        assert nmse(body, kernel.astype(np.float64)) < 1e-11
    else:
        assert nmse(kernel, kernel.astype(x_type).astype(np.float64)) == 0  # y is of x's dtype


def test_body_takes_the_opset_of_the_graph() -> None:
    assert function(make_variant(), "v3", 21).overload == "v3"
    assert [o.version for o in function(make_variant(), opset=18).opset_import] == [18]
    with pytest.raises(ValueError, match="opset must be at least 13, got 9"):
        function(make_variant(), opset=9)


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
@pytest.mark.parametrize("stored", STORED)
def test_kernel_meets_its_bound(force_isa: str, stored: str, tokens: int, keep: float) -> None:
    """Every build; odd sizes, so that every row has a tail; more than one chunk of channels and more than one strip of columns."""
    variant = stored_variant(stored)
    x = make_x(variant, (tokens, 547))
    tensors = with_tau(variant, x, make_tensors(variant, 547, 683), keep)
    y = run(open_model(make_model(variant, tensors)), x)
    assert active(variant, x, tensors).mean() == pytest.approx(keep, abs=0.1)
    if keep == 0.0:
        assert not active(variant, x, tensors).any() and not y.any()
    checked(variant, x, tensors, y)


@pytest.mark.parametrize("keep", [0.2, 1.0])
def test_bound_holds_at_the_width_of_a_real_layer(keep: float) -> None:
    """Rounding errors grow with the length of the sums."""
    variant = make_variant()
    x = make_x(variant, (2, 8192))
    tensors = with_tau(variant, x, make_tensors(variant, 8192, 256), keep)
    checked(variant, x, tensors, run(open_model(make_model(variant, tensors)), x))


@pytest.mark.parametrize("stored", STORED)
def test_result_does_not_depend_on_the_number_of_tokens(force_isa: str, stored: str) -> None:
    """Bit for bit: one call of 130 tokens (three passes) against calls of 1, 2, 7 and 64; also one thread against two."""
    variant = stored_variant(stored, bias=True)
    tokens = 130
    x = make_x(variant, (tokens, 547))
    tensors = with_tau(variant, x, make_tensors(variant, 547, 683), 0.4)
    model = make_model(variant, tensors)
    session = open_model(model)
    y = run(session, x)
    for step in (1, 2, 7, 64):
        parts = np.concatenate([run(session, x[i : i + step]) for i in range(0, tokens, step)])
        np.testing.assert_array_equal(parts, y)
    np.testing.assert_array_equal(run(open_model(model, threads=1), x), y)


def test_avx_builds_agree_bit_for_bit() -> None:
    handle = library._open(library.library_path())
    variant = make_variant(w="float16", bias=True)
    x = make_x(variant, (9, 93))
    tensors = with_tau(variant, x, make_tensors(variant, 93, 200), 0.3)
    session = open_model(make_model(variant, tensors))
    try:
        results = [run(session, x) for name in (b"avx512vnni", b"avx512", b"avx2") if handle.sparsegate_force_isa(name)]
    finally:
        handle.sparsegate_force_isa(b"auto")
    if len(results) < 2:
        pytest.skip("this CPU has at most one of these builds")
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


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
        y = run(open_model(make_model(variant, full), native), x)
        assert (active(variant, x, full)[0] == kept).all()
        np.testing.assert_array_equal(y, np.where(active(variant, x, full), x.astype(np.float32), 0))
        assert 0.1 < active(variant, x[1:], full).mean() < 0.9


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("native", [True, False])
def test_a_nan_is_not_kept_and_infinity_is(native: bool, tokens: int) -> None:
    variant = make_variant(bias=True)
    x = make_x(variant, (tokens, 50))
    tensors = with_tau(variant, x, make_tensors(variant, 50, 70), 0.6)
    session = open_model(make_model(variant, tensors), native)
    broken, zero = x.copy(), x.copy()
    broken[0, 11], zero[0, 11] = np.nan, 0.0
    np.testing.assert_array_equal(run(session, broken), run(session, zero))
    broken[0, 11] = np.inf
    y = run(session, broken)
    assert not np.isfinite(y[0]).any()
    np.testing.assert_array_equal(y[1:], run(session, x)[1:])


def test_a_dropped_channel_reaches_no_result() -> None:
    """NaN in rows that no token, or only another token, keeps. (The body multiplies the row by 0, so this is the kernel's part.)"""
    variant = make_variant()
    x = make_x(variant, (7, 40))
    tensors = with_tau(variant, x, make_tensors(variant, 40, 70), 0.3)
    keep = active(variant, x, tensors)
    lost, second = np.flatnonzero(~keep.any(0))[0], np.flatnonzero(~keep[0] & keep[1])[0]
    clean = run(open_model(make_model(variant, tensors)), x)
    for row in (lost, second):
        w = tensors["w"].copy()
        w[row, 3] = np.nan
        y = run(open_model(make_model(variant, {**tensors, "w": w})), x)
        np.testing.assert_array_equal(np.isnan(y[:, 3]), keep[:, row])
        np.testing.assert_array_equal(y[~keep[:, row]], clean[~keep[:, row]])


@pytest.mark.parametrize("native", [True, False])
def test_x_of_any_rank(native: bool) -> None:
    variant = make_variant()
    x = make_x(variant, (2, 3, 4, 24))
    tensors = with_tau(variant, x, make_tensors(variant, 24, 40), 0.5)
    y = run(open_model(make_model(variant, tensors, x_rank=4), native), x)
    assert y.shape == (2, 3, 4, 40)
    for shape in ((24, 24), (4, 6, 24)):
        same = run(open_model(make_model(variant, tensors, x_rank=len(shape)), native), x.reshape(shape))
        np.testing.assert_allclose(same, y.reshape(*shape[:-1], 40), rtol=1e-5, atol=1e-5)
    one = run(open_model(make_model(variant, tensors, x_rank=1), native), x[0, 0, 0])
    np.testing.assert_allclose(one, y[0, 0, 0], rtol=1e-5, atol=1e-5)
    assert run(open_model(make_model(variant, tensors, x_rank=3), native), x[0][:0]).shape == (0, 4, 40)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_kernel_is_the_reference_for_any_shape(data: st.DataObject) -> None:
    variant = stored_variant(data.draw(st.sampled_from(STORED)), data.draw(st.booleans()))
    d_in, d_out, tokens = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 600)), data.draw(st.integers(1, 9))
    seed = data.draw(st.integers(0, 99))
    x = make_x(variant, (tokens, d_in), seed)
    tensors = with_tau(variant, x, make_tensors(variant, d_in, d_out, seed), data.draw(st.sampled_from([0.0, 0.2, 1.0])))
    y = run(open_model(make_model(variant, tensors)), x)
    expected = reference(variant, x, tensors)
    assert np.abs(y - expected).max() < 2e-5 * (np.sqrt((expected**2).mean()) + 1)


# CUDA: compiled where nvcc is found; running it needs a GPU


def test_cuda_is_claimed_only_where_it_was_built() -> None:
    built = CUDA.encode() in library.library_path().read_bytes()
    assert all(library.supports(stored_variant(stored, x="float16").name, CUDA) == built for stored in STORED)


@pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason="onnxruntime has no CUDA provider")
@pytest.mark.parametrize("stored", STORED)
def test_cuda_kernel_computes_the_reference(stored: str) -> None:
    variant = stored_variant(stored, bias=True)
    if not library.supports(variant.name, CUDA):
        pytest.skip("the library was built without CUDA")
    x = make_x(variant, (5, 547))
    tensors = with_tau(variant, x, make_tensors(variant, 547, 683), 0.3)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library.library_path()))
    session = ort.InferenceSession(make_model(variant, tensors), options, providers=[CUDA, CPU])
    if session.get_providers()[0] != CUDA:
        pytest.skip("no GPU")
    checked(variant, x, tensors, run(session, x))


# errors and threads


def bad(role: str, shape: tuple[int, ...], dtype: str = "float32") -> dict[str, np.ndarray]:
    return {role: np.zeros(shape, dtype)}


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bad("w", (24,)), "input w must be float32, float16 or bfloat16 [d_in, d_out], got float32 [24]"),
        (bad("w", (0, 40)), "input w must be float32, float16 or bfloat16 [d_in, d_out], got float32 [0, 40]"),
        (bad("w", (24, 40), "int8"), "input w must be float32, float16 or bfloat16 [d_in, d_out], got int8 [24, 40]"),
        (bad("tau", (1,)), "input tau must be float32 [24], got float32 [1]"),
        (bad("tau", (24,), "float16"), "input tau must be float32 [24], got float16 [24]"),
        (bad("tau", (24, 1)), "input tau must be float32 [24], got float32 [24, 1]"),
        (bad("b", (24,)), "input b must be float32 [40], got float32 [24]"),
    ],
)
def test_bad_tensors_are_named(change: dict[str, np.ndarray], message: str, constant: bool) -> None:
    """Constants are refused when the session is made, graph inputs when it runs."""
    variant = make_variant(bias=True)
    tensors = make_tensors(variant, 24, 40) | {"tau": np.zeros(24, np.float32)} | change
    model = make_model(variant, tensors, fed=() if constant else tuple(change))
    with pytest.raises(Exception, match=re.escape(f"SparseLinear linear: {message}")):
        run(open_model(model), np.zeros((1, 24), np.float32), **({} if constant else change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "int4_g32"}, "attribute weights must be one of float, int8_row, got 'int4_g32'"),
        ({"weights": "int8_row"}, "inputs must hold s_w with weights int8_row"),
        ({"inputs": "w b"}, "inputs must hold tau"),
        ({"inputs": "b w tau"}, "attribute inputs must name roles in the order w, s_w, b, tau"),
        ({"inputs": "w tau"}, "attribute inputs must name every input after x, got 4 inputs"),
        ({"inputs": ""}, "attribute inputs must name roles in the order"),
    ],
)
def test_bad_attributes_are_named(change: dict[str, str], message: str) -> None:
    variant = make_variant(bias=True)
    tensors = make_tensors(variant, 24, 40) | {"tau": np.zeros(24, np.float32)}
    with pytest.raises(Exception, match=re.escape(f"SparseLinear linear: {message}")):
        open_model(make_model(variant, tensors, attributes={**variant.attributes(), **change}))


def test_weights_may_be_graph_inputs_and_another_width_is_named() -> None:
    variant = make_variant(bias=True)
    x = make_x(variant, (3, 24))
    tensors = with_tau(variant, x, make_tensors(variant, 24, 40), 0.4)
    session = open_model(make_model(variant, tensors, fed=variant.inputs))
    np.testing.assert_array_equal(run(session, x, **tensors), run(open_model(make_model(variant, tensors)), x))
    with pytest.raises(Exception, match=re.escape("SparseLinear linear: input x must be float32 [..., 24], got float32 [3, 23]")):
        run(session, x[:, :23], **tensors)


def test_concurrent_runs_get_their_own_results() -> None:
    """Six threads on one session, each with other tokens and another number of them."""
    variant = make_variant(bias=True)
    x = make_x(variant, (40, 547))
    tensors = with_tau(variant, x, make_tensors(variant, 547, 683), 0.3)
    session = open_model(make_model(variant, tensors))
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

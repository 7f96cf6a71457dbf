"""Spellings of activations, their values, and what score exact keeps of a GatedMLP."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from op_harness.gated_mlp import OP, make_tensors, make_variant, make_x, with_tau
from op_harness.sessions import make_model, nmse, open_model, run

from sparsegate.runtime_onnx.ops.activation import activate, is_relu, spell_activation, split_activation
from sparsegate.runtime_onnx.ops.gated_mlp import _product, active, opened, reference, traffic
from sparsegate.runtime_onnx.ops.vocabulary import ACTIVATIONS

SPELLED = [
    ("fatrelu", 0.01, "fatrelu(0.01)"),
    ("fatrelu", 0.0, "fatrelu(0.0)"),
    ("fatrelu", -0.0, "fatrelu(0.0)"),
    ("fatrelu", 1e-5, "fatrelu(0.00001)"),
    ("fatrelu", 1 / 3, "fatrelu(0.33333334)"),
    ("fatrelu", np.float32(0.01), "fatrelu(0.01)"),
    ("shifted_relu", 1, "shifted_relu(1.0)"),
    ("shifted_relu", -2.5, "shifted_relu(-2.5)"),
    ("silu", 0.0, "silu"),
]


@pytest.mark.parametrize(("kind", "parameter", "text"), SPELLED)
def test_a_parameter_has_one_spelling(kind: str, parameter: float, text: str) -> None:
    assert spell_activation(kind, parameter) == text
    found, value = split_activation(text)
    assert (found, np.float32(value)) == (kind, np.float32(parameter))


@pytest.mark.parametrize(
    "text",
    "swish fatrelu fatrelu() fatrelu(-0.1) fatrelu(nan) fatrelu(inf) fatrelu(1e-5) fatrelu(1) fatrelu(.1) "
    "fatrelu(0.010) fatrelu(00.1) relu(1.0) "
    "fatrelu(0.0100000001) fatrelu(2000000.0) shifted_relu(-0.0) shifted_relu(+1.0) shifted_relu(-2000000.0)".split()
    + ["fatrelu(0.01) ", "fatrelu(0.01)\n"],
)
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="activation(.s parameter)? must"):
        split_activation(text)


@given(st.floats(0, 1e6, width=32))
def test_every_parameter_comes_back(value: float) -> None:
    assert np.float32(split_activation(spell_activation("fatrelu", value))[1]) == np.float32(value)


def test_values() -> None:
    third = np.float32(0.3)
    v = np.array([-1.0, 0.0, 0.25, third, np.nextafter(third, np.float32(1)), 2.0, np.nan])
    np.testing.assert_array_equal(activate("fatrelu(0.3)", v), [0, 0, 0, 0, v[4], 2.0, np.nan])
    np.testing.assert_array_equal(activate("shifted_relu(0.25)", v), [0, 0, 0, v[3] - 0.25, v[4] - 0.25, 1.75, np.nan])
    np.testing.assert_array_equal(activate("shifted_relu(-0.5)", v[:3]), [0, 0.5, 0.75])
    assert [text for text in ACTIVATIONS if is_relu(text)] == ["relu", "relu2", "drelu"]


ACTIVATED = {
    "relu": lambda g, u: g * (g > 0) * u,
    "relu2": lambda g, u: g * g * (g > 0) * u,
    "drelu": lambda g, u: g * (g > 0) * u * (u > 0),
    "fatrelu(0.5)": lambda g, u: g * (g > 0.5) * u,
    "shifted_relu(0.5)": lambda g, u: (g - 0.5) * (g > 0.5) * u,
    "shifted_relu(-0.5)": lambda g, u: (g + 0.5) * (g > -0.5) * u,
}


@pytest.mark.parametrize("text", ACTIVATED)
def test_exact_keeps_what_is_not_zero(text: str) -> None:
    """Gate first: the gate in full, up where the gate opens, down where the product is not zero."""
    variant = make_variant(text, "exact")
    x = make_x(variant, (6, 24))
    t = make_tensors(variant, 24, 60)
    wide = {role: array.astype(np.float64) for role, array in t.items()}
    gate, up = x.astype(np.float64) @ wide["w_gate"].T, x.astype(np.float64) @ wide["w_up"].T
    z = ACTIVATED[text](gate, up)
    y = z @ wide["w_down"]
    np.testing.assert_allclose(reference(variant, x, t), y, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(active(variant, x, t), z != 0)
    np.testing.assert_array_equal(opened(variant, x, t), ACTIVATED[text](gate, np.ones_like(up)) != 0)
    assert 0.1 < (z != 0).mean() < 0.8
    assert nmse(run(open_model(make_model(OP, variant, t), native=False), x), y) < 1e-11
    strongest = np.abs(z).sum(0).argmax()
    assert (
        nmse(
            run(
                open_model(
                    make_model(OP, variant, {**t, "w_down": t["w_down"] * (np.arange(60) != strongest)[:, None]}),
                    native=False,
                ),
                x,
            ),
            y,
        )
        > 1e-3
    )


def test_exact_keeps_nan() -> None:
    variant = make_variant("drelu", "exact")
    x = make_x(variant, (8, 24))
    t = make_tensors(variant, 24, 60)
    t["w_up"][7] = np.nan
    open_gate = opened(variant, x, t)
    assert open_gate[:, 7].any() and not open_gate[:, 7].all()
    assert open_gate[:, 7].tolist() == active(variant, x, t)[:, 7].tolist()
    assert np.isnan(reference(variant, x, t)).all(1).tolist() == open_gate[:, 7].tolist()


def test_traffic_of_both_signs() -> None:
    d, n = 64, 256
    exact = make_variant("drelu", "exact")
    assert traffic(exact, d, n, 0, 0.0625, 0.25) == n * d * 4 * (1 + 0.25 + 0.0625)
    assert traffic(exact, d, n, 0, 0.25) == n * d * 4 * 1.5
    predictor = make_variant("drelu", "predictor")
    assert (
        traffic(predictor, d, n, 16, 0.25, 0.125, 0.0625)
        == n * d * 4 * (0.25 + 0.125 + 0.0625) + 4 * 16 * (d + n) + 4 * n
    )
    assert traffic(make_variant("relu", "exact", plain=True), d, n, 0, 0.25) == n * d * 4 * 1.25


def poisoned(tensors: dict[str, np.ndarray], role: str, row: int) -> dict[str, np.ndarray]:
    """The tensors with NaN in a row of a matrix, or in its scales where it holds integers."""
    role = role if f"s{role[1:]}" not in tensors else f"s{role[1:]}"
    changed = tensors[role].copy()
    changed[row] = np.nan
    return {**tensors, role: changed}


@pytest.mark.parametrize("tokens", [1, 3, 12])
@pytest.mark.parametrize("score", ["exact", "gate", "predictor", "all"])
@pytest.mark.parametrize("weights", ["float", "int8_row", "int4_g32"])
@pytest.mark.parametrize("text", ["drelu", "fatrelu(0.2)"])
def test_rows_of_zeros_are_not_read(text: str, weights: str, score: str, tokens: int) -> None:
    """Up where no token's gate opens, down where no token's product is not zero; where another token needs the row, a
    token keeps its bits.
    """
    variant = make_variant(text, score, weights)
    x = make_x(variant, (tokens, 32))
    tensors = make_tensors(variant, 32, 90)
    if score != "all":
        tensors = (
            with_tau(variant, x, tensors, 0.6)
            if score == "predictor"
            else tensors | ({"tau": np.full(90, -1, np.float32)} if score == "gate" else {})
        )
    clean = run(open_model(make_model(OP, variant, tensors)), x)
    kept = np.ones((tokens, 90), bool) if score == "exact" else active(variant, x, tensors, integer=True)
    open_gate = opened(variant, x, tensors, integer=True) & kept
    used = (
        active(
            make_variant(text, "exact", weights),
            x,
            {role: tensors[role] for role in tensors if role[:1] in "ws"},
            integer=True,
        )
        & kept
    )
    products = [_product(variant, x.astype(np.float64), tensors, role, "", True) for role in ("w_gate", "w_up")]
    settled = (np.abs(np.stack(products) - [0, 0.2][text != "drelu"]) > 1e-5).all(
        (0, 1)
    )  # sums of integers may be 0, and rounded to either side
    for role, needed in (("w_up", open_gate), ("w_down", used)):
        read = needed.any(0)
        assert 0 < (read & settled).sum() and ((~read & settled).any() or tokens == 12)
        for row in (*np.flatnonzero(~read & settled)[:1], np.flatnonzero(read & settled)[0]):
            y = run(open_model(make_model(OP, variant, poisoned(tensors, role, row))), x)
            assert np.isnan(y).any(1).tolist() == needed[:, row].tolist()
            np.testing.assert_array_equal(y[~needed[:, row]], clean[~needed[:, row]])


@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("text", ["drelu", "shifted_relu(0.2)"])
def test_nan_is_never_dropped(text: str, tokens: int) -> None:
    """A gate, or an up behind an open gate, that is NaN reaches y, and x that is NaN does."""
    variant = make_variant(text, "exact")
    x = make_x(variant, (tokens, 32))
    tensors = make_tensors(variant, 32, 90)
    row = int(np.flatnonzero(active(variant, x, tensors)[0])[0])
    for role in ("w_gate", "w_up"):
        assert np.isnan(run(open_model(make_model(OP, variant, poisoned(tensors, role, row))), x)[0]).all()
    x[0, 3] = np.nan
    y = run(open_model(make_model(OP, variant, tensors)), x)
    assert np.isnan(y[0]).all() and np.isfinite(y[1:]).all()

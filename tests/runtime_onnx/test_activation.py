"""Spellings of activations, their values, and what score exact keeps of a GatedMLP."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from op_harness.gated_mlp import OP, make_tensors, make_variant, make_x
from op_harness.sessions import make_model, nmse, open_model, run

from sparsegate.runtime_onnx.ops.activation import ACTIVATIONS, activate, is_relu, spell_activation, split_activation
from sparsegate.runtime_onnx.ops.gated_mlp import active, opened, reference, traffic

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
    "swish fatrelu fatrelu() fatrelu(-0.1) fatrelu(nan) fatrelu(inf) fatrelu(1e-5) fatrelu(1) fatrelu(.1) fatrelu(0.010) fatrelu(00.1) relu(1.0) "
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
    assert nmse(run(open_model(make_model(OP, variant, {**t, "w_down": t["w_down"] * (np.arange(60) != strongest)[:, None]}), native=False), x), y) > 1e-3


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
    assert traffic(predictor, d, n, 16, 0.25, 0.125, 0.0625) == n * d * 4 * (0.25 + 0.125 + 0.0625) + 4 * 16 * (d + n) + 4 * n
    assert traffic(make_variant("relu", "exact", plain=True), d, n, 0, 0.25) == n * d * 4 * 1.25

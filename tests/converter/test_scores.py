"""Scores against their definition, and the symmetries that the definition has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sparsegate.converter.scores import SCORES, Context, load_score

T, D, N = 4, 5, 7


def context(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, w_gate, w_up, w_down = (torch.randn(*shape, generator=g, dtype=dtype) for shape in ((T, D), (N, D), (N, D), (N, D)))
    gate, up = F.silu(x @ w_gate.T), x @ w_up.T
    return {"x": x, "gate": gate, "up": up, "z": gate * up, "w_gate": w_gate, "w_up": w_up, "w_down": w_down}


def score(name: str, fields: dict[str, torch.Tensor]) -> torch.Tensor:
    module = load_score(name)
    return module.score(Context(**{need: fields[need] for need in module.NEEDS}))


def test_magnitude_is_the_norm_of_what_a_neuron_adds() -> None:
    fields = context()
    expected = torch.empty(T, N, dtype=torch.float64)
    for t in range(T):
        for i in range(N):
            expected[t, i] = sum(float(fields["z"][t, i] * fields["w_down"][i, j]) ** 2 for j in range(D)) ** 0.5
    torch.testing.assert_close(score("magnitude", fields), expected, rtol=1e-10, atol=0)
    full = fields["z"] @ fields["w_down"]
    for i in range(N):
        without = fields["z"].clone()
        without[:, i] = 0
        torch.testing.assert_close((full - without @ fields["w_down"]).norm(dim=1), expected[:, i], rtol=1e-9, atol=1e-12)


def test_gate_is_the_size_of_the_activated_gate() -> None:
    fields = context()
    expected = torch.tensor([[abs(float(F.silu(fields["x"][t] @ fields["w_gate"][i]))) for i in range(N)] for t in range(T)], dtype=torch.float64)
    torch.testing.assert_close(score("gate", fields), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", SCORES)
@given(seed=st.integers(0, 10**6), factor=st.floats(0.01, 100))
@settings(max_examples=20, deadline=None)
def test_symmetries(name: str, seed: int, factor: float) -> None:
    fields = context(seed)
    base = score(name, fields)
    assert base.shape == (T, N) and bool((base >= 0).all())
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    permuted = {key: v[order] if key.startswith("w_") else v[:, order] if key in ("gate", "up", "z") else v for key, v in fields.items()}
    torch.testing.assert_close(score(name, permuted), base[:, order], rtol=1e-12, atol=0)
    torch.testing.assert_close(score(name, {key: v[2:3] if len(v) == T else v for key, v in fields.items()}), base[2:3], rtol=1e-12, atol=0)
    scaled = fields | {"gate": fields["gate"] * factor, "z": fields["z"] * -factor}
    torch.testing.assert_close(score(name, scaled), base * factor, rtol=1e-10, atol=0)


def test_magnitude_sees_down_but_no_rotation_of_the_output() -> None:
    fields = context()
    rotation = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    torch.testing.assert_close(score("magnitude", fields | {"w_down": fields["w_down"] @ rotation}), score("magnitude", fields), rtol=1e-10, atol=0)
    doubled = fields["w_down"].clone()
    doubled[3] *= 2
    ratio = score("magnitude", fields | {"w_down": doubled}) / score("magnitude", fields)
    torch.testing.assert_close(ratio, torch.tensor([1.0, 1, 1, 2, 1, 1, 1], dtype=torch.float64).expand(T, N), rtol=1e-10, atol=0)

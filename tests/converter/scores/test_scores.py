"""Scores against their definition in loops, and the symmetries that the definitions have."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsegate.converter.evaluation.analysis.selectors import top_k
from sparsegate.converter.scores import SCORES, Context, load_score
from sparsegate.converter.scores.griffin import statistic
from sparsegate.converter.scores.signs import tau

T, D, N, H, WIDTH, K = 4, 5, 7, 3, 6, 4
PER_UNIT = ("gate", "up", "z", "grad", "grad_path", "prompt", "up_moment")
LINEAR = [name for name in SCORES if getattr(load_score(name), "KIND", "ffn") == "linear"]
NEURON = [name for name in SCORES if name not in LINEAR]
HEADS = [name for name in SCORES if hasattr(load_score(name), "score_heads")]


def context(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, w_gate, w_up, w_down = (random(*shape) for shape in ((T, D), (N, D), (N, D), (N, D)))
    gate, up = F.silu(x @ w_gate.T), x @ w_up.T
    return {
        "x": x,
        "gate": gate,
        "up": up,
        "z": gate * up,
        "w_gate": w_gate,
        "w_up": w_up,
        "w_down": w_down,
        "w": random(N, D),
        "up_moment": random(N).square(),
        "prompt": random(N).abs(),
        "grad": random(T, N),
        "grad_path": random(K, T, N),
        "o": random(T, H, WIDTH),
        "o_grad": random(T, H, WIDTH),
        "o_grad_path": random(K, T, H, WIDTH),
        "label": torch.arange(T),
    }


def score(name: str, fields: dict[str, Tensor]) -> Tensor:
    module = load_score(name)
    return module.score(Context(**{need: fields[need] for need in module.NEEDS}))


def score_heads(name: str, fields: dict[str, Tensor]) -> Tensor:
    module = load_score(name)
    return module.score_heads(Context(**{need: fields[need] for need in module.HEAD_NEEDS}))


def neuron(name: str, f: dict[str, Tensor], t: int, i: int) -> float:
    """One score in plain Python."""
    z, g, gate = (float(f[key][t, i]) for key in ("z", "grad", "gate"))
    norm = math.sqrt(sum(float(v) ** 2 for v in f["grad"][t]))
    return {
        "gate": lambda: abs(gate),
        "chess": lambda: abs(gate) * math.sqrt(float(f["up_moment"][i])),
        "magnitude": lambda: math.sqrt(sum((z * float(w)) ** 2 for w in f["w_down"][i])),
        "abs_z": lambda: abs(z),
        "signs": lambda: (
            sum((float(a) < 0) == (float(b) < 0) for a, b in zip(f["x"][t], f["w_gate"][i], strict=True)) / D
        ),
        "griffin": lambda: float(f["prompt"][i]),
        "gradient": lambda: -g,
        "gxo": lambda: -z * g,
        "snip": lambda: abs(z * g),
        "fisher": lambda: (z * g) ** 2,
        "integrated_gradients": lambda: -z * sum(float(f["grad_path"][k, t, i]) for k in range(K)) / K,
        "corrected_gxo": lambda: -g * z + 0.5 * abs(z) * norm,
    }[name]()


def head(name: str, f: dict[str, Tensor], t: int, h: int) -> float:
    o, g = f["o"][t], f["o_grad"][t]
    product = sum(float(o[h, d] * g[h, d]) for d in range(WIDTH)) / WIDTH
    norm = math.sqrt(sum(float(v) ** 2 for v in o[h]))
    means = math.sqrt(sum((sum(float(v) for v in g[k]) / WIDTH) ** 2 for k in range(H)))
    path = sum(float(o[h, d] * f["o_grad_path"][k, t, h, d]) for d in range(WIDTH) for k in range(K)) / (WIDTH * K)
    return {
        "magnitude": norm,
        "abs_z": norm,
        "gradient": -sum(float(v) for v in g[h]) / WIDTH,
        "gxo": -product,
        "snip": abs(product),
        "fisher": product**2,
        "integrated_gradients": -path,
        "corrected_gxo": -product + 0.5 * norm * means,
    }[name]


@pytest.mark.parametrize("name", NEURON)
def test_neuron_score_in_loops(name: str) -> None:
    fields = context()
    expected = torch.tensor([[neuron(name, fields, t, i) for i in range(N)] for t in range(T)], dtype=torch.float64)
    torch.testing.assert_close(score(name, fields), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", HEADS)
def test_head_score_in_loops(name: str) -> None:
    fields = context()
    expected = torch.tensor([[head(name, fields, t, h) for h in range(H)] for t in range(T)], dtype=torch.float64)
    torch.testing.assert_close(score_heads(name, fields), expected, rtol=1e-10, atol=1e-12)


def test_every_gradient_score_has_heads() -> None:
    assert set(HEADS) == {name for name in SCORES if load_score(name).PHASE == "oracle"} | {"magnitude", "abs_z"}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_score_in_loops(name: str) -> None:
    fields = context()
    norms = [math.sqrt(sum(float(v) ** 2 for v in fields["w"][:, j])) if name == "wina" else 1.0 for j in range(D)]
    expected = torch.tensor(
        [[abs(float(fields["x"][t, j])) * norms[j] for j in range(D)] for t in range(T)], dtype=torch.float64
    )
    torch.testing.assert_close(score(name, fields), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", NEURON)
@given(seed=st.integers(0, 10**6), factor=st.floats(0.01, 100))
@settings(max_examples=20, deadline=None)
def test_symmetries(name: str, seed: int, factor: float) -> None:
    """The order of units and other tokens do not matter; what scales a unit's value scales its score."""
    fields = context(seed)
    base = score(name, fields)
    assert base.shape == (T, N)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    permuted = {
        key: v[..., order] if key in PER_UNIT else v[order] if key in ("w_gate", "w_up", "w_down") else v
        for key, v in fields.items()
    }
    torch.testing.assert_close(score(name, permuted), base[:, order], rtol=1e-12, atol=1e-14)
    alone = {
        key: v[2:3] if key in ("x", "gate", "up", "z", "grad") else v[:, 2:3] if key == "grad_path" else v
        for key, v in fields.items()
    }
    torch.testing.assert_close(score(name, alone), base[2:3], rtol=1e-12, atol=1e-14)
    scaled = fields | {
        "gate": fields["gate"] * factor,
        "z": fields["z"] * factor,
        "prompt": fields["prompt"] * factor,
        "x": fields["x"] * factor,
    }
    power = {"fisher": 2, "gradient": 0, "signs": 0}.get(name, 1)
    torch.testing.assert_close(score(name, scaled), base * factor**power, rtol=1e-10, atol=1e-14)


def test_magnitude_sees_down_but_no_rotation_of_the_output() -> None:
    fields = context()
    rotation = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    torch.testing.assert_close(
        score("magnitude", fields | {"w_down": fields["w_down"] @ rotation}),
        score("magnitude", fields),
        rtol=1e-10,
        atol=0,
    )
    doubled = fields["w_down"].clone()
    doubled[3] *= 2
    ratio = score("magnitude", fields | {"w_down": doubled}) / score("magnitude", fields)
    torch.testing.assert_close(
        ratio, torch.tensor([1.0, 1, 1, 2, 1, 1, 1], dtype=torch.float64).expand(T, N), rtol=1e-10, atol=0
    )


def test_chess_with_constant_moments_orders_as_gate() -> None:
    fields = context() | {"up_moment": torch.full((N,), 2.25, dtype=torch.float64)}
    torch.testing.assert_close(score("chess", fields), 1.5 * score("gate", fields))


def test_f02_snip_fisher_and_one_step() -> None:
    """SNIP is |GxO| and orders as Fisher; integrated gradients with one step are GxO, bit for bit. The same
    for heads.
    """
    fields = context()
    fields |= {"grad_path": fields["grad"][None], "o_grad_path": fields["o_grad"][None]}
    for of in (score, score_heads):
        assert torch.equal(of("snip", fields), of("gxo", fields).abs())
        assert torch.equal(of("fisher", fields).argsort(-1), of("snip", fields).argsort(-1))
        assert torch.equal(of("integrated_gradients", fields), of("gxo", fields))
        assert not torch.equal(of("gxo", fields), of("snip", fields))


def test_f06_corrected_identity() -> None:
    """norm(g) |x| (1/2 - c) with c = sgn(x) g / norm(g); the order is that of |x| (1 - 2c); E_y[g] = 0 leaves the order
    of |x|.
    """
    fields = context(3)
    z, g = fields["z"], fields["grad"]
    norm = g.norm(dim=-1, keepdim=True)
    c = z.sign() * g / norm
    torch.testing.assert_close(score("corrected_gxo", fields), norm * z.abs() * (0.5 - c), rtol=1e-12, atol=1e-14)
    assert torch.equal(score("corrected_gxo", fields).argsort(-1), (z.abs() * (1 - 2 * c)).argsort(-1))
    both = (score("corrected_gxo", fields) + score("corrected_gxo", fields | {"grad": -g})) / 2
    assert torch.equal(both.argsort(-1), z.abs().argsort(-1))


@pytest.mark.parametrize("alpha", [1, 60, 99, 100, 101, 250])
def test_signs_rule(alpha: int) -> None:
    """Every count of matches, against the rule in integers; zero has the sign of its bit."""
    hidden = 24
    for matches in range(hidden + 1):
        x = torch.cat([torch.ones(matches), -torch.ones(hidden - matches)])[None]
        kept = score("signs", {"x": x, "w_gate": torch.ones(1, hidden)}) > tau(alpha, hidden)
        assert bool(kept) == (100 * (hidden - matches) <= alpha * matches)
    assert float(score("signs", {"x": torch.tensor([[0.0, -0.0]]), "w_gate": torch.tensor([[1.0, 1.0]])})) == 0.5


def test_f18_griffin_golden() -> None:
    """The statistic and its top 4 on the authors' function's input; the reduced network equals the masked one."""
    torch.manual_seed(0)
    z = torch.randn(1, 12, 8)
    expected = torch.tensor([1.1205, 1.3537, 1.1672, 0.9168, 1.1503, 1.5390, 1.2167, 1.2398])
    torch.testing.assert_close(statistic(z)[0], expected, rtol=0, atol=5e-5)
    assert statistic(z)[0].topk(4).indices.tolist() == [5, 1, 7, 6]
    keep = top_k(score("griffin", {"z": z[0], "prompt": statistic(z)[0]}), 0.5)
    assert (
        keep.shape == (12, 8)
        and bool((keep == keep[:1]).all())
        and set(keep[0].nonzero().flatten().tolist()) == {5, 1, 7, 6}
    )
    fields = context()
    kept = torch.tensor([0, 2, 3, 6])
    reduced = (F.silu(fields["x"] @ fields["w_gate"][kept].T) * (fields["x"] @ fields["w_up"][kept].T)) @ fields[
        "w_down"
    ][kept]
    mask = torch.zeros(N, dtype=torch.bool).index_fill_(0, kept, True)
    torch.testing.assert_close(reduced, torch.where(mask, fields["z"], 0) @ fields["w_down"])


def test_griffin_ignores_empty_tokens() -> None:
    z = torch.randn(5, 4)
    assert torch.equal(statistic(torch.cat([z, torch.zeros(2, 4)])), statistic(z))

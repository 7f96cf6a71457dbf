"""Linear sites and residuals on gate thresholds in torch, against hooks and loops that gather only what is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_plans import TOKENS, D, N, R, input_plan, linear, logits
from models import MODEL_TYPES
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from sparsegate.converter.arch import Arch, load_arch
from sparsegate.converter.arch.shapes import linear_rows, linear_shapes
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import LINEARS, Plan, Predictor, Residual, SitePlan, Threshold
from sparsegate.converter.modeling.gated import NEAR, apply_plan, dense, load_dense, recording, remove_plan


def by_hand(model: Any, arch: Arch, plan: Plan) -> Any:
    """Hooks on the linears of a stock model: a packed weight's output is put together from one product a part."""
    shapes = linear_shapes(arch, model.config)

    def hook(module: Any, arguments: tuple[Tensor], output: Tensor, layer: int, parts: list[str]) -> Tensor:
        (x,), pieces, start = arguments, [], 0
        for part in parts:
            rows, given = slice(start, start + shapes[part][0]), x
            start = rows.stop
            if linear(layer, part) in plan:
                given = x * (x.abs() > plan[linear(layer, part)].gating.tau)
            pieces.append(given @ module.weight[rows].T + (0.0 if module.bias is None else module.bias[rows]))
        assert start == output.shape[-1]
        return torch.cat(pieces, dim=-1)

    modules: dict[str, list[str]] = {}
    for name, (module, _) in arch.linears().items():
        modules.setdefault(module, []).append(name)
    for layer in range(2):
        for module, parts in modules.items():
            target = model.get_submodule(arch.block_prefix(layer) + module)
            target.register_forward_hook(lambda m, a, o, layer=layer, parts=parts: hook(m, a, o, layer, parts))
    return model


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_linear_sites_equal_hooks(model_type: str, tiny_model: Callable[[str], Path]) -> None:
    arch, folder = load_arch(model_type), tiny_model(model_type)
    model = load_dense(folder)
    plain, plan = logits(model), input_plan(arch, model.config)
    expected = logits(by_hand(load_dense(folder), arch, plan))
    apply_plan(model, plan, arch, arch.activation(model.config))
    with recording(model) as seen:
        found = logits(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert float((found - plain).abs().max()) > 0.1, "the masks must matter"
    assert set(seen.density()) == set(plan) and all(0.05 < share < 0.95 for share in seen.density().values())
    assert len(plan) == 2 * (6 if model_type == "phi" else 7)
    with dense(model):
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=0)
    assert torch.equal(logits(remove_plan(model)), plain)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "phi"])
@pytest.mark.parametrize("name", LINEARS)
def test_one_linear_alone(model_type: str, name: str, tiny_model: Callable[[str], Path]) -> None:
    """Parts of a packed weight are masked one without the other, and one channel more changes the logits."""
    arch, folder = load_arch(model_type), tiny_model(model_type)
    model = load_dense(folder)
    plan = input_plan(arch, model.config, (name,))
    if not plan:
        assert (model_type, name) == ("phi", "gate_proj")
        return
    expected = logits(by_hand(load_dense(folder), arch, plan))
    torch.testing.assert_close(
        logits(apply_plan(model, plan, arch, arch.activation(model.config))), expected, rtol=1e-5, atol=1e-4
    )
    entry = plan[linear(1, name)].gating
    plan[linear(1, name)] = SitePlan(
        gate=Threshold("input", entry.tau.index_fill(0, torch.tensor([3]), torch.inf), 0.5)
    )
    assert float((logits(by_hand(load_dense(folder), arch, plan)) - expected).abs().max()) > 1e-3


def test_generation_is_masked(tiny_model: Callable[[str], Path]) -> None:
    """Step by step with a cache, the logits are those of one pass: a token's masks depend on nothing after it."""
    arch, model = load_arch("phi3"), load_dense(tiny_model("phi3"))
    apply_plan(model, input_plan(arch, model.config), arch, "silu")
    whole, cache = logits(model)[:, -1], None
    for t in range(TOKENS.shape[1]):
        with torch.no_grad():
            out = model(input_ids=TOKENS[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
    torch.testing.assert_close(out.logits[:, -1], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_compares_in_fp32(dtype: torch.dtype, tiny_model: Callable[[str], Path]) -> None:
    """Thresholds just below the inputs keep all of them; rounded to the model's type, equal ones would go."""
    arch, model = load_arch("llama"), load_dense(tiny_model("llama"), dtype)
    x = torch.randn(1, 1, D, generator=torch.Generator().manual_seed(0)).to(dtype)
    tau = x[0, 0].float().abs() * (1 - 1e-5)
    assert torch.equal(tau.to(dtype), x[0, 0].abs())
    apply_plan(model, {linear(0, "q_proj"): SitePlan(gate=Threshold("input", tau, 1.0))}, arch, "silu")
    module = model.get_submodule("model.layers.0.self_attn.q_proj")
    with recording(model) as seen, torch.no_grad():
        assert module(x).dtype == dtype
    assert seen.kept == {linear(0, "q_proj"): D}


def test_recorder_counts_and_near(tiny_model: Callable[[str], Path]) -> None:
    arch, model = load_arch("phi3"), load_dense(tiny_model("phi3"))
    plan = input_plan(arch, model.config, ("q_proj", "v_proj"))
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0))
    entry = plan[linear(0, "v_proj")].gating
    x[1, 2, 7] = -float(entry.tau[7])
    apply_plan(model, plan, arch, "silu")
    module = model.get_submodule("model.layers.0.self_attn.qkv_proj")
    with recording(model) as seen, torch.no_grad():
        module(x)
        module(x)
    for name in ("q_proj", "v_proj"):
        tau = plan[linear(0, name)].gating.tau
        assert (
            seen.kept[linear(0, name)] == 2 * int((x.abs() > tau).sum()) and seen.seen[linear(0, name)] == 2 * x.numel()
        )
        room = NEAR * (tau + x.square().mean(-1, keepdim=True).sqrt())
        assert torch.equal(seen.near[linear(0, name)], ((x.abs() - tau).abs() <= room).any(-1))
    assert bool(seen.near[linear(0, "v_proj")][1, 2]) and not (x.abs() > entry.tau)[1, 2, 7], (
        "at the threshold: not kept, and near"
    )
    assert set(seen.seen) == {linear(0, "q_proj"), linear(0, "v_proj")}


# f22: an executor that gathers only what is kept


def gather_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tau: Tensor) -> Tensor:
    """y = b + sum over kept channels, token by token, channel by channel, in fp64."""
    rows = []
    for token in x.double().reshape(-1, x.shape[-1]):
        y = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double().clone()
        for j in range(len(token)):
            if float(token[j].abs()) > float(tau[j]):
                y += token[j] * weight[:, j].double()
        rows.append(y)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


def gather_network(x: Tensor, mlp: Any, arch: Arch, activation: Any, entry: SitePlan) -> Tensor:
    """A feed-forward network neuron by neuron: rows of gate, up and down of the kept ones only, in fp64."""
    ffn, weights = arch.ffn, {name: t.double() for name, t in mlp.state_dict().items()}
    zero = torch.zeros(N, dtype=torch.float64)
    if ffn.gate_up:
        w_gate, w_up = weights[f"{ffn.gate_up}.weight"].chunk(2)
        b_gate = b_up = zero
    else:
        w_gate, w_up = (weights[f"{name}.weight"] for name in (ffn.gate or ffn.up, ffn.up))
        b_gate, b_up = (weights.get(f"{name}.bias", zero) for name in (ffn.gate or ffn.up, ffn.up))
    down, bias = weights[f"{ffn.down}.weight"], weights.get(f"{ffn.down}.bias", torch.zeros(D, dtype=torch.float64))
    rows, predictor, residual = [], entry.gating, entry.residual
    for token in x.double().reshape(-1, D):
        y, fc1 = bias.clone(), predictor.fc1 if isinstance(predictor, Predictor) else residual and residual.fc1
        hidden = (
            None
            if fc1 is None
            else torch.tensor([max(0.0, float(row @ token)) for row in fc1.double()], dtype=torch.float64)
        )
        for i in range(N):
            gate = activation(w_gate[i] @ token + b_gate[i])
            score = float(predictor.fc2[i].double() @ hidden) if isinstance(predictor, Predictor) else abs(float(gate))
            if score > float(predictor.tau[i]):
                y += gate * (1.0 if ffn.kind == "plain" else w_up[i] @ token + b_up[i]) * down[:, i]
        if residual is not None and hidden is not None:
            y += sum(hidden[r] * residual.weight[r].double() for r in range(len(hidden)))
        rows.append(y)
    return torch.stack(rows).reshape(x.shape)


def entry_at(kind: str, density: str, scores: Tensor) -> Tensor:
    """Thresholds [n] for scores [T, n] that keep nothing, everything, one unit, or about a half; no score
    lies on one.
    """
    tau = scores.quantile(0.5, dim=0) + 1e-4
    if density == "one":
        tau = torch.full_like(tau, torch.inf)
        tau[int(scores.amax(0).argmax())] = 0.0 if kind != "predictor" else -torch.inf
    return {"none": torch.full_like(tau, torch.inf), "all": torch.full_like(tau, -torch.inf)}.get(density, tau)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "phi"])
@pytest.mark.parametrize("kind", ["gate", "gate+residual", "predictor", "predictor+residual", "input"])
@pytest.mark.parametrize("density", ["none", "all", "one", "half"])
@torch.no_grad()
def test_f22_gathering_equals_masking(
    model_type: str, kind: str, density: str, tiny_model: Callable[[str], Path]
) -> None:
    """n = 176 and d = 64 are multiples of no vector block of 48 or 128."""
    arch, model = load_arch(model_type), load_dense(tiny_model(model_type))
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, D, generator=g)
    activation = arch.activation(model.config)
    if kind == "input":
        module, parts = next(iter(linear_rows(arch, model.config).items()))
        taus = {name: entry_at(kind, density, (x[0] * (1 + k / 4)).abs()) for k, name in enumerate(parts)}
        apply_plan(
            model,
            {linear(0, name): SitePlan(gate=Threshold("input", tau, 0.5)) for name, tau in taus.items()},
            arch,
            activation,
        )
        target = model.get_submodule(arch.block_prefix(0) + module)
        pieces = [
            gather_linear(x, target.weight[at], None if target.bias is None else target.bias[at], taus[name])
            for name, at in parts.items()
        ]
        expected = torch.cat(pieces, dim=-1)
    else:
        target = model.get_submodule(arch.ffn_module(0))
        fc1, fc2, residual = (
            torch.randn(R, D, generator=g) / 8,
            torch.randn(N, R, generator=g),
            torch.randn(R, D, generator=g),
        )
        if kind.startswith("predictor"):
            tau = entry_at("predictor", density, F.relu(x[0] @ fc1.T) @ fc2.T)
            entry = SitePlan((), Predictor(fc1, fc2, tau, 0.5), Residual(residual) if "+" in kind else None)
        else:
            up = getattr(target, str(arch.ffn.gate_up or arch.ffn.gate or arch.ffn.up))(x[0])[:, :N]
            tau = entry_at("gate", density, ACT2FN[getattr(model.config, arch.ffn.activation.config)](up).abs())
            entry = SitePlan((), Threshold("gate", tau, 0.5), Residual(residual, fc1) if "+" in kind else None)
        apply_plan(model, {Site(0): entry}, arch, activation)
        expected = gather_network(x, target, arch, ACT2FN[getattr(model.config, arch.ffn.activation.config)], entry)
    with recording(model) as seen:
        found = target(x)
    assert float((found - expected).norm()) <= 1e-5 * max(float(expected.norm()), 1e-30)
    shares = list(seen.density().values())
    bounds = {"none": (0, 0), "all": (1, 1), "one": (1 / 4 / N, 1 / D), "half": (0.2, 0.6)}[density]
    assert all(bounds[0] <= share <= bounds[1] for share in shares), shares

"""Linear sites and residuals on gate thresholds: plans, checkpoints, and the torch executor against hooks and loops
that gather only what is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODEL_TYPES, VOCAB
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from sparsegate.converter.arch import Arch, load_arch
from sparsegate.converter.arch.shapes import linear_rows, linear_shapes
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.cost import block_cost, cost, mlp_cost
from sparsegate.converter.checkpoint.plan import (
    LINEARS,
    Entry,
    Plan,
    Predictor,
    Threshold,
    check_plan,
    load_plan,
    merge,
    save_plan,
)
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.checkpoint.sparsity import encode, read_sparsity, write_sparsity
from sparsegate.converter.checkpoint.stage import Header, write_json
from sparsegate.converter.checkpoint.writer import write_checkpoint
from sparsegate.converter.modeling.gated import NEAR, apply_plan, dense, load, load_dense, recording, remove_plan
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.untrusted import read_json

TOKENS = torch.randint(3, VOCAB, (2, 26), generator=torch.Generator().manual_seed(0))
D, N, R = 64, 176, 5


def linear(layer: int, name: str) -> Site:
    return Site(layer, kind=f"linear:{name}")


def input_plan(arch: Arch, config: Any, names: tuple[str, ...] = LINEARS, seed: int = 0) -> Plan:
    """Another tau at every channel of every linear, near the size of its inputs."""
    g, found = torch.Generator().manual_seed(seed), {}
    for layer in range(2):
        for name, (_, width) in linear_shapes(arch, config).items():
            if name in names:
                found[linear(layer, name)] = [
                    Threshold("input", (0.1 if name == "down_proj" else 0.5) * torch.rand(width, generator=g), 0.5)
                ]
    return found


def residual_entry(seed: int = 0) -> Threshold:
    g = torch.Generator().manual_seed(seed)
    tau, fc1, residual = (
        0.2 + 0.3 * torch.rand(N, generator=g),
        torch.randn(R, D, generator=g) / 8,
        torch.randn(R, D, generator=g) / 4,
    )
    return Threshold("gate", tau, 0.5, fc1, residual)


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens).logits


def by_hand(model: Any, arch: Arch, plan: Plan) -> Any:
    """Hooks on the linears of a stock model: a packed weight's output is put together from one product a part."""
    shapes = linear_shapes(arch, model.config)

    def hook(module: Any, arguments: tuple[Tensor], output: Tensor, layer: int, parts: list[str]) -> Tensor:
        (x,), pieces, start = arguments, [], 0
        for part in parts:
            rows, given = slice(start, start + shapes[part][0]), x
            start = rows.stop
            if linear(layer, part) in plan:
                given = x * (x.abs() > plan[linear(layer, part)][0].tau)
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


# The executor


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
    (entry,) = plan[linear(1, name)]
    plan[linear(1, name)] = [Threshold("input", entry.tau.index_fill(0, torch.tensor([3]), torch.inf), 0.5)]
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
    apply_plan(model, {linear(0, "q_proj"): [Threshold("input", tau, 1.0)]}, arch, "silu")
    module = model.get_submodule("model.layers.0.self_attn.q_proj")
    with recording(model) as seen, torch.no_grad():
        assert module(x).dtype == dtype
    assert seen.kept == {linear(0, "q_proj"): D}


def test_recorder_counts_and_near(tiny_model: Callable[[str], Path]) -> None:
    arch, model = load_arch("phi3"), load_dense(tiny_model("phi3"))
    plan = input_plan(arch, model.config, ("q_proj", "v_proj"))
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0))
    (entry,) = plan[linear(0, "v_proj")]
    x[1, 2, 7] = -float(entry.tau[7])
    apply_plan(model, plan, arch, "silu")
    module = model.get_submodule("model.layers.0.self_attn.qkv_proj")
    with recording(model) as seen, torch.no_grad():
        module(x)
        module(x)
    for name in ("q_proj", "v_proj"):
        tau = plan[linear(0, name)][0].tau
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


def gather_network(x: Tensor, mlp: Any, arch: Arch, activation: Any, entry: Entry) -> Tensor:
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
    rows = []
    for token in x.double().reshape(-1, D):
        y, fc1 = bias.clone(), entry.fc1
        hidden = (
            None
            if fc1 is None
            else torch.tensor([max(0.0, float(row @ token)) for row in fc1.double()], dtype=torch.float64)
        )
        for i in range(N):
            gate = activation(w_gate[i] @ token + b_gate[i])
            score = float(entry.fc2[i].double() @ hidden) if isinstance(entry, Predictor) else abs(float(gate))  # type: ignore[operator]
            if score > float(entry.tau[i]):
                y += gate * (1.0 if ffn.kind == "plain" else w_up[i] @ token + b_up[i]) * down[:, i]
        if entry.residual is not None and hidden is not None:
            y += sum(hidden[r] * entry.residual[r].double() for r in range(len(hidden)))
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
            model, {linear(0, name): [Threshold("input", tau, 0.5)] for name, tau in taus.items()}, arch, activation
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
            entry: Entry = Predictor(fc1, fc2, tau, 0.5, residual if "+" in kind else None)
        else:
            up = getattr(target, str(arch.ffn.gate_up or arch.ffn.gate or arch.ffn.up))(x[0])[:, :N]
            tau = entry_at("gate", density, ACT2FN[getattr(model.config, arch.ffn.activation.config)](up).abs())
            entry = Threshold("gate", tau, 0.5, fc1, residual) if "+" in kind else Threshold("gate", tau, 0.5)
        apply_plan(model, {Site(0): [entry]}, arch, activation)
        expected = gather_network(x, target, arch, ACT2FN[getattr(model.config, arch.ffn.activation.config)], entry)
    with recording(model) as seen:
        found = target(x)
    assert float((found - expected).norm()) <= 1e-5 * max(float(expected.norm()), 1e-30)
    shares = list(seen.density().values())
    bounds = {"none": (0, 0), "all": (1, 1), "one": (1 / 4 / N, 1 / D), "half": (0.2, 0.6)}[density]
    assert all(bounds[0] <= share <= bounds[1] for share in shares), shares


# Plans


def test_merge_keeps_neurons_before_the_linears_inside() -> None:
    tau = Threshold("input", torch.zeros(4), 0.5)
    teal: Plan = {linear(layer, name): [tau] for layer in range(2) for name in LINEARS}
    united = merge([{Site(1): [residual_entry()]}, teal])
    assert list(united) == [*(linear(0, name) for name in LINEARS), Site(1), *(linear(1, name) for name in LINEARS[:4])]
    assert list(merge([teal, {Site(1): [residual_entry()]}])) == list(united), "the order of plans does not matter"
    assert len(teal) == 14, "nothing is taken from the plans given"
    with pytest.raises(InputError, match="got layers.1.ffn twice"):
        merge([united, {Site(1): [residual_entry()]}])


def bad_plans() -> list[tuple[Plan, tuple[str, ...]]]:
    channel, gate = Threshold("input", torch.zeros(D), 0.5), Threshold("gate", torch.zeros(N), 0.5)
    r = torch.zeros(R, D)
    return [
        ({Site(0): [gate], linear(0, "up_proj"): [channel]}, ("layers.0.ffn", "up_proj")),
        (
            {linear(0, "down_proj"): [Threshold("input", torch.zeros(N), 0.5)], Site(0): [gate]},
            ("layers.0.ffn", "down_proj"),
        ),
        ({Site(0): [channel]}, ("layers.0.ffn", "input")),
        ({linear(0, "q_proj"): [gate]}, ("layers.0.linear.q_proj", "gate")),
        (
            {linear(0, "q_proj"): [Predictor(r, torch.zeros(D, R), torch.zeros(D), 0.5)]},
            ("layers.0.linear.q_proj", "predictor"),
        ),
        (
            {linear(0, "q_proj"): [Threshold("input", torch.zeros(D), 0.5, r, r)]},
            ("layers.0.linear.q_proj", "residual"),
        ),
        ({linear(0, "z_proj"): [channel]}, ("layers.0.linear:z_proj".replace(":", "."), "q_proj")),
    ]


@pytest.mark.parametrize(("plan", "words"), bad_plans())
def test_plans_that_no_executor_has(
    plan: Plan, words: tuple[str, ...], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_dense(tiny_model("llama"))
    for call in (
        lambda: check_plan(plan),
        lambda: apply_plan(model, plan, load_arch("llama"), "silu"),
        lambda: encode(plan, "silu"),
        lambda: save_plan(tmp_path, plan, Header(format="plan")),
        lambda: merge([plan]) if len(plan) == 1 else check_plan(plan),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(error.value)
    assert not any(hasattr(type(vars(module).get("forward")), "enabled") for module in model.modules())


def test_linears_of_other_layers_are_no_conflict() -> None:
    check_plan(
        {
            Site(0): [residual_entry()],
            linear(0, "o_proj"): [Threshold("input", torch.zeros(D), 0.5)],
            linear(1, "up_proj"): [Threshold("input", torch.zeros(D), 0.5)],
        }
    )


@pytest.mark.parametrize("given", ["fc1", "residual"])
def test_half_a_residual(given: str) -> None:
    with pytest.raises(InputError, match=f"got only {given}"):
        Threshold("gate", torch.zeros(N), 0.5, **{given: torch.zeros(R, D)})


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (
            {linear(0, "down_proj"): [Threshold("input", torch.zeros(D), 0.5)]},
            ("layers.0.linear.down_proj.tau", "[176]", "[64]"),
        ),
        ({linear(2, "q_proj"): [Threshold("input", torch.zeros(D), 0.5)]}, ("layers.2.linear.q_proj", "layers.1.ffn")),
        (
            {Site(0): [Threshold("gate", torch.zeros(N), 0.5, torch.zeros(R, D), torch.zeros(R, D + 1))]},
            ("residual.weight", "[5, 64]", "[5, 65]"),
        ),
        (
            {Site(0): [Threshold("gate", torch.zeros(N), 0.5, torch.zeros(R, D + 1), torch.zeros(R, D))]},
            ("residual.fc1.weight", "[5, 64]", "[5, 65]"),
        ),
    ],
)
def test_plan_of_another_model(plan: Plan, words: tuple[str, ...], tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(InputError) as error:
        apply_plan(load_dense(tiny_model("llama")), plan, load_arch("llama"), "silu")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_plain_networks_have_no_gate(tiny_model: Callable[[str], Path]) -> None:
    model = load_dense(tiny_model("phi"))
    with pytest.raises(InputError, match="layers.0.linear.gate_proj"):
        apply_plan(
            model, {linear(0, "gate_proj"): [Threshold("input", torch.zeros(D), 0.5)]}, load_arch("phi"), "gelu_tanh"
        )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_shapes_are_the_modules(model_type: str, tiny_model: Callable[[str], Path]) -> None:
    arch, model = load_arch(model_type), load_dense(tiny_model(model_type))
    for module, parts in linear_rows(arch, model.config).items():
        weight = model.get_submodule(arch.block_prefix(1) + module).weight
        assert [at.stop - at.start for at in parts.values()] == [
            linear_shapes(arch, model.config)[name][0] for name in parts
        ]
        assert max(at.stop for at in parts.values()) == weight.shape[0] and {
            linear_shapes(arch, model.config)[name][1] for name in parts
        } == {weight.shape[1]}


# Costs


def test_costs_by_hand(tiny_model: Callable[[str], Path]) -> None:
    """llama: q and o [64, 64], k and v [32, 64], gate, up and down [176, 64]; two layers."""
    arch, config = load_arch("llama"), load_dense(tiny_model("llama")).config
    channel = Threshold("input", torch.zeros(D), 0.25)
    attention, network = 2 * 64 * 64 + 2 * 32 * 64, 3 * 176 * 64
    assert cost(channel, D, N, 3, 0.25) == 0.25
    assert cost(residual_entry(), D, N, 3, 0.4) == pytest.approx((176 * 64 * (1 + 2 * 0.4) + 2 * R * 64) / network)
    assert mlp_cost({}, arch, config) == block_cost({}, arch, config) == 1.0
    plan: Plan = {linear(0, "q_proj"): [channel], linear(0, "up_proj"): [channel], Site(1): [residual_entry()]}
    gated = (176 * 64 * (1 + 2 * 0.5) + 2 * R * 64) / network
    assert mlp_cost(plan, arch, config) == pytest.approx(((2 + 0.25) / 3 + gated) / 2)
    touched = attention - 0.75 * 64 * 64 + network - 0.75 * 176 * 64 + attention + gated * network
    assert block_cost(plan, arch, config) == pytest.approx(touched / 2 / (attention + network))
    realised = {linear(0, "q_proj"): 1.0, linear(0, "up_proj"): 1.0, Site(1): 1.0}
    assert block_cost(plan, arch, config, realised) == pytest.approx(1 + 2 * R * 64 / 2 / (attention + network))


def test_cost_of_a_plain_network(tiny_model: Callable[[str], Path]) -> None:
    arch, config = load_arch("phi"), load_dense(tiny_model("phi")).config
    plan: Plan = {linear(layer, "down_proj"): [Threshold("input", torch.zeros(N), 0.5)] for layer in range(2)}
    assert mlp_cost(plan, arch, config) == 0.75 and block_cost(plan, arch, config) == pytest.approx(
        1 - 0.5 * N * D / (4 * D * D + 2 * N * D)
    )


# Files


def make_plan() -> Plan:
    g = torch.Generator().manual_seed(0)
    widths = {linear(0, "q_proj"): D, linear(0, "down_proj"): N, linear(1, "o_proj"): D}
    channels: Plan = {site: [Threshold("input", torch.rand(width, generator=g), 0.3)] for site, width in widths.items()}
    return channels | {Site(1): [residual_entry()]}


def assert_equal(found: Plan, expected: Plan) -> None:
    assert set(found) == set(expected)
    for site, (entry,) in expected.items():
        assert found[site][0].fields() == entry.fields() and set(found[site][0].tensors()) == set(entry.tensors())
        assert all(torch.equal(found[site][0].tensors()[role], tensor) for role, tensor in entry.tensors().items())


def test_plan_round_trip(tmp_path: Path) -> None:
    plan = make_plan()
    save_plan(tmp_path, plan, Header(format="plan"))
    assert_equal(load_plan(tmp_path), plan)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    write_sparsity(tmp_path, make_plan(), "silu")
    return tmp_path


def test_checkpoint_round_trip(checkpoint: Path) -> None:
    plan, activations = read_sparsity(checkpoint)
    written = read_json(checkpoint / "config.json", "config")["sparsity"]
    assert activations == {"layers.1.ffn": "silu"} and written["version"] == 1
    assert written["sites"]["layers.0.linear.q_proj"] == {"score": "input", "density": 0.3}
    assert written["sites"]["layers.1.ffn"] == {
        "score": "gate",
        "activation": "silu",
        "density": 0.5,
        "rank": R,
        "residual": True,
    }
    assert [site.key for site in plan] == [
        "layers.0.linear.q_proj",
        "layers.0.linear.down_proj",
        "layers.1.linear.o_proj",
        "layers.1.ffn",
    ]
    assert {"tau", "residual.fc1.weight", "residual.weight"} == set(plan[Site(1)][0].tensors())


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_load_equals_apply(model_type: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    arch, model = load_arch(model_type), load_dense(tiny_model(model_type))
    plan = merge([{Site(1): [residual_entry()]}, input_plan(arch, model.config)])
    (tmp_path / "out").mkdir()
    write_checkpoint(open_source(tiny_model(model_type)), plan, tmp_path / "out")
    assert_equal(read_sparsity(tmp_path / "out")[0], plan)
    found = logits(load(tmp_path / "out"))
    assert torch.equal(found, logits(apply_plan(model, plan, arch, "silu")))
    entry = residual_entry()
    without = apply_plan(
        load_dense(tiny_model(model_type)), plan | {Site(1): [Threshold("gate", entry.tau, 0.5)]}, arch, "silu"
    )
    assert float((logits(without) - found).abs().max()) > 1e-2, "the residual must matter"


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("layers.0.linear.q_proj", {"activation": "silu"}, ("density", "activation")),
        ("layers.0.linear.q_proj", {"residual": True}, ("density", "residual")),
        ("layers.0.linear.q_proj", {"score": "gate"}, ("input", "'gate'")),
        ("layers.1.ffn", {"score": "input"}, ("gate, predictor", "'input'")),
        ("layers.1.ffn", {"rank": R + 1}, ("fc1", str(R + 1), f"[{R}, {D}]")),
        ("layers.1.ffn", {"rank": None}, ("rank", "None")),
        ("layers.1.ffn", {"residual": False}, ("density", "rank")),
        ("layers.0.linear.q_proj", {"density": 2}, ("0 to 1", "2")),
    ],
)
def test_checkpoint_vocabulary_is_closed(
    checkpoint: Path, key: str, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    raw = read_json(checkpoint / "config.json", "config")
    raw["sparsity"]["sites"][key] |= change
    write_json(checkpoint / "config.json", raw)
    with pytest.raises(InputError) as error:
        read_sparsity(checkpoint)
    assert (
        key in str(error.value) and all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    ), str(error.value)


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("layers.0.linear.z_proj", "z_proj"),
        ("layers.1.attn", "layers.1.attn"),
        ("layers.0.linear.up_proj.x", "layers.3.ffn"),
        ("layers.1.linear.up_proj", "up_proj"),
    ],
)
def test_sites_that_no_checkpoint_has(checkpoint: Path, key: str, word: str) -> None:
    """Another name, a kind without an entry, no site at all, and a linear inside a gated network."""
    from safetensors.torch import load_file, save_file

    from sparsegate.converter.checkpoint.sparsity import TENSORS

    raw = read_json(checkpoint / "config.json", "config")
    raw["sparsity"]["sites"][key] = {"score": "input", "density": 0.5}
    write_json(checkpoint / "config.json", raw)
    save_file(load_file(checkpoint / TENSORS) | {f"{key}.tau": torch.zeros(D)}, checkpoint / TENSORS)
    with pytest.raises(InputError) as error:
        read_sparsity(checkpoint)
    assert word in str(error.value) and "\n" not in str(error.value), str(error.value)

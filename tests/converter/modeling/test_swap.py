"""Swapped activations: plans, the torch side against networks written out by hand, and the executor that keeps what is
not zero.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODEL_TYPES, VOCAB, make_model
from plan_checks import same
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from sparsegate.converter.arch import load_arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.cost import SiteSize, cost, mlp_cost
from sparsegate.converter.checkpoint.plan import (
    Exact,
    Plan,
    Predictor,
    Residual,
    SitePlan,
    Swap,
    Threshold,
    check_plan,
    load_plan,
    on_swaps,
    save_plan,
    uniform_tau,
)
from sparsegate.converter.checkpoint.stage import Header
from sparsegate.converter.evaluation.density import with_shares
from sparsegate.converter.methods import make_config
from sparsegate.converter.methods.gating import exact
from sparsegate.converter.modeling.blocks import activate, ffn_parts, swap
from sparsegate.converter.modeling.gated import NEAR, apply_plan, dense, recording, remove_plan
from sparsegate.converter.text.windows import Batches
from sparsegate.runtime_onnx.errors import InputError

D, N = 64, 176
TOKENS = torch.randint(3, VOCAB, (3, 30), generator=torch.Generator().manual_seed(0))
BY_HAND: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda v: v * (v > 0),
    "relu2": lambda v: v * v * (v > 0),
    "drelu": lambda v: v * (v > 0),
    "fatrelu(0.25)": lambda v: v * (v > 0.25),
    "shifted_relu(0.25)": lambda v: (v - 0.25) * (v > 0.25),
    "silu": lambda v: v / (1 + torch.exp(-v)),
}


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS).logits


def by_hand(model: Any, activations: dict[int, str]) -> Any:
    """A copy of a stock model whose networks are written out from the state dict."""
    model = deepcopy(model)
    arch, weights = load_arch(model.config.model_type), model.state_dict()
    for layer, activation in activations.items():
        prefix, act = arch.ffn_module(layer) + ".", BY_HAND[activation]

        def linear(name: str | None, x: Tensor, prefix: str = prefix) -> Tensor:
            return torch.einsum("...d,nd->...n", x, weights[f"{prefix}{name}.weight"]) + weights.get(
                f"{prefix}{name}.bias", torch.zeros(())
            )

        def forward(x: Tensor, act: Any = act, linear: Any = linear, both: bool = activation == "drelu") -> Tensor:
            if arch.ffn.kind == "plain":
                return linear(arch.ffn.down, act(linear(arch.ffn.up, x)))
            if arch.ffn.gate_up:
                gate, up = linear(arch.ffn.gate_up, x).split(N, dim=-1)
            else:
                gate, up = linear(arch.ffn.gate, x), linear(arch.ffn.up, x)
            return linear(arch.ffn.down, act(gate) * (up * (up > 0) if both else up))

        model.get_submodule(arch.ffn_module(layer)).forward = forward
    return model


def exact_for(model_type: str) -> str:
    return "relu" if load_arch(model_type).ffn.kind == "plain" else "drelu"


def base_of(model: Any) -> str:
    return load_arch(model.config.model_type).activation(model.config)


# Plans


def threshold(tau: float = 0.1) -> Threshold:
    return Threshold("gate", uniform_tau(tau, N), 0.3)


PREDICTOR = Predictor(torch.zeros(2, D), torch.zeros(N, 2), torch.zeros(N), 0.2)


@pytest.mark.parametrize(
    "entry",
    [
        SitePlan((Swap("drelu"),), Exact()),
        SitePlan((), Exact(0.25, 0.5)),
        SitePlan((Swap("fatrelu(0.01)"),), threshold()),
        SitePlan((Swap("relu"),), PREDICTOR),
        SitePlan((), threshold()),
        SitePlan((), PREDICTOR),
    ],
)
def test_what_a_site_may_hold_survives_the_file(entry: SitePlan, tmp_path: Path) -> None:
    save_plan(tmp_path, {Site(0): entry}, Header(format="plan"))
    (again,) = load_plan(tmp_path).values()
    assert same(entry, again)
    assert again.activation("silu") == (entry.edits[0].activation if entry.edits else "silu")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({Site(0): SitePlan((Swap("relu"),))}, "must have a gate, and at most one swap before it, got swap"),
        ({Site(0): SitePlan((Swap("relu"), Swap("relu")), Exact())}, "swap, swap, exact"),
        ({Site(0): SitePlan()}, "got none"),
        ({Site(0): SitePlan((Swap("relu"),), Exact(), Residual(torch.zeros(2, D)))}, "got another at exact"),
        ({Site(0): SitePlan((), threshold(), Residual(torch.zeros(2, D)))}, "got another at threshold"),
        ({Site(0): SitePlan((), PREDICTOR, Residual(torch.zeros(2, D), torch.zeros(2, D)))}, "another at predictor"),
        ({Site(0): SitePlan((Swap("silu"),), Exact())}, "must have exact zeros .*, got silu"),
        ({Site(0): SitePlan((Swap("identity"),), Exact())}, "must have exact zeros .*, got identity"),
        ({Site(0): SitePlan((Swap("swish"),), Exact())}, "activation must be one of .*, got swish"),
        ({Site(0): SitePlan((Swap("fatrelu"),), Exact())}, "got fatrelu"),
        ({Site(0): SitePlan((Swap("fatrelu(-1.0)"),), Exact())}, "fatrelu"),
        ({Site(0): SitePlan((Swap("relu(0.5)"),), Exact())}, "relu"),
        (
            {Site(0, kind="linear:up_proj"): SitePlan((Swap("relu"),), Exact())},
            "layers.0.linear.up_proj must be input .*, got exact",
        ),
        ({Site(0): SitePlan((Swap("relu"),), Threshold("input", torch.zeros(N), 0.5))}, "of neurons .*, got input"),
    ],
)
def test_lists_that_a_plan_may_not_hold(plan: Plan, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_plan(plan)


def test_cost_of_what_is_not_zero() -> None:
    exact, gated, plain = SitePlan((Swap("drelu"),), Exact(0.06, 0.3)), SiteSize(D, N, 3), SiteSize(D, N, 2)
    assert cost(exact, gated, 0.06) == pytest.approx((1 + 0.3 + 0.06) / 3)
    assert cost(exact, gated, 0.1, 0.5) == pytest.approx((1 + 0.5 + 0.1) / 3)
    assert cost(exact, plain, 0.1) == pytest.approx((1 + 0.1) / 2), "a plain network's up projection is its gate"
    assert cost(SitePlan((), threshold()), gated, 0.1) == pytest.approx((1 + 2 * 0.1) / 3)


def test_cost_is_the_gates(tiny_model: Callable[[str], Path]) -> None:
    config, arch = stock(tiny_model("llama")).config, load_arch("llama")
    plan: Plan = {
        Site(0): SitePlan((Swap("drelu"),), Exact(0.06, 0.3)),
        Site(1): SitePlan((Swap("drelu"),), threshold()),
    }
    assert mlp_cost(plan, arch, config) == pytest.approx(((1.36 / 3) + (1 + 2 * 0.3) / 3) / 2)
    realised = {Site(0): 0.2, Site(1): 0.4}
    assert mlp_cost(plan, arch, config, realised, {Site(0): 0.5}) == pytest.approx(((1.7 / 3) + (1 + 2 * 0.4) / 3) / 2)


def test_a_plan_for_a_swapped_model() -> None:
    swap_ = (Swap("drelu"),)
    swaps = {Site(0): SitePlan(swap_, Exact(0.1, 0.2)), Site(1): SitePlan(swap_, Exact(0.3, 0.4))}
    gate, other = threshold(), SitePlan((), Threshold("input", torch.zeros(D), 0.5))
    found = on_swaps({Site(1): SitePlan((), gate), Site(0, kind="linear:q_proj"): other}, swaps, "silu")
    expected = {
        Site(0): swaps[Site(0)],
        Site(0, kind="linear:q_proj"): other,
        Site(1): SitePlan(swap_, gate),
    }
    assert list(found) == list(expected) and all(same(found[site], expected[site]) for site in expected)
    again = on_swaps(found, swaps, "silu")
    assert list(again) == list(found) and all(again[site] is found[site] for site in found), "what is swapped stays"
    with pytest.raises(InputError, match=r"layers.0.ffn's activation must be drelu .*, got relu"):
        on_swaps({Site(0): SitePlan((Swap("relu"),), Exact())}, swaps, "silu")


def test_a_plan_for_a_model_swapped_in_part() -> None:
    """A site that keeps the base's activation may be named with it."""
    swaps = {Site(0): SitePlan((Swap("relu2"),), Exact(0.1, 0.2)), Site(1): SitePlan((), Exact(0.3, 0.4))}
    named = {site: SitePlan((Swap(name),), Exact()) for site, name in ((Site(0), "relu2"), (Site(1), "relu"))}
    assert on_swaps(named, swaps, "relu") == named
    with pytest.raises(InputError, match=r"layers.1.ffn's activation must be relu as in the model, got relu2 in"):
        on_swaps({Site(1): SitePlan((Swap("relu2"),), Exact())}, swaps, "relu")


def test_predictors_of_a_model_swapped_in_part_are_measured(tmp_path: Path) -> None:
    """Where the model keeps the base's activation too; of a stock model they stay as they are."""
    model, arch = stock(make_model("llama", tmp_path / "m", hidden_act="relu")), load_arch("llama")
    g = torch.Generator().manual_seed(0)
    gate = Predictor(torch.randn(2, D, generator=g), torch.randn(N, 2, generator=g), torch.zeros(N), 1.0)
    plan: Plan = {Site(0): SitePlan((Swap("relu2"),), gate), Site(1): SitePlan((), gate)}
    batches = Batches(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
    for swapped_sites, measured in (((), {Site(0)}), (tuple(plan), set(plan))):
        made = with_shares(model, plan, arch, "relu", batches, swapped_sites)
        assert {site for site, entry in made.items() if entry.gating.density < 0.9} == measured
        assert made[Site(1)].edits == ()


# Modules


@pytest.mark.parametrize("activation", [name for name in BY_HAND if name != "silu"])
def test_activations(activation: str) -> None:
    v = torch.cat([torch.linspace(-3, 3, 97), torch.tensor([0.25, -0.25, 0.0])])
    found = activate(activation, v)
    torch.testing.assert_close(found, BY_HAND[activation](v), rtol=0, atol=1e-7)
    assert bool((found == 0).any()) and bool(activate(activation, torch.tensor([float("nan")])).isnan().all())
    assert activate(activation, v.bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_swapped_modules_are_the_network_by_hand(model_type: str, tiny_model: Callable[[str], Path]) -> None:
    model, arch = stock(tiny_model(model_type)), load_arch(model_type)
    before, state = logits(model), deepcopy(model.state_dict())
    activations = {0: exact_for(model_type), 1: "fatrelu(0.25)"}
    wanted = logits(by_hand(model, activations))
    for layer, activation in activations.items():
        swap(model.get_submodule(arch.ffn_module(layer)), arch, activation)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)
    assert float((wanted - before).abs().max()) > 0.1, "the activations make a difference"
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()) and set(state) == set(
        model.state_dict()
    )
    copied = deepcopy(model)
    assert torch.equal(logits(copied), logits(model)) and isinstance(
        copied.get_submodule(arch.ffn_module(0)), type(stock(tiny_model(model_type)).get_submodule(arch.ffn_module(0)))
    )
    swap(copied.get_submodule(arch.ffn_module(0)), arch, "relu2")
    assert not torch.equal(logits(copied), logits(model)), "a copy is swapped alone"


def test_a_swapped_module_says_what_its_parts_are(tiny_model: Callable[[str], Path]) -> None:
    model, arch = stock(tiny_model("llama")), load_arch("llama")
    module, x = model.get_submodule(arch.ffn_module(0)), torch.randn(5, D)
    swap(module, arch, "drelu")
    swap(module, arch, "relu2")
    with torch.no_grad():
        parts = ffn_parts(module, arch, "silu", x)
        assert torch.equal(parts.gate, F.relu(module.gate_proj(x)).square()) and torch.equal(
            parts.up, module.up_proj(x)
        ), "the swapped one goes first"
        assert torch.equal(module(x), module.down_proj(parts.z))
        module.forward = lambda x: x * 2
        assert torch.equal(module(x), 2 * x)
        del module.forward
        assert torch.equal(module(x), module.down_proj(parts.z))
    with pytest.raises(InputError, match="swish"):
        swap(module, arch, "swish")


def test_plain_networks_have_no_drelu(tiny_model: Callable[[str], Path]) -> None:
    model, arch = stock(tiny_model("phi")), load_arch("phi")
    with pytest.raises(InputError, match="got drelu in phi. Use relu"):
        swap(model.get_submodule(arch.ffn_module(0)), arch, "drelu")
    with pytest.raises(InputError, match="layers.1.ffn .* got drelu in phi. Use relu"):
        apply_plan(model, {Site(1): SitePlan((Swap("drelu"),), Exact())}, arch, base_of(model))


# The executor


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_swap_on_a_stock_model_is_a_transform_at_load_time(
    model_type: str, tiny_model: Callable[[str], Path]
) -> None:
    model, arch = stock(tiny_model(model_type)), load_arch(model_type)
    before, wanted = logits(model), logits(by_hand(model, {1: exact_for(model_type)}))
    apply_plan(model, {Site(1): SitePlan((Swap(exact_for(model_type)),), Exact())}, arch, base_of(model))
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)
    with dense(model):
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    assert torch.equal(logits(remove_plan(model)), before)


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_drelu_and_its_executors(model_type: str, tiny_model: Callable[[str], Path]) -> None:
    """relu(g) relu(u) by hand; exact, gate first and the plain forward are one; the density is the mean of
    product > 0.
    """
    model, arch = stock(tiny_model(model_type)), load_arch(model_type)
    torch.testing.assert_close(
        logits(by_hand(model, {0: "drelu", 1: "drelu"})), logits(swapped(model, arch, "drelu")), rtol=0, atol=1e-4
    )
    plain = logits(model)
    seen: dict[int, Tensor] = {}
    for layer in range(2):
        module = model.get_submodule(arch.ffn_module(layer))
        getattr(module, arch.ffn.down).register_forward_pre_hook(
            lambda _, given, layer=layer: seen.__setitem__(layer, given[0])
        )
    for gate in (Exact(), threshold(0.0)):
        apply_plan(model, {Site(layer): SitePlan((Swap("drelu"),), gate) for layer in range(2)}, arch, base_of(model))
        with recording(model) as record:
            assert torch.equal(logits(model), plain), gate
        remove_plan(model)
        if isinstance(gate, Exact):
            assert record.density() == {
                Site(layer): pytest.approx(float((z > 0).double().mean())) for layer, z in seen.items()
            }
            opened = record.opened_share()
            assert all(
                0.4 < opened[site] < 0.6 and 0.1 < share < opened[site] for site, share in record.density().items()
            )
            gates = {Site(0): opened[Site(0)], Site(1): opened[Site(1)]}
            assert not record.near
        else:
            assert record.density() == gates, "gate first keeps the units whose gate is not zero"
            assert not any(bool(near.any()) for near in record.near.values()), "a gate of about 0 decides nothing"
            assert not record.opened


def swapped(model: Any, arch: Any, activation: str) -> Any:
    for layer in range(2):
        swap(model.get_submodule(arch.ffn_module(layer)), arch, activation)
    return model


def test_a_threshold_above_zero_masks_the_swapped_network(tiny_model: Callable[[str], Path]) -> None:
    model, arch = stock(tiny_model("llama")), load_arch("llama")
    apply_plan(model, {Site(0): SitePlan((Swap("drelu"),), threshold(0.3))}, arch, "silu")
    module, x = model.get_submodule(arch.ffn_module(0)), torch.randn(7, D)
    with torch.no_grad(), recording(model) as record:
        gate = F.relu(module.gate_proj(x))
        torch.testing.assert_close(module(x), module.down_proj(gate * F.relu(module.up_proj(x)) * (gate > 0.3)))
    assert record.kept == {Site(0): int((gate > 0.3).sum())}


def test_a_swapped_model_takes_its_own_activation_only(tiny_model: Callable[[str], Path]) -> None:
    model, arch = swapped(stock(tiny_model("llama")), load_arch("llama"), "drelu"), load_arch("llama")
    with pytest.raises(InputError, match=r"layers.1.ffn's activation must be drelu as in the model, got relu"):
        apply_plan(
            model,
            {Site(0): SitePlan((Swap("drelu"),), Exact()), Site(1): SitePlan((Swap("relu"),), Exact())},
            arch,
            "silu",
        )
    assert not any("forward" in vars(module) for module in model.modules()), "nothing was gated before the error"
    before = logits(model)
    apply_plan(model, {Site(0): SitePlan((), threshold(0.3))}, arch, "silu")
    with dense(model):
        assert torch.equal(logits(model), before), "ungated, a swapped model is itself"
    assert not torch.equal(logits(model), before)


def test_the_jump_of_fatrelu_is_near(tiny_model: Callable[[str], Path]) -> None:
    model, arch = stock(tiny_model("llama")), load_arch("llama")
    module, x = (
        model.get_submodule(arch.ffn_module(0)),
        torch.randn(1, 2, D, generator=torch.Generator().manual_seed(3)),
    )
    with torch.no_grad():
        value = float(module.gate_proj(x)[0, 1].abs().min() + 0.5)
        module.gate_proj.weight[7] *= value / module.gate_proj(x)[0, 1, 7]
        found = float(module.gate_proj(x)[0, 1, 7])
        for b, near in ((found, True), (found - 100 * NEAR, False)):
            if not near:
                clear = (module.gate_proj(x) - b).abs().min()
                assert float(clear) > 1e-4, "no other unit is near by chance"
            apply_plan(model, {Site(0): SitePlan((Swap(spelled(b)),), Exact())}, arch, "silu")
            with recording(model) as record:
                module(x)
            assert record.near[Site(0)].tolist() == [[False, near]]
            remove_plan(model)


def spelled(b: float) -> str:
    from sparsegate.runtime_onnx.ops.activation import spell_activation

    return spell_activation("fatrelu", b)


# The method


def sizes(*layers: int) -> Any:
    return {
        Site(layer): {"sizes:gate.hidden": torch.tensor(D), "sizes:gate.units": torch.tensor(N)} for layer in layers
    }


def test_the_method_swaps_every_network() -> None:
    stats = sizes(0, 1) | {Site(0, kind="linear:q_proj"): {}}
    assert exact.plan(stats, load_arch("llama"), exact.Config(activation="drelu")) == {
        Site(0): SitePlan((Swap("drelu"),), Exact()),
        Site(1): SitePlan((Swap("drelu"),), Exact()),
    }
    assert exact.plan(stats, load_arch("phi"), exact.Config(activation="fatrelu(0.01)"))[Site(1)] == SitePlan(
        (Swap("fatrelu(0.01)"),), Exact()
    )
    assert exact.plan(sizes(0), load_arch("llama"), exact.Config()) == {Site(0): SitePlan((), Exact())}, (
        "its own activation, which the caller knows"
    )
    with pytest.raises(InputError, match="got drelu in phi. Use relu"):
        exact.plan(sizes(0), load_arch("phi"), exact.Config(activation="drelu"))


@pytest.mark.parametrize(
    ("activation", "words"),
    [("silu", "must have exact zeros"), ("glu", "activation must be one of"), ("fatrelu(2)", "fatrelu")],
)
def test_the_method_refuses_what_has_no_zeros(activation: str, words: str) -> None:
    with pytest.raises(InputError, match=f"exact.activation .*{words}"):
        make_config("exact", {"activation": activation})

"""Linear sites and residuals on gate thresholds: plans, costs and files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_plans import D, N, R, input_plan, linear, logits, residual_entry
from models import MODEL_TYPES
from plan_checks import same

from sparsegate.converter.arch import load_arch
from sparsegate.converter.arch.shapes import linear_rows, linear_shapes
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.cost import SiteSize, block_cost, cost, mlp_cost
from sparsegate.converter.checkpoint.plan import (
    LINEARS,
    Plan,
    Predictor,
    Residual,
    SitePlan,
    Threshold,
    check_plan,
    load_plan,
    make_site_plan,
    merge,
    save_plan,
)
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.checkpoint.sparsity import encode, read_sparsity, write_sparsity
from sparsegate.converter.checkpoint.stage import Header, write_json
from sparsegate.converter.checkpoint.writer import write_checkpoint
from sparsegate.converter.modeling.gated import apply_plan, load, load_dense
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.untrusted import read_json

# Plans


def test_merge_keeps_neurons_before_the_linears_inside() -> None:
    tau = SitePlan(gate=Threshold("input", torch.zeros(4), 0.5))
    teal: Plan = {linear(layer, name): tau for layer in range(2) for name in LINEARS}
    united = merge([{Site(1): residual_entry()}, teal])
    assert list(united) == [*(linear(0, name) for name in LINEARS), Site(1), *(linear(1, name) for name in LINEARS[:4])]
    assert list(merge([teal, {Site(1): residual_entry()}])) == list(united), "the order of plans does not matter"
    assert len(teal) == 14, "nothing is taken from the plans given"
    with pytest.raises(InputError, match="got layers.1.ffn twice"):
        merge([united, {Site(1): residual_entry()}])


def bad_plans() -> list[tuple[Plan, tuple[str, ...]]]:
    channel = SitePlan(gate=Threshold("input", torch.zeros(D), 0.5))
    gate = SitePlan(gate=Threshold("gate", torch.zeros(N), 0.5))
    r = torch.zeros(R, D)
    return [
        ({Site(0): gate, linear(0, "up_proj"): channel}, ("layers.0.ffn", "up_proj")),
        (
            {linear(0, "down_proj"): SitePlan(gate=Threshold("input", torch.zeros(N), 0.5)), Site(0): gate},
            ("layers.0.ffn", "down_proj"),
        ),
        ({Site(0): channel}, ("layers.0.ffn", "input")),
        ({linear(0, "q_proj"): gate}, ("layers.0.linear.q_proj", "gate")),
        (
            {linear(0, "q_proj"): SitePlan(gate=Predictor(r, torch.zeros(D, R), torch.zeros(D), 0.5))},
            ("layers.0.linear.q_proj", "predictor"),
        ),
        (
            {linear(0, "q_proj"): SitePlan(gate=Threshold("input", torch.zeros(D), 0.5), residual=Residual(r, r))},
            ("layers.0.linear.q_proj", "residual"),
        ),
        ({linear(0, "z_proj"): channel}, ("layers.0.linear:z_proj".replace(":", "."), "q_proj")),
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
            Site(0): residual_entry(),
            linear(0, "o_proj"): SitePlan(gate=Threshold("input", torch.zeros(D), 0.5)),
            linear(1, "up_proj"): SitePlan(gate=Threshold("input", torch.zeros(D), 0.5)),
        }
    )


def test_half_a_residual() -> None:
    """A threshold has no hidden layer that a residual could share, and a hidden layer alone is none."""
    gate = Threshold("gate", torch.zeros(N), 0.5)
    with pytest.raises(InputError, match="residual of layers.0.ffn must have .*, got another at threshold"):
        check_plan({Site(0): SitePlan((), gate, Residual(torch.zeros(R, D)))})
    fields = {"kind": "threshold", "score": "gate", "density": 0.5}
    with pytest.raises(InputError, match="must have weight, got only fc1"):
        make_site_plan([], fields, {"tau": gate.tau, "residual.fc1.weight": torch.zeros(R, D)})


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (
            {linear(0, "down_proj"): SitePlan(gate=Threshold("input", torch.zeros(D), 0.5))},
            ("layers.0.linear.down_proj.tau", "[176]", "[64]"),
        ),
        (
            {linear(2, "q_proj"): SitePlan(gate=Threshold("input", torch.zeros(D), 0.5))},
            ("layers.2.linear.q_proj", "layers.1.ffn"),
        ),
        (
            {
                Site(0): SitePlan(
                    gate=Threshold("gate", torch.zeros(N), 0.5),
                    residual=Residual(torch.zeros(R, D + 1), torch.zeros(R, D)),
                )
            },
            ("residual.weight", "[5, 64]", "[5, 65]"),
        ),
        (
            {
                Site(0): SitePlan(
                    gate=Threshold("gate", torch.zeros(N), 0.5),
                    residual=Residual(torch.zeros(R, D), torch.zeros(R, D + 1)),
                )
            },
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
            model,
            {linear(0, "gate_proj"): SitePlan(gate=Threshold("input", torch.zeros(D), 0.5))},
            load_arch("phi"),
            "gelu_tanh",
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
    channel, size = SitePlan((), Threshold("input", torch.zeros(D), 0.25)), SiteSize(D, N, 3)
    attention, network = 2 * 64 * 64 + 2 * 32 * 64, 3 * 176 * 64
    assert cost(channel, size, 0.25) == 0.25
    assert cost(residual_entry(), size, 0.4) == pytest.approx((176 * 64 * (1 + 2 * 0.4) + 2 * R * 64) / network)
    assert mlp_cost({}, arch, config) == block_cost({}, arch, config) == 1.0
    plan: Plan = {linear(0, "q_proj"): channel, linear(0, "up_proj"): channel, Site(1): residual_entry()}
    gated = (176 * 64 * (1 + 2 * 0.5) + 2 * R * 64) / network
    assert mlp_cost(plan, arch, config) == pytest.approx(((2 + 0.25) / 3 + gated) / 2)
    touched = attention - 0.75 * 64 * 64 + network - 0.75 * 176 * 64 + attention + gated * network
    assert block_cost(plan, arch, config) == pytest.approx(touched / 2 / (attention + network))
    realised = {linear(0, "q_proj"): 1.0, linear(0, "up_proj"): 1.0, Site(1): 1.0}
    assert block_cost(plan, arch, config, realised) == pytest.approx(1 + 2 * R * 64 / 2 / (attention + network))


def test_cost_of_a_plain_network(tiny_model: Callable[[str], Path]) -> None:
    arch, config = load_arch("phi"), load_dense(tiny_model("phi")).config
    plan: Plan = {
        linear(layer, "down_proj"): SitePlan(gate=Threshold("input", torch.zeros(N), 0.5)) for layer in range(2)
    }
    assert mlp_cost(plan, arch, config) == 0.75 and block_cost(plan, arch, config) == pytest.approx(
        1 - 0.5 * N * D / (4 * D * D + 2 * N * D)
    )


# Files


def make_plan() -> Plan:
    g = torch.Generator().manual_seed(0)
    widths = {linear(0, "q_proj"): D, linear(0, "down_proj"): N, linear(1, "o_proj"): D}
    channels: Plan = {
        site: SitePlan(gate=Threshold("input", torch.rand(width, generator=g), 0.3)) for site, width in widths.items()
    }
    return channels | {Site(1): residual_entry()}


def assert_equal(found: Plan, expected: Plan) -> None:
    assert set(found) == set(expected)
    assert all(same(found[site], entry) for site, entry in expected.items())


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
    assert {"tau", "residual.fc1.weight", "residual.weight"} == set(plan[Site(1)].tensors())


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_load_equals_apply(model_type: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    arch, model = load_arch(model_type), load_dense(tiny_model(model_type))
    plan = merge([{Site(1): residual_entry()}, input_plan(arch, model.config)])
    (tmp_path / "out").mkdir()
    write_checkpoint(open_source(tiny_model(model_type)), plan, tmp_path / "out")
    assert_equal(read_sparsity(tmp_path / "out")[0], plan)
    found = logits(load(tmp_path / "out"))
    assert torch.equal(found, logits(apply_plan(model, plan, arch, "silu")))
    bare = replace(residual_entry(), residual=None)
    without = apply_plan(load_dense(tiny_model(model_type)), plan | {Site(1): bare}, arch, "silu")
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

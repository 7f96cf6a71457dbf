"""Version 2 of the sparse checkpoint: swapped activations and sites that keep what is not zero."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_checks import same

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Exact, Plan, Predictor, Residual, SitePlan, Swap, Threshold
from sparsegate.converter.checkpoint.sparsity import (
    TENSORS,
    encode,
    read_key,
    read_sparsity,
    stock_config,
    write_sparsity,
)
from sparsegate.runtime_onnx.errors import InputError

D, N, R = 5, 7, 3
STOCK = {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": D,
}


def make_plan() -> Plan:
    """Every score of a swapped network, one that is not swapped, and a linear."""
    g = torch.Generator().manual_seed(0)
    tau = torch.rand(N, generator=g)
    predictor = Predictor(torch.randn(R, D, generator=g), torch.randn(N, R, generator=g), tau, 0.25)
    residual = Residual(torch.randn(R, D, generator=g))
    return {
        Site(0): SitePlan((Swap("drelu"),), Exact(0.0625, 0.25)),
        Site(1): SitePlan((Swap("fatrelu(0.01)"),), Threshold("gate", tau, 0.5)),
        Site(2): SitePlan((Swap("relu"),), predictor, residual),
        Site(3): SitePlan(gate=Threshold("gate", tau, 0.75)),
        Site(3, kind="linear:q_proj"): SitePlan(gate=Threshold("input", torch.rand(D, generator=g), 0.5)),
    }


def write(folder: Path, plan: Plan, raw: dict[str, Any] = STOCK, activation: str = "gelu_tanh") -> Path:
    (folder / "config.json").write_text(json.dumps(raw))
    write_sparsity(folder, plan, activation)
    return folder


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_round_trip(tmp_path: Path) -> None:
    plan, (found, activations) = make_plan(), read_sparsity(write(tmp_path, make_plan()))
    assert list(found) == list(plan)
    assert all(same(entry, found[site]) for site, entry in plan.items())
    assert activations == {
        "layers.0.ffn": "drelu",
        "layers.1.ffn": "fatrelu(0.01)",
        "layers.2.ffn": "relu",
        "layers.3.ffn": "gelu_tanh",
    }


def test_what_is_written(tmp_path: Path) -> None:
    raw = config(write(tmp_path, make_plan()))
    assert raw.pop("sparsity") == {
        "version": 2,
        "base_activation": "gelu_pytorch_tanh",
        "sites": {
            "layers.0.ffn": {"score": "exact", "activation": "drelu", "density": 0.0625, "opened": 0.25},
            "layers.1.ffn": {"score": "gate", "activation": "fatrelu(0.01)", "density": 0.5},
            "layers.2.ffn": {"score": "predictor", "activation": "relu", "density": 0.25, "rank": R, "residual": True},
            "layers.3.ffn": {"score": "gate", "activation": "gelu_tanh", "density": 0.75},
            "layers.3.linear.q_proj": {"score": "input", "density": 0.5},
        },
    }
    assert raw == STOCK | {
        "model_type": "sparsegate_gemma2",
        "architectures": ["SparsegateGemma2ForCausalLM"],
        "hidden_activation": "sparsegate",
    }
    again = config(
        write(tmp_path, {site: entry for site, entry in make_plan().items() if site.layer < 2}, config(tmp_path))
    )
    assert (
        again["sparsity"]["base_activation"] == "gelu_pytorch_tanh" and again["architectures"] == raw["architectures"]
    ), "a plan on a swapped one"
    assert stock_config(again) == STOCK


def test_exact_sites_need_no_tensors(tmp_path: Path) -> None:
    folder = write(tmp_path, {Site(0): SitePlan((Swap("drelu"),), Exact(0.5, 0.5))})
    assert not (folder / TENSORS).exists() and read_sparsity(folder)[0] == {
        Site(0): SitePlan((Swap("drelu"),), Exact(0.5, 0.5))
    }
    other = tmp_path / "other"
    other.mkdir()
    write(other, make_plan())
    (other / TENSORS).unlink()
    with pytest.raises(InputError, match="must be a safetensors file"):
        read_sparsity(other)


def test_a_relu_model_stays_a_stock_one(tmp_path: Path) -> None:
    stock = STOCK | {"hidden_activation": "relu"}
    folder = write(tmp_path, {Site(0): SitePlan((Swap("relu"),), Exact(0.5, 0.5))}, stock, "relu")
    assert {name: value for name, value in config(folder).items() if name != "sparsity"} == stock
    assert config(folder)["sparsity"]["version"] == 2 and read_sparsity(folder)[0] == {
        Site(0): SitePlan((), Exact(0.5, 0.5))
    }, "no edit changes it"
    entry = Threshold("gate", torch.zeros(N), 0.5)
    swapped, plain = SitePlan((Swap("relu"),), entry), SitePlan((), entry)
    assert encode({Site(0): swapped}, "relu")[0] == encode({Site(0): plain}, "relu")[0], "nothing new: version 1"
    assert encode({Site(0): plain}, "relu")[0]["version"] == 1


def test_a_base_activation_is_named_as_transformers_names_it() -> None:
    key, _ = encode({Site(0): SitePlan((Swap("drelu"),), Exact())}, "gelu_tanh")
    assert key["base_activation"] == "gelu_new" and read_key(key).base == "gelu_tanh"
    assert read_key(key).swapped() == {Site(0): "drelu"}


def site(raw: dict[str, Any], layer: int = 0) -> dict[str, Any]:
    return raw["sparsity"]["sites"][f"layers.{layer}.ffn"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["sparsity"].update(version=4), "must be 1 or 2 or 3 for this sparsegate, got 4"),
        (lambda r: r["sparsity"].update(version=1), "must hold sites, version, got .*base_activation"),
        (
            lambda r: (r["sparsity"].update(version=1), r["sparsity"].pop("base_activation")),
            "must be one of gate, predictor for sparsity version 1, got 'exact'",
        ),
        (lambda r: r["sparsity"].pop("base_activation"), "base_activation must be one of .*, got None"),
        (lambda r: r["sparsity"].update(base_activation="mish"), "base_activation must be one of .*, got 'mish'"),
        (lambda r: r["sparsity"].update(colour="red"), "must hold base_activation, sites, version, got .*colour"),
        (lambda r: site(r).update(tau=1), "must hold only .*, got .*tau"),
        (lambda r: site(r).update(residual=True), "must hold only .*, got .*residual"),
        (lambda r: site(r).pop("opened"), "must hold .*opened"),
        (lambda r: site(r).update(opened=1.5), "The opened of layers.0.ffn must be a number from 0 to 1, got 1.5"),
        (lambda r: site(r, 1).update(opened=0.5), "must hold only .*, got .*opened"),
        (
            lambda r: site(r).update(activation="swiglu"),
            "one with exact zeros that this sparsegate knows, got 'swiglu'",
        ),
        (
            lambda r: site(r).update(activation="gelu_tanh"),
            "one with exact zeros that this sparsegate knows, got 'gelu_tanh'",
        ),
        (lambda r: site(r, 1).update(activation="silu"), "one with exact zeros that this sparsegate knows, got 'silu'"),
        (lambda r: site(r, 1).update(activation="fatrelu(0.010)"), "that this sparsegate knows"),
        (lambda r: site(r, 1).update(activation=None), "must be a name, got None"),
        (lambda r: r.update(model_type="gemma2"), "model_type must be sparsegate_<base> .*, got gemma2"),
        (
            lambda r: r.update(hidden_activation="gelu_pytorch_tanh"),
            "hidden_activation must be sparsegate .*, got 'gelu_pytorch_tanh'",
        ),
        (
            lambda r: r["sparsity"].update(sites={"layers.3.ffn": site(r, 3)}),
            "model_type must be a stock one .*, got sparsegate_gemma2",
        ),
        (
            lambda r: r["sparsity"]["sites"].pop("layers.1.ffn"),
            "must hold only what config.json names, got layers.1.ffn.tau",
        ),
        (lambda r: site(r, 2).update(score="exact", opened=0.5), "must hold only .*, got .*rank"),
    ],
)
def test_the_vocabulary_is_closed(change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    folder = write(tmp_path, make_plan())
    raw = config(folder)
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=words) as error:
        read_sparsity(folder)
    assert "\n" not in str(error.value)

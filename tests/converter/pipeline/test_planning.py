"""Flags and recipes as methods and their configurations: what `auto` and `+` mean, and one line for everything else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsegate.converter.checkpoint.cost import SiteSize, cost
from sparsegate.converter.checkpoint.plan import Predictor, Residual, SitePlan, Threshold
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.methods import (
    AUTO,
    CANDIDATES,
    EXACT,
    LINEAR_METHODS,
    METHODS,
    NEURON_METHODS,
    parts_of,
    trained_form,
)
from sparsegate.converter.methods.channels.teal import Config as TealConfig
from sparsegate.converter.methods.gating.chess import Config as ChessConfig
from sparsegate.converter.methods.gating.predictor import Config as PredictorConfig
from sparsegate.converter.modeling.predictor import residual_rank
from sparsegate.converter.pipeline.configs import method_configs, training_windows
from sparsegate.converter.pipeline.estimate import estimate
from sparsegate.converter.pipeline.recipe import Flags, Recipe, compile_recipe, make_recipe
from sparsegate.converter.sources.predictors import Config as ImportedConfig
from sparsegate.runtime_onnx.errors import InputError


def recipe(method: str, budget: dict[str, float] | None = None, seed: int = 3, **config: Any) -> Recipe:
    return make_recipe(
        {"model": "m", "seed": seed, "stages": [{"method": method, "config": config}], "budget": budget or {}}
    )


def flags(
    method: str | None = None, sparsity: float | None = None, ppl: float | None = None, kl: float | None = None
) -> Recipe:
    return compile_recipe(Flags(method=method, sparsity=sparsity, max_ppl_increase=ppl, max_kl=kl))


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as error:
        call()
    line = str(error.value)
    assert "\n" not in line and " must " in line and "got " in line
    return line


def test_every_method_gates_neurons_or_skips_inputs() -> None:
    assert sorted([*NEURON_METHODS, *LINEAR_METHODS, EXACT]) == sorted(METHODS)
    assert all(set(parts_of(name)) <= set(METHODS) for names in AUTO.values() for name in names)
    assert set(NEURON_METHODS) - set(AUTO[False]) == {"svd", "predictor"}
    assert CANDIDATES[False] == ("gate", "chess", "cett") and set(AUTO[False]) - set(CANDIDATES[False]) == {
        "trained_gate"
    }
    assert trained_form("chess+teal") == "trained_gate" and trained_form("exact") == "predictor"
    assert trained_form("imported") is None and trained_form("svd") is None and trained_form("trained_gate") is None


@pytest.mark.parametrize(
    "method", ["gate", "auto", "imported", "chess+teal", "wina+cett", "predictor+teal", "trained_gate+wina"]
)
def test_names_that_are_methods(method: str) -> None:
    assert "+".join(parts_of(method)) == method


@pytest.mark.parametrize(
    "method",
    [
        "gate+gate",
        "gate+imported",
        "imported+teal",
        "auto+teal",
        "gate+chess",
        "teal+wina",
        "gate+teal+wina",
        "gate+",
        "+teal",
        "chess+unknown",
        "chess + teal",
    ],
)
def test_joined_names_that_are_none(method: str) -> None:
    line = refused(lambda: parts_of(method))
    assert line.startswith("A joined method must be one of gate, ") and repr(method) in line and "chess+teal" in line
    assert refused(lambda: flags(method, 0.5)) == refused(lambda: method_configs(recipe(method))) == line


@pytest.mark.parametrize("method", ["unknown", "", "Gate", "reference"])
def test_unknown_methods(method: str) -> None:
    assert refused(lambda: parts_of(method)).startswith(
        f"method must be one of auto, {', '.join(METHODS)}, got {method!r}"
    )
    assert repr(method) in refused(lambda: method_configs(recipe(method)))


def test_flags_compile_to_a_sparsity_or_a_search() -> None:
    assert not flags().searches and flags().stages[0].config == {"sparsity": 0.5} and flags().stages[0].method == "auto"
    assert flags("chess+teal", 0.3).stages[0].config == {"sparsity": 0.3}
    for made in (flags(kl=0.1), flags("teal", ppl=0.01)):
        assert made.searches and made.stages[0].config == {}
    checked = flags("gate", 0.3, kl=0.1)
    assert not checked.searches and checked.budget.bounded, "with both the budget is a check"
    assert (
        not flags("imported").searches
        and flags("imported").stages[0].config == {}
        and flags("imported", kl=0.1).searches
    )


def test_imported_predictors_have_no_sparsity() -> None:
    assert "sparsity must stand without method imported, got 0.4" in refused(lambda: flags("imported", 0.4))
    line = refused(lambda: method_configs(recipe("imported", sparsity=0.4)))
    assert "configuration of imported must hold only" in line and line.endswith("got sparsity. Mend the recipe.")
    found = method_configs(recipe("imported", folder="p", threshold=0.1))
    assert found == {"imported": {"imported": ImportedConfig(folder="p", threshold=0.1)}}
    assert "imported.threshold must be valid, got 'high'" in refused(
        lambda: method_configs(recipe("imported", threshold="high"))
    )


def test_parts_take_the_fields_that_they_know_and_the_seed() -> None:
    found = method_configs(recipe("chess+teal", sparsity=0.3, greedy=False))
    outside = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert found == {
        "chess+teal": {
            "chess": ChessConfig(sparsity=0.3),
            "teal": TealConfig(sparsity=0.3, greedy=False, linears=outside),
        }
    }
    chosen = method_configs(recipe("teal+gate", linears=["o_proj"]))["teal+gate"]["teal"]
    assert isinstance(chosen, TealConfig) and chosen.linears == ("o_proj",)
    assert "got down_proj, up_proj. Leave" in refused(
        lambda: method_configs(recipe("chess+wina", linears=["up_proj", "q_proj", "down_proj"]))
    )
    assert method_configs(recipe("teal")) == {"teal": {"teal": TealConfig()}}, "alone it takes all"
    searched = method_configs(recipe("teal", {"max_kl": 0.1}))["teal"]["teal"]
    assert searched == TealConfig(allocation="greedy"), "a budget is met with shares of their own"
    said = method_configs(recipe("teal", {"max_kl": 0.1}, allocation="uniform"))["teal"]["teal"]
    assert said == TealConfig(allocation="uniform")
    predictor = method_configs(recipe("predictor", rank=7))["predictor"]["predictor"]
    assert isinstance(predictor, PredictorConfig) and predictor.seed == 3 and predictor.rank == 7
    assert list(method_configs(recipe("auto", sparsity=0.3))) == list(AUTO[False])
    searched = ["gate", "chess", "cett", "teal", "wina", "chess+teal", "trained_gate", "trained_input"]
    assert list(method_configs(recipe("auto", {"max_kl": 0.1}))) == searched == list(AUTO[True])
    zeros = method_configs(recipe("auto", {"max_kl": 0.1}), exact=True)
    assert set(zeros) - set(searched) == {"exact", "predictor"}, "the trained form of what keeps zeros"
    assert set(method_configs(recipe("auto", sparsity=0.3), exact=True)) == {*AUTO[False], "exact"}, (
        "which loses nothing"
    )
    assert method_configs(recipe("auto", rank=7)).keys() == set(AUTO[False]), "a field for a model that has zeros"
    assert "got unheard. Mend" in refused(lambda: method_configs(recipe("auto", unheard=1)))
    assert "gate.sparsity must be valid, got 1.5" in refused(lambda: method_configs(recipe("gate", sparsity=1.5)))
    assert "of gate must hold only allocation, densities, sparsity, version, got rank." in refused(
        lambda: method_configs(recipe("gate", rank=3))
    )


def test_a_joined_search_trains_nothing() -> None:
    budget = {"max_kl": 0.1}
    for method in ("predictor+teal", "wina+trained_gate"):
        assert f"alone, got {method}. Set a sparsity" in refused(
            lambda method=method: method_configs(recipe(method, budget))
        )
        assert set(method_configs(recipe(method, budget, sparsity=0.4))) == {method}, (
            "a set sparsity only checks the budget"
        )
        assert set(method_configs(recipe(method))) == {method}
    assert set(method_configs(recipe("predictor+teal", budget, loss="cross_entropy"))) == {"predictor+teal"}
    assert set(method_configs(recipe("predictor", budget))) == {"predictor"}


def test_windows_to_train_on() -> None:
    assert training_windows(method_configs(recipe("chess+teal"))) == 0
    assert training_windows(method_configs(recipe("auto", tune={"data": 77}))) == 77
    assert training_windows(method_configs(recipe("imported"))) == 0


def test_costs_are_expected_where_the_sparsity_is_known(tiny_model: Callable[[str], Path]) -> None:
    source = open_source(tiny_model("llama"))

    def costs(made: Recipe) -> dict[str, float]:
        return estimate(source, made, method_configs(made)).expected_cost

    assert costs(recipe("gate", sparsity=0.4)) == {"gate": pytest.approx((1 + 2 * 0.6) / 3)}
    assert costs(recipe("teal", sparsity=0.4)) == {"teal": pytest.approx(0.6)}
    for joined in ("chess+teal", "teal+chess"):
        assert costs(recipe(joined, sparsity=0.4)) == {joined: pytest.approx((1 + 2 * 0.6) / 3)}, (
            "the networks are chess's"
        )
    d, n = (source.arch.size(source.config, space) for space in ("hidden", "units"))
    assert costs(recipe("predictor", sparsity=0.4, rank=5)) == {
        "predictor": pytest.approx(0.6 + 5 * (d + n) / (3 * d * n))
    }
    assert costs(recipe("auto", {"max_kl": 0.1})) == {} == costs(recipe("imported"))


@pytest.mark.parametrize("model_type", ["llama", "phi"])
def test_expected_costs_count_residual_heads(tiny_model: Callable[[str], Path], model_type: str) -> None:
    """The expected cost is that of an entry with the residual that the method will add."""
    source = open_source(tiny_model(model_type))
    matrices = 2 if model_type == "phi" else 3
    zeros = {rank: torch.zeros(rank, 64) for rank in (residual_rank(176, matrices), 5)}
    rank = residual_rank(176, matrices)
    gate = SitePlan(gate=Threshold("gate", torch.zeros(176), 0.6), residual=Residual(zeros[rank], zeros[rank]))
    trained = Predictor(zeros[5], torch.zeros(176, 5), torch.zeros(176), 0.6)
    predictor, size = SitePlan(gate=trained, residual=Residual(zeros[5])), SiteSize(64, 176, matrices)
    for method, config, entry in (
        ("trained_gate", {}, gate),
        ("predictor", {"rank": 5, "residual": "ridge"}, predictor),
    ):
        made = recipe(method, sparsity=0.4, **config)
        expected = estimate(source, made, method_configs(made)).expected_cost[method]
        assert expected == pytest.approx(cost(entry, size, 0.6))
        without = recipe(method, sparsity=0.4, **config | {"residual": "none"})
        bare = replace(entry, residual=None)
        lower = estimate(source, without, method_configs(without)).expected_cost[method]
        assert lower == pytest.approx(cost(bare, size, 0.6)) and lower < expected


def test_a_training_stage_needs_memory(tiny_model: Callable[[str], Path]) -> None:
    source = open_source(tiny_model("llama"))

    def peak(**tune: Any) -> int:
        stages = [
            {"method": "exact", "config": {"activation": "drelu"}, "tune": {"windows": 4096, **tune}},
            {"method": "exact"},
        ]
        asked = make_recipe({"model": "m", "stages": stages})
        return estimate(source, asked, method_configs(asked)).peak_calibrate

    logits, count = 3 * 4096 * 256 * 290, sum(prod(info.shape) for info in source.tensors.values())
    assert peak() == 500_000_000 + 4 * (5 * count + logits)
    linear = sum(sum(info.shape) for info in source.tensors.values() if len(info.shape) == 2)
    assert peak(lora={"rank": 2}) == 500_000_000 + 4 * (2 * count + 3 * 2 * linear + logits)
    assert peak(windows=1) < peak() and peak(data={"length": 512}) > peak()
    assert peak(processes=2) == 500_000_000 + 4 * (2 * 5 * count + logits) + 2 * 500_000_000, "the caller stays"
    assert peak(processes=2, parallel="fsdp") == peak()

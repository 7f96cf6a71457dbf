"""A plan's predictors written for other systems: folders that come back, and what a folder cannot hold."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from predictor_folders import BELOW_ZERO, LAYERS, RANKS, TOKENS, D, N, entry_of, make_folder, make_tensors_of
from safetensors.torch import load_file, save_file

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Plan, Predictor, Residual, SitePlan, Threshold, uniform_tau
from sparsegate.converter.checkpoint.source import Source, open_source
from sparsegate.converter.modeling.gated import apply_plan, dense, load_dense
from sparsegate.converter.sources.predictor_folder import export_predictors
from sparsegate.converter.sources.predictors import Config, imported_plan
from sparsegate.runtime_onnx.errors import InputError


@pytest.fixture
def source(tiny_model: Callable[[str], Path]) -> Source:
    return open_source(tiny_model("llama"))


def test_f10_round_trip(source: Source, tmp_path: Path) -> None:
    config = {"sparse_threshold": float(np.float32(0.1)), "tap": "input"}
    first = make_folder(tmp_path / "a", config)
    plan = imported_plan(source, Config(folder=str(first)))
    out = export_predictors(plan, tmp_path / "b")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model_0.safetensors", "model_1.safetensors"]
    assert json.loads((out / "config.json").read_text()) == config
    for layer in range(LAYERS):
        wrote, had = load_file(out / f"model_{layer}.safetensors"), make_tensors_of(layer)
        assert (
            set(wrote) == {"fc1.weight", "fc2.weight"}
            and wrote["fc1.weight"].shape == (RANKS[layer], D)
            and wrote["fc2.weight"].shape == (N, RANKS[layer])
        )
        assert all(torch.equal(wrote[role], had[role]) for role in wrote)
    again = imported_plan(source, Config(folder=str(out)))
    assert all(
        torch.equal(a, b)
        for k in range(LAYERS)
        for a, b in zip(plan[Site(k)].tensors().values(), again[Site(k)].tensors().values(), strict=True)
    )


@torch.no_grad()
def test_f10_all_logits_at_the_threshold_equal_dense(source: Source, tmp_path: Path) -> None:
    """With a dead hidden layer every logit is 0: kept under PowerInfer's threshold 0, dropped one float32 higher."""
    folder = make_folder(tmp_path / "p", {"sparse_threshold": 0.0, "tap": "input"})
    for layer in range(LAYERS):
        save_file(
            make_tensors_of(layer) | {"fc1.weight": torch.zeros(RANKS[layer], D)}, folder / f"model_{layer}.safetensors"
        )
    activation = source.arch.activation(source.config)
    for threshold, same in ((0.0, True), (-BELOW_ZERO, False)):
        model = apply_plan(
            load_dense(source.folder),
            imported_plan(source, Config(folder=str(folder), threshold=threshold)),
            source.arch,
            activation,
        )
        gated = model(input_ids=TOKENS).logits
        with dense(model):
            assert torch.equal(gated, model(input_ids=TOKENS).logits) == same


@pytest.mark.parametrize("tau", [BELOW_ZERO, 0.0])
def test_residual_round_trip(source: Source, tmp_path: Path, tau: float) -> None:
    g = torch.Generator().manual_seed(5)
    plan: Plan = {
        Site(k): SitePlan(
            gate=Predictor(torch.randn(r, D, generator=g), torch.randn(N, r, generator=g), uniform_tau(tau, N), 0.5)
        )
        for k, r in enumerate(RANKS)
    }
    out = export_predictors(plan, tmp_path / "p", tap="residual", source=source)
    stored = load_file(out / "model_0.safetensors")["fc1.weight"]
    assert (stored - entry_of(plan, 0).fc1).abs().max() > 0.1
    again = imported_plan(source, Config(folder=str(out)))
    for k in range(LAYERS):
        torch.testing.assert_close(entry_of(again, k).fc1, entry_of(plan, k).fc1, rtol=3e-7, atol=0)
        assert torch.equal(entry_of(again, k).tau, entry_of(plan, k).tau)


def test_differing_taus_travel_as_biases(source: Source, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(6)
    taus = [torch.randn(N, generator=g), torch.randn(N, generator=g) * 1e-30]
    plan: Plan = {
        Site(k): SitePlan(gate=Predictor(torch.randn(r, D, generator=g), torch.randn(N, r, generator=g), taus[k], 0.5))
        for k, r in enumerate(RANKS)
    }
    with pytest.raises(
        InputError, match=r"one threshold for every neuron of every layer, got differing ones in layers\.0\.ffn"
    ):
        export_predictors(plan, tmp_path / "a")
    per_layer: Plan = {
        Site(k): SitePlan(gate=Predictor(torch.zeros(1, D), torch.zeros(N, 1), uniform_tau(0.5 + k, N), 0.5))
        for k in range(2)
    }
    with pytest.raises(InputError, match=r"got 1\.5 after 0\.5 in layers\.1\.ffn"):
        export_predictors(per_layer, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    again = imported_plan(source, Config(folder=str(export_predictors(plan, tmp_path / "b", bias=True))))
    assert all(torch.equal(entry_of(again, k).tau, taus[k]) for k in range(LAYERS))
    with pytest.raises(InputError, match="threshold 0 and no bias, got fc2 biases"):
        export_predictors(plan, tmp_path / "c", tap="residual", source=source, bias=True)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            SitePlan((), Threshold("gate", uniform_tau(0.1, N), 0.5)),
            "one predictor a layer, got threshold at layers.1.ffn",
        ),
        (
            SitePlan(
                (),
                Predictor(torch.zeros(2, D), torch.zeros(N, 2), uniform_tau(0, N), 0.5),
                Residual(torch.zeros(2, D)),
            ),
            "no residual heads and no offsets, got one at layers.1.ffn",
        ),
        (None, "layers 0, 1, 2 and so on, got 0, 2"),
        (
            SitePlan((), Predictor(torch.zeros(2, D), torch.zeros(N, 2), uniform_tau(math.inf, N), 0.5)),
            "sparse_threshold must be a finite float32",
        ),
    ],
)
def test_what_a_folder_cannot_hold(entry: Any, message: str, tmp_path: Path) -> None:
    other = SitePlan((), Predictor(torch.zeros(2, D), torch.zeros(N, 2), uniform_tau(math.inf, N), 0.5))
    with pytest.raises(InputError, match=re.escape(message)):
        export_predictors({Site(0): other, Site(1 if entry else 2): entry or other}, tmp_path / "p")
    with pytest.raises(InputError, match="must be a new folder"):
        export_predictors({Site(0): other}, tmp_path)


def test_export_of_the_residual_tap_needs_model_and_threshold_zero(source: Source, tmp_path: Path) -> None:
    for tau, message in (
        (0.0, "source must be the opened model"),
        (0.5, r"threshold 0 and no bias, got threshold 0\.5"),
    ):
        with pytest.raises(InputError, match=message):
            export_predictors(
                {Site(0): SitePlan(gate=Predictor(torch.zeros(2, D), torch.zeros(N, 2), uniform_tau(tau, N), 0.5))},
                tmp_path / "p",
                tap="residual",
            )

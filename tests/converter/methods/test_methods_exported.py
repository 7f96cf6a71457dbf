"""Every deployable method, from statistics to every executor: torch, ONNX body, ONNX kernel and onnxruntime-genai
agree, with a control that must fail.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gated_torch import put_plan
from models import make_model
from small_recipe import small_recipe

from sparsegate.converter.checkpoint.plan import Exact, Plan, Threshold
from sparsegate.converter.checkpoint.source import Source, open_source
from sparsegate.converter.evaluation.agreement import check_onnx
from sparsegate.converter.methods import AUTO, METHODS
from sparsegate.converter.modeling.gated import apply_plan, load_dense, remove_plan
from sparsegate.converter.onnx_export.export import export
from sparsegate.converter.pipeline.configs import method_configs, training_windows
from sparsegate.converter.pipeline.conversion import Conversion
from sparsegate.converter.pipeline.graphs import make_base
from sparsegate.converter.pipeline.recipe import read_recipe
from sparsegate.converter.pipeline.schedule import once
from sparsegate.converter.pipeline.texts import Texts, make_texts

TUNE = {"steps": 4, "data": 16, "windows": 2, "precision": "fp32"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in (*METHODS, "chess+teal")} | {
    "exact": ("exact", {"activation": "drelu"}),
    "predictor + ridge": ("predictor", {"residual": "ridge"}),
    "cross-entropy on an oracle": ("predictor", {"loss": "cross_entropy", "score": "corrected_gxo", "steps": 40}),
    "predictor from svd": ("predictor", {"begin": "svd"}),
    "linear2": ("predictor", {"loss": "cross_entropy", "form": "linear2", "steps": 40}),
}


class Stage(NamedTuple):
    """What all methods share."""

    source: Source
    base: Path
    model: Any
    folder: Path


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    folder = tmp_path_factory.mktemp("exported")
    source = open_source(make_model("llama", folder / "model"))
    recipe = read_recipe(small_recipe(source.folder, folder))
    texts = make_texts(source, recipe)
    conversion = Conversion(source, texts, recipe, folder)
    return Stage(source, make_base(conversion, source, folder), load_dense(source.folder), folder)


def planned(stage: Stage, case: str) -> tuple[Plan, Texts]:
    method, config = CASES[case]
    tune = {"tune": TUNE} if {"predictor", "trained_gate"} & set(method.split("+")) else {}
    share = {} if method == "exact" else {"sparsity": 0.4}
    recipe = read_recipe(
        small_recipe(
            stage.source.folder, stage.folder, stages=[{"method": method, "config": {**share, **tune, **config}}]
        )
    )
    configs = method_configs(recipe)
    texts = make_texts(stage.source, recipe, training_windows(configs))
    return once(Conversion(stage.source, texts, recipe, stage.folder / f"work {case}"), configs)[method].plan, texts


SLOW = ("chess+teal", "svd", "predictor from svd", "cross-entropy on an oracle", "linear2")


def test_every_method_of_auto_is_a_case() -> None:
    assert {method for names in AUTO.values() for method in names} <= {method for method, _ in CASES.values()}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES]
)
def test_executors_agree(stage: Stage, case: str) -> None:
    plan, texts = planned(stage, case)
    onnx = stage.folder / f"onnx {case}"
    export(put_plan(stage.source.folder, plan, onnx), onnx, base=stage.base)
    activation = stage.source.arch.activation(stage.source.config)
    apply_plan(stage.model, plan, stage.source.arch, activation)
    try:
        checks = check_onnx(onnx, stage.model, plan, texts.heldout)
        assert len(checks) == 7 and [check for check in checks if not check.passed] == []
        assert not any("not run" in check.note for check in checks)
    finally:
        remove_plan(stage.model)
    site, entry = next(iter(plan.items()))
    nothing = torch.full((176,), torch.inf)
    spoiled = plan | {
        site: replace(entry, gate=Threshold("gate", nothing, 0.0))
        if isinstance(entry.gate, Exact)
        else replace(entry, gate=replace(entry.gating, tau=torch.full_like(entry.gating.tau, torch.inf)))
    }
    apply_plan(stage.model, spoiled, stage.source.arch, activation)
    try:
        assert any(
            not check.passed
            for check in check_onnx(onnx, stage.model, spoiled, texts.heldout)
            if check.name == "kernel ops"
        )
    finally:
        remove_plan(stage.model)

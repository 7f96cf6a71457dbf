"""Closed-form residual heads against least squares on tokens that are collected by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import make_model
from torch import Tensor

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Plan, Predictor, SitePlan, Threshold
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.modeling.gated import apply_plan, load_dense, remove_plan
from sparsegate.converter.modeling.predictor import fresh_predictor, residual_rank
from sparsegate.converter.text.windows import Batches
from sparsegate.converter.training.residual import add_residuals

RANK = 12


@pytest.fixture(scope="module", params=["llama", "phi"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return open_source(make_model(request.param, tmp_path_factory.mktemp("residual") / "model"))


@pytest.fixture(scope="module")
def batches() -> Batches:
    tokens = torch.randint(3, 290, (6, 32), generator=torch.Generator().manual_seed(4))
    return Batches(tokens, torch.ones_like(tokens, dtype=torch.bool))


def predictors() -> Plan:
    generator = torch.Generator().manual_seed(1)
    plan: Plan = {}
    for layer in range(2):
        entry = fresh_predictor(64, 176, RANK, generator)
        plan[Site(layer)] = SitePlan(gate=replace(entry, tau=torch.zeros(176), fc2=entry.fc2 - entry.fc2.mean()))
    return plan


@torch.no_grad()
def outputs(model, source, plan: Plan, tokens: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, d] of a layer under `plan`, its masked output and its dense output [T, d]."""
    module = model.get_submodule(source.arch.ffn_module(layer))
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    apply_plan(model, plan, source.arch, source.arch.activation(source.config))
    try:
        model(input_ids=tokens)
        masked = module(seen[0])
    finally:
        handle.remove()
        remove_plan(model)
    return seen[0].flatten(0, 1), masked.flatten(0, 1), module(seen[0]).flatten(0, 1)


def test_residual_is_the_ridge_solution_layer_by_layer(source, batches: Batches) -> None:
    model, plan = load_dense(source.folder), predictors()
    found = add_residuals(model, source.arch, source.arch.activation(source.config), plan, batches, 8)
    so_far: Plan = dict(plan)
    for layer in range(2):
        x, masked, dense = outputs(model, source, so_far, batches.tokens, layer)
        gate, residual = found[Site(layer)].gate, found[Site(layer)].residual
        assert isinstance(gate, Predictor) and residual is not None and residual.fc1 is None
        assert residual.weight.shape == (RANK, 64)
        hidden = torch.relu(x @ gate.fc1.T).double()
        gram = hidden.T @ hidden
        expected = torch.linalg.solve(
            gram + 1e-3 * gram.diagonal().mean() * torch.eye(RANK), hidden.T @ (dense - masked).double()
        )
        assert torch.allclose(residual.weight.double(), expected, atol=1e-5, rtol=1e-4)
        left = (dense - masked).double() - hidden @ expected
        assert float(left.square().sum()) < 0.97 * float((dense - masked).double().square().sum())
        so_far[Site(layer)] = found[Site(layer)]


def test_gates_get_the_directions_of_reduced_rank_regression(source, batches: Batches) -> None:
    model, activation = load_dense(source.folder), source.arch.activation(source.config)
    plan: Plan = {Site(0): SitePlan(gate=Threshold("gate", torch.full((176,), 0.3), 0.5))}
    entry = add_residuals(model, source.arch, activation, plan, batches, 8)[Site(0)]
    assert isinstance(entry.gate, Threshold) and entry.residual is not None
    fc1 = entry.residual.fc1
    assert fc1 is not None and fc1.shape == (8, 64)
    assert torch.equal(fc1[:4], -fc1[4:])
    x, masked, dense = (part.double() for part in outputs(model, source, plan, batches.tokens, 0))
    target = dense - masked

    def explained(directions: Tensor) -> float:
        inner = x @ directions.double().T
        left = target - inner @ torch.linalg.lstsq(inner, target).solution
        return 1 - float(left.square().sum() / target.square().sum())

    # the best linear map of rank 4 projects the fitted values on their four leading principal directions
    full = x @ torch.linalg.lstsq(x, target).solution
    leading = torch.linalg.svd(full, full_matrices=False).S[:4].square().sum() / target.square().sum()
    assert explained(fc1[:4]) == pytest.approx(float(leading), abs=2e-3)
    assert explained(torch.eye(64)[:4]) < float(leading) - 0.01
    model_sparse = outputs(model, source, {Site(0): entry}, batches.tokens, 0)[1].double()
    assert float((dense - model_sparse).square().sum()) < 0.95 * float(target.square().sum())


@pytest.mark.parametrize(("units", "matrices", "rank"), [(512, 3, 38), (176, 2, 8), (4, 2, 2)])
def test_rank_of_a_residual_of_its_own(units: int, matrices: int, rank: int) -> None:
    assert residual_rank(units, matrices) == rank


def test_other_tensors_and_sites_stay(source, batches: Batches) -> None:
    model, plan = load_dense(source.folder), predictors()
    plan[Site(1, kind="linear:q_proj")] = SitePlan(gate=Threshold("input", torch.full((64,), 0.1), 0.5))
    found = add_residuals(model, source.arch, source.arch.activation(source.config), plan, batches, 8)
    assert found[Site(1, kind="linear:q_proj")] == plan[Site(1, kind="linear:q_proj")]
    before, after = plan[Site(0)].gating, found[Site(0)].gating
    assert isinstance(before, Predictor) and isinstance(after, Predictor)
    assert all(torch.equal(getattr(before, name), getattr(after, name)) for name in ("fc1", "fc2", "tau"))

"""Statistics, gradients and residual heads of a model with swapped activations see the swapped networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCAB
from test_swap import N, exact_for
from torch import Tensor

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Exact, Plan, SitePlan, Swap, Threshold, uniform_tau
from sparsegate.converter.checkpoint.source import Source, open_source
from sparsegate.converter.checkpoint.writer import write_checkpoint
from sparsegate.converter.modeling.gated import apply_plan as gate
from sparsegate.converter.modeling.gated import load_dense, remove_plan
from sparsegate.converter.modeling.gradients import AttributionSettings, attribute
from sparsegate.converter.stats.collect import collect
from sparsegate.converter.text.windows import Batches
from sparsegate.converter.training.residual import add_residuals

BATCHES = Batches(
    torch.randint(3, VOCAB, (6, 32), generator=torch.Generator().manual_seed(4)), torch.ones(6, 32, dtype=torch.bool)
)


@pytest.fixture(scope="module", params=["llama", "phi3", "phi"], name="source")
def _source(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Source:
    out = tmp_path_factory.mktemp("swapped") / "out"
    out.mkdir()
    write_checkpoint(
        open_source(tiny_model(request.param)),
        {
            Site(0): SitePlan((Swap(exact_for(request.param)),), Exact()),
            Site(1): SitePlan((Swap("fatrelu(0.25)"),), Exact()),
        },
        out,
    )
    return open_source(out)


@torch.no_grad()
def neurons(model: Any, source: Source) -> dict[Site, tuple[Tensor, Tensor]]:
    """x [T, d] and z [T, n] of every site, from hooks."""
    found: dict[Site, list[Tensor]] = {Site(layer): [] for layer in range(2)}
    handles = []
    for site, seen in found.items():
        module = model.get_submodule(source.arch.ffn_module(site.layer))
        handles.append(
            module.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].flatten(0, 1)))
        )
        handles.append(
            getattr(module, source.arch.ffn.down).register_forward_pre_hook(
                lambda _, given, seen=seen: seen.append(given[0].flatten(0, 1))
            )
        )
    model(input_ids=BATCHES.tokens)
    for handle in handles:
        handle.remove()
    return {site: (x, z) for site, (x, z) in found.items()}


def test_collected_statistics_are_the_swapped_networks(source: Source, tmp_path: Path) -> None:
    expected = neurons(load_dense(source.folder), source)
    found = collect(source, BATCHES, ["histogram:abs_z", "histogram:gate"], tmp_path)
    for site, (_, z) in expected.items():
        zeros = int((z == 0).sum())
        assert (
            int(found[site]["histogram:abs_z.count"][0]) == zeros
            and int(found[site]["histogram:abs_z.count"].sum()) == z.numel()
        )
        gates = int(found[site]["histogram:gate.count"][0])
        two = source.arch.ffn.kind == "gated" and site.layer == 0
        assert (gates < 0.8 * zeros) if two else (gates == zeros), "dReLU has zeros of the up projection as well"
        assert 0.3 * z.numel() < gates < 0.9 * z.numel()


def test_gradients_are_the_swapped_networks(source: Source) -> None:
    model, tokens = load_dense(source.folder), BATCHES.tokens[:2, :12]
    sites = attribute(model, source.arch, tokens, AttributionSettings(kinds=("ffn",), local=False)).sites
    labels = model(input_ids=tokens).logits.argmax(-1)
    for site, found in sites.items():
        down = model.get_submodule(source.arch.ffn_module(site.layer) + "." + source.arch.ffn.down)
        scale = torch.ones(2, 12, N, requires_grad=True)
        values: list[Tensor] = []

        def see(_: Any, given: tuple[Tensor, ...], values: list[Tensor] = values, scale: Tensor = scale) -> Tensor:
            values.append(given[0])
            return given[0] * scale

        handle = down.register_forward_pre_hook(see)
        torch.nn.functional.cross_entropy(
            model(input_ids=tokens).logits.flatten(0, 1), labels.flatten(), reduction="sum"
        ).backward()
        handle.remove()
        torch.testing.assert_close(found.value, values[0].detach(), rtol=0, atol=1e-5)
        assert scale.grad is not None
        torch.testing.assert_close(found.value * found.grad, scale.grad, rtol=1e-3, atol=1e-5)
        assert float((found.value == 0).float().mean()) > 0.3


@torch.no_grad()
def test_residuals_make_up_for_what_the_swapped_network_skips(source: Source) -> None:
    model, base = load_dense(source.folder), source.arch.activation(source.config)
    swap = source.swaps[Site(0)]
    plan: Plan = {
        Site(0): replace(swap, gate=Threshold("gate", uniform_tau(0.4, N), 0.5)),
        Site(1): source.swaps[Site(1)],
    }
    found = add_residuals(model, source.arch, base, plan, BATCHES, 8)
    assert found[Site(1)] == plan[Site(1)], "zeros need nothing"
    residual = found[Site(0)].residual
    assert found[Site(0)].edits == swap.edits and isinstance(found[Site(0)].gate, Threshold)
    assert residual is not None and residual.fc1 is not None
    x, _ = neurons(model, source)[Site(0)]
    module = model.get_submodule(source.arch.ffn_module(0))
    whole = module(x)
    gate(model, plan, source.arch, base)
    skipped = whole - module(x)
    gate(remove_plan(model), found, source.arch, base)
    left = whole - module(x)
    remove_plan(model)
    inner = torch.relu(x @ residual.fc1.T).double()
    gram = inner.T @ inner
    expected = torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(8), inner.T @ skipped.double())
    torch.testing.assert_close(residual.weight.double(), expected, rtol=1e-4, atol=1e-5)
    assert float(left.square().sum()) < 0.97 * float(skipped.square().sum())

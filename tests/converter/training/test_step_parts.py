"""The windows of a training step in threads of their own: the same loss and gradients as in one, the same bits every
time, and nothing left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCAB
from torch import Tensor

from sparsegate.converter.arch import load_arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Plan, SitePlan
from sparsegate.converter.methods.tune import Tune
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.modeling.predictor import fresh_predictor
from sparsegate.converter.training.inputs import Models
from sparsegate.converter.training.selection import SelectionObjective
from sparsegate.converter.training.settings import Settings

D, N = 64, 176


@pytest.fixture(name="objective")
def _objective(tiny_model: Callable[[str], Path]) -> Iterator[SelectionObjective]:
    model, arch = load_dense(tiny_model("llama")), load_arch("llama")
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    plan: Plan = {Site(layer): SitePlan(gate=fresh_predictor(D, N, 12, generator)) for layer in range(2)}
    tokens = torch.randint(3, VOCAB, (2, 24), generator=generator)
    models, tune = (
        Models(model, None, arch, arch.activation(model.config)),
        Tune(local=0.2, precision="fp32", likeliest=0),
    )
    yield SelectionObjective(models, plan, tune, Settings(10, 4, 4e-3), 0.5, [0.5], tokens)
    torch.set_num_threads(before)


def windows(count: int) -> tuple[Tensor, Tensor]:
    """Windows [count, 24], the last one but three positions padded."""
    tokens = torch.randint(3, VOCAB, (count, 24), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[-1, 3:] = False
    return tokens, mask


def step(objective: SelectionObjective, count: int, threads: int) -> tuple[float, dict[str, float], Tensor]:
    """Loss, figures and the gradients of all tensors in one, of a step of `count` windows."""
    torch.set_num_threads(threads)
    objective.restore({"price": 0.3, "shift": 0.0, "steps": 3})
    leaves = [tensor for tensor, _ in objective.parameters().values()]
    for leaf in leaves:
        leaf.grad = None
    loss = objective.loss(*windows(count), step=3)
    loss.backward()
    assert torch.get_num_threads() == threads
    return (
        float(loss.detach()),
        objective.figures,
        torch.cat([leaf.grad.flatten() for leaf in leaves if leaf.grad is not None]),
    )


@pytest.mark.parametrize(("count", "threads"), [(2, 2), (4, 2), (3, 2), (3, 8)])
def test_threads_change_nothing_but_the_time(count: int, threads: int, objective: SelectionObjective) -> None:
    loss, figures, gradients = step(objective, count, threads)
    again = step(objective, count, threads)
    assert again[:2] == (loss, figures) and torch.equal(again[2], gradients)
    alone = step(objective, count, 1)
    assert loss == pytest.approx(alone[0], rel=1e-5) and figures == pytest.approx(alone[1], rel=1e-5)
    assert float((gradients - alone[2]).abs().max()) < 1e-5 * float(alone[2].abs().max())
    other = step(objective, count + 1, threads)
    assert float((gradients - other[2]).abs().max()) > 1e-2 * float(alone[2].abs().max()), "another step has others"


def test_an_error_in_a_thread_leaves_a_dense_model(
    objective: SelectionObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)

    def broken(*_: Any) -> Tensor:
        raise ValueError("broken")

    monkeypatch.setattr("sparsegate.converter.training.selection.kl_divergence", broken)
    with pytest.raises(ValueError, match="broken"):
        objective.loss(*windows(2), step=3)
    assert torch.get_num_threads() == 2 and not any(
        "forward" in vars(module) for module in objective.models.student.modules()
    )

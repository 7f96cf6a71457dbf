"""AdamW and Muon as the loop makes them: who takes which tensor, decay of matrices only, and Muon against
its formula.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsegate.converter.training.optimizers import Trained, make_optimizers, moments
from sparsegate.runtime_onnx.errors import InputError


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def make(optimizer: str, weight_decay: float = 0.0) -> tuple[dict[str, Trained], list[torch.optim.Optimizer]]:
    trained = {
        "wide": Trained(leaf(6, 20), 1.0, hidden=True),
        "tall": Trained(leaf(30, 8, seed=1), 0.5, hidden=True),
        "embedding": Trained(leaf(12, 8, seed=2)),
        "bias": Trained(leaf(8, seed=3), 1.0, hidden=True),
    }
    return trained, make_optimizers(trained, 0.02, optimizer, (0.9, 0.95), weight_decay)


def orthogonal(g: Tensor) -> Tensor:
    """Five Newton-Schulz steps 3.4445 X - 4.7750 X X^T X + 2.0315 (X X^T)^2 X in fp64 from X = G / |G|."""
    x = g.double() / g.double().norm()
    for _ in range(5):
        xx = x @ x.T
        x = 3.4445 * x - 4.7750 * xx @ x + 2.0315 * xx @ xx @ x
    return x


def test_muon_takes_hidden_matrices_by_its_formula_and_adamw_the_rest() -> None:
    trained, optimizers = make("muon", weight_decay=0.1)
    start = {name: each.tensor.detach().clone() for name, each in trained.items()}
    momenta = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    g = torch.Generator().manual_seed(7)
    for _ in range(3):
        for name, each in trained.items():
            each.tensor.grad = torch.randn(each.tensor.shape, generator=g)
            momenta[name] = 0.95 * momenta[name] + 0.05 * each.tensor.grad
            update = 0.95 * momenta[name] + 0.05 * each.tensor.grad
            if name in ("wide", "tall"):
                rate = 0.02 * each.share
                start[name] *= 1 - rate * 0.1
                step = rate * 0.2 * max(start[name].shape) ** 0.5 * orthogonal(update)
                start[name] -= step.float()
                assert 0.5 < float(step.square().mean().sqrt()) / (0.2 * rate) < 1.3, "rms as AdamW's, times 0.2"
        for one in optimizers:
            one.step()
    for name in ("wide", "tall"):
        change = float((trained[name].tensor - start[name]).detach().abs().max())
        assert change < 2e-3, "the formula's, within bf16"
        assert sorted(moments(optimizers, trained[name].tensor)) == ["momentum_buffer"]
    for name in ("embedding", "bias"):
        assert sorted(moments(optimizers, trained[name].tensor)) == ["exp_avg", "exp_avg_sq", "step"]
    assert float((trained["wide"].tensor - leaf(6, 20)).detach().abs().max()) > 0.01


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_decay(optimizer: str) -> None:
    trained, optimizers = make(optimizer, weight_decay=0.5)
    before = {name: each.tensor.detach().clone() for name, each in trained.items()}
    for each in trained.values():
        each.tensor.grad = torch.zeros_like(each.tensor)
    for one in optimizers:
        one.step()
    for name, each in trained.items():
        kept = 1.0 if name == "bias" else 1 - 0.02 * each.share * 0.5
        assert torch.allclose(each.tensor, before[name] * kept, rtol=1e-6, atol=0), name


def test_adamw_takes_everything_at_its_rates() -> None:
    trained, optimizers = make("adamw")
    assert len(optimizers) == 1
    peaks = {id(tensor): group["peak"] for group in optimizers[0].param_groups for tensor in group["params"]}
    assert peaks == {id(each.tensor): 0.02 * each.share for each in trained.values()}


def test_a_torch_without_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(InputError, match=r"torch must have Muon .*, got .*\. Install"):
        make("muon")
    assert len(make("adamw")[1]) == 1

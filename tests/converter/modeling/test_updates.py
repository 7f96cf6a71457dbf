"""Updates beside frozen linear maps: products, merged weights, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsegate.converter.modeling.updates import Update, low_rank, whole

ROWS, COLUMNS, RANK = 10, 6, 3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(name="weight")
def _weight() -> Tensor:
    return drawn(ROWS, COLUMNS)


def moved(update: Update) -> Update:
    """The update after training, as it were."""
    with torch.no_grad():
        for k, tensor in enumerate(update.tensors.values()):
            tensor += 0.3 * drawn(*tensor.shape, seed=k + 7)
    return update


@pytest.mark.parametrize("kind", ["low rank", "whole"])
@pytest.mark.parametrize("biased", [True, False])
def test_the_product_is_that_of_the_merged_weight(kind: str, biased: bool, weight: Tensor) -> None:
    update = low_rank("map", weight, RANK, 0) if kind == "low rank" else whole(weight)
    x, bias = drawn(4, 5, COLUMNS, seed=3), drawn(ROWS, seed=4) if biased else None
    everything = slice(0, ROWS)
    assert torch.equal(update.merged(weight), weight), "nothing changes before training"
    assert torch.allclose(update.product(x, weight, bias, everything), F.linear(x, weight, bias), atol=1e-6)
    expected = F.linear(x, moved(update).merged(weight), bias)
    assert torch.allclose(update.product(x, weight, bias, everything), expected, atol=1e-5)
    assert torch.allclose(update.product(x, weight, bias, slice(2, 7)), expected[..., 2:7], atol=1e-5)
    assert not torch.allclose(expected, F.linear(x, weight, bias), atol=1e-2), "a control: it moved"
    half = update.product(x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16(), everything)
    assert half.dtype == torch.bfloat16 and float((half - expected).norm() / expected.norm()) < 0.02


def test_gradients_reach_the_update_alone(weight: Tensor) -> None:
    update = moved(low_rank("map", weight, RANK, 0))
    x = drawn(7, COLUMNS, seed=3).requires_grad_()
    update.product(x, weight, None, slice(0, ROWS)).square().sum().backward()
    leaves = [x.detach().requires_grad_(), *(tensor.detach().requires_grad_() for tensor in update.tensors.values())]
    (leaves[0] @ (weight + leaves[2] @ leaves[1]).T).square().sum().backward()
    for found, expected in zip([x, *update.tensors.values()], leaves, strict=True):
        assert found.grad is not None and expected.grad is not None
        assert torch.allclose(found.grad, expected.grad, rtol=1e-4, atol=1e-4)
    assert weight.grad is None


def test_the_start_depends_on_name_and_seed_alone(weight: Tensor) -> None:
    def start(name: str, seed: int) -> Tensor:
        return low_rank(name, weight, RANK, seed).tensors["a"]

    assert torch.equal(start("map", 1), start("map", 1))
    assert not torch.equal(start("map", 1), start("map", 2)) and not torch.equal(start("map", 1), start("other", 1))
    wide = low_rank("map", torch.zeros(4, 4096), 64, 0).tensors["a"] @ drawn(4096, 32)
    assert float(wide.std()) == pytest.approx(1.0, rel=0.05), "A x has the rms of x"

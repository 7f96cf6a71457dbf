"""Ridge regression against numpy's least squares on the augmented system."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsegate.converter.modeling.linalg import Gram, ridge
from sparsegate.runtime_onnx.errors import InputError


def problem(tokens: int = 200, rank: int = 7, width: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(tokens, rank, generator=g).relu(), torch.randn(tokens, width, generator=g)


@pytest.mark.parametrize("l2", [0.0, 1e-3, 1.0, 1e4])
def test_ridge_equals_lstsq(l2: float) -> None:
    hidden, target = problem()
    augmented = np.vstack([hidden.double().numpy(), np.sqrt(l2) * np.eye(7)])
    expected = np.linalg.lstsq(augmented, np.vstack([target.double().numpy(), np.zeros((7, 5))]), rcond=None)[0]
    found = ridge(hidden, target, l2)
    assert found.dtype == torch.float64 and found.shape == (7, 5)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)


def test_the_penalty_matters() -> None:
    hidden, target = problem()
    assert float(ridge(hidden, target, 1e4).norm()) < 0.1 * float(ridge(hidden, target, 0.0).norm())


@pytest.mark.parametrize("l2", [0.0, 1e-6])
def test_dead_columns(l2: float) -> None:
    """A hidden unit that is never positive gets no weight, and changes nothing for the others."""
    hidden, target = problem()
    hidden[:, 2] = 0
    found = ridge(hidden, target, l2)
    alive = [0, 1, 3, 4, 5, 6]
    assert bool((found[2].abs() < 1e-12).all())
    torch.testing.assert_close(found[alive], ridge(hidden[:, alive], target, l2), rtol=1e-8, atol=1e-10)


def test_equal_columns_share_their_weight() -> None:
    hidden, target = problem()
    hidden[:, 1] = hidden[:, 0]
    expected = np.linalg.lstsq(hidden.double().numpy(), target.double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(ridge(hidden, target, 0.0).numpy(), expected, rtol=1e-6, atol=1e-9)


def test_batches_add_up() -> None:
    hidden, target = problem()
    gram = Gram.empty(7, 5)
    for at in (slice(0, 1), slice(1, 90), slice(90, 200)):
        gram.add(hidden[at], target[at])
    assert gram.tokens == 200
    torch.testing.assert_close(gram.solve(0.5), ridge(hidden, target, 0.5), rtol=1e-12, atol=1e-14)


def test_negative_penalty() -> None:
    with pytest.raises(InputError, match="l2 must be at least 0, got -1"):
        ridge(*problem(), -1.0)

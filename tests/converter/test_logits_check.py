"""The judgement on logits: strict where positions are clear of thresholds, by the median where hardly any are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsegate.converter.executors import Probe, _logits_check


class Executor:
    """Answers the stored logits plus an error at every position."""

    def __init__(self, logits: Tensor, error: Tensor) -> None:
        self.answers = iter(logits + error[..., None])

    def reset(self) -> None:
        pass

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        return next(self.answers).numpy()


def judged(error: Tensor, compare: Tensor) -> Any:
    logits = torch.zeros(*compare.shape, 5)
    probe = Probe(torch.zeros_like(compare, dtype=torch.int64), logits, compare, torch.zeros(0, 0, dtype=torch.int64), [], frozenset())
    return _logits_check("body logits", Executor(logits, error), probe)  # type: ignore[arg-type]


@pytest.mark.parametrize(("off", "passed"), [(9e-5, True), (1.1e-4, False)])
def test_worst_clear_position_is_judged(off: float, passed: bool) -> None:
    compare, error = torch.ones(4, 8, dtype=torch.bool), torch.zeros(4, 8)
    compare[0, 0] = False
    error[0, 0], error[2, 3] = 1.0, off
    check = judged(error, compare)
    assert check.passed is passed and check.value == pytest.approx(off)


def test_median_is_judged_where_hardly_any_position_is_clear() -> None:
    compare, error = torch.zeros(4, 8, dtype=torch.bool), torch.full((4, 8), 1e-6)
    error[0] = 1.0  # a quarter of the positions really crossed
    found = judged(error, compare)
    assert found.passed and "median" in found.note
    assert not judged(torch.full((4, 8), 2e-4), compare).passed

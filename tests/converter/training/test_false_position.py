"""The shift of all logits that sets a trained plan's density: near enough, in few passes through the model."""

from __future__ import annotations

import math

import pytest

from sparsegate.converter.arch.site import Site
from sparsegate.converter.training.false_position import at_zero


@pytest.mark.parametrize("wished", [0.7, 0.3, 0.05])
@pytest.mark.parametrize("centre", [0.0, 0.4, -30.0])
def test_densities_are_set_in_few_passes(wished: float, centre: float) -> None:
    """Logits of a normal distribution around `centre`; bisection over eight logits to either side takes a
    dozen passes.
    """
    tried: list[float] = []

    def excess_at(shift: float) -> tuple[float, dict[Site, float]]:
        tried.append(shift)
        density = 0.5 * math.erfc((shift - centre) / 1.5 / 2**0.5)
        return density - wished, {Site(0): density}

    assert at_zero(excess_at)[Site(0)] == pytest.approx(wished, abs=0.002)
    assert len(tried) <= (9 if abs(centre) < 1 else 18)


def test_density_that_jumps_is_set_as_near_as_trials_allow() -> None:
    def excess_at(shift: float) -> tuple[float, dict[Site, float]]:
        density = 1.0 if shift < 0.3 else 0.2
        return density - 0.5, {Site(0): density}

    assert at_zero(excess_at)[Site(0)] in (1.0, 0.2)

"""The zero of a falling function whose every value costs passes through a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_TRIALS = 24
_REACH, _REACH_MOST = 0.5, 4096.0  # to one side: at first, at most
_TOLERANCE = 0.002  # of the function
Value = TypeVar("Value")


def at_zero(excess_at: Callable[[float], tuple[float, Value]]) -> Value:
    """The second value at the point where the first, which falls with it, is zero within the tolerance, or nearest to
    that after the last trial. It is the Illinois method (false position, Dahlquist and Bjorck 1974) from 0, with a
    bisection every third time.
    """
    here, (excess, value) = 0.0, excess_at(0.0)
    ends = {excess > 0: (here, excess)}
    reach = _REACH if excess > 0 else -_REACH
    while abs(excess) >= _TOLERANCE and len(ends) < 2 and abs(reach) <= _REACH_MOST:
        here = reach
        excess, value = excess_at(here)
        ends[excess > 0] = (here, excess)
        reach *= 4
    for trial in range(_TRIALS if len(ends) == 2 else 0):
        if abs(excess) < _TOLERANCE:
            break
        (low, above), (high, below) = ends[True], ends[False]
        here = (low + high) / 2 if trial % 3 == 2 else low + (high - low) * above / (above - below)
        positive = excess > 0
        excess, value = excess_at(here)
        if (excess > 0) == positive:  # the end that stays counts half, so that it moves too
            other = ends[not positive]
            ends[not positive] = (other[0], other[1] / 2)
        ends[excess > 0] = (here, excess)
    return value

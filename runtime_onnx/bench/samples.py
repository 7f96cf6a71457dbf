"""The rules of every measurement: what is compared runs back to back, who goes first alternates, and a sample that
waited for a CPU does not count.

Where the kernel tells how long threads waited for a CPU (/proc/self/task/*/schedstat), a sample in which they waited
more than 5 % of the wall time, summed over threads, is disturbed; a pair counts when neither half is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

MAX_WAIT = 0.05
MIN_PAIRS = 15
"""Clean pairs that a quoted median of an op must have."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Round(Generic[Value]):
    """What one round of runs gave by role, and the share of each run's wall time that threads waited for a CPU (0 where
    that is unknown).
    """

    values: dict[str, Value]
    waits: dict[str, float]

    def quiet(self, *roles: str) -> bool:
        """Whether none of the roles waited."""
        return all(self.waits[role] <= MAX_WAIT for role in roles)


@dataclass
class Pairs:
    """Seconds of the clean pairs, and how many were dropped."""

    baseline: list[float] = field(default_factory=list)
    candidate: list[float] = field(default_factory=list)
    dropped: int = 0


def waited() -> float | None:
    """Seconds that this process's threads have waited for a CPU so far, in all; None where the kernel does not tell."""
    seconds = waits()
    return sum(seconds.values()) if seconds else None


def waits() -> dict[str, float]:
    """Seconds that each of this process's threads has waited for a CPU so far; empty where the kernel does not tell."""
    seconds = {}
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            seconds[file.parent.name] = int(file.read_text().split()[1]) * 1e-9  # run ns, wait ns, timeslices
        except (OSError, ValueError, IndexError):
            continue  # the thread has just ended
    return seconds


def order(roles: Sequence[str], number: int) -> list[str]:
    """The roles in the order of round `number`: every one goes first and last equally often."""
    shift = number // 2 % len(roles)
    turned = [*roles[shift:], *roles[:shift]]
    return turned[::-1] if number % 2 else turned


def rounds(
    runs: Mapping[str, Callable[[], Value]], count: int, warm: int = 1, progress: Callable[[int], None] | None = None
) -> list[Round[Value]]:
    """`count` rounds in which every run goes once, after `warm` that are thrown away; `progress` is told the number of
    finished ones.
    """
    finished: list[Round[Value]] = []
    for number in range(-warm, count):
        values: dict[str, Value] = {}
        waits: dict[str, float] = {}
        for role in order(list(runs), number):
            start, before = time.perf_counter(), waited()
            values[role] = runs[role]()
            after, wall = waited(), time.perf_counter() - start
            waits[role] = 0.0 if before is None or after is None else (after - before) / wall
        if number >= 0:
            finished.append(Round(values, waits))
            if progress:
                progress(number + 1)
    return finished


def pairs(
    baseline: Callable[[int], Any],
    candidate: Callable[[int], Any],
    wanted: int,
    patience: float,
    before: Callable[[], Any],
    warm: int = 2,
) -> Pairs:
    """Clean pairs of single calls, `wanted` of them or as many as come together within `patience` seconds.

    Both halves of pair i get the number i; `before` runs untimed ahead of every call, to make the caches cold.
    """
    clean_pairs = Pairs()
    deadline = time.monotonic() + patience
    number = -warm
    while len(clean_pairs.baseline) < wanted and time.monotonic() < deadline:
        runs = {"baseline": baseline, "candidate": candidate}
        timed = {role: _timed(runs[role], number + warm, before) for role in order(list(runs), number)}
        if number >= 0:
            if all(clean for _, clean in timed.values()):
                clean_pairs.baseline.append(timed["baseline"][0])
                clean_pairs.candidate.append(timed["candidate"][0])
            else:
                clean_pairs.dropped += 1
        number += 1
    return clean_pairs


def calls(
    run: Callable[[int], Any], wanted: int, patience: float, before: Callable[[], Any], warm: int = 2
) -> list[float]:
    """Seconds of clean single calls, `wanted` of them or as many as come together within `patience` seconds."""
    clean_seconds: list[float] = []
    deadline = time.monotonic() + patience
    for number in range(warm):
        run(number)
    while len(clean_seconds) < wanted and time.monotonic() < deadline:
        seconds, clean = _timed(run, len(clean_seconds), before)
        if clean:
            clean_seconds.append(seconds)
    return clean_seconds


def bursts(run: Callable[[int], Any], wanted: int, patience: float, length: int = 16) -> list[float]:
    """Seconds of at least `wanted` single calls, or as many as come together within `patience` seconds, in bursts of
    `length` right behind one another.

    Nothing runs between the calls of a burst, so workers stay awake and caches warm. A burst whose threads waited for a
    CPU is thrown away, and so is every burst's first call.
    """
    clean_seconds: list[float] = []
    deadline = time.monotonic() + patience
    number = 0
    while len(clean_seconds) < wanted and time.monotonic() < deadline:
        before, seconds = waited(), []
        for _ in range(length):
            start = time.perf_counter()
            run(number)
            seconds.append(time.perf_counter() - start)
            number += 1
        after = waited()
        if before is None or after is None or after - before <= MAX_WAIT * sum(seconds):
            clean_seconds += seconds[1:]
    return clean_seconds


def _timed(run: Callable[[int], Any], number: int, before: Callable[[], Any]) -> tuple[float, bool]:
    before()
    old, start = waited(), time.perf_counter()
    run(number)
    seconds, new = time.perf_counter() - start, waited()
    return seconds, old is None or new is None or new - old <= MAX_WAIT * seconds


def quartiles(values: Sequence[float]) -> list[float]:
    """First and third quartile; a single value is both."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def compare(baseline: Sequence[float], candidate: Sequence[float]) -> dict[str, Any]:
    """How many times as fast the candidate is, from seconds in pairs: median ratio, quartiles, range, number of pairs,
    and a verdict.
    """
    ratios = [a / b for a, b in zip(baseline, candidate, strict=True)]
    median = statistics.median(ratios)
    return {
        "ratio": median,
        "quartiles": quartiles(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "pairs": len(ratios),
        "verdict": verdict(median),
    }


def verdict(ratio: float) -> str:
    """What a ratio of speeds may be called."""
    return "faster" if ratio > 1 else "not faster"

"""How long the stages of a job took, how far the running one is and what is left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

_PRIOR = 0.1  # of the whole job's expected time: how much weight expectations keep beside what has happened
_MOST = 0.95  # of a stage that does not say how far it is: never through before it ends
_TELLING = 0.1  # of a stage: what must be through before its own pace says how long the rest takes


@dataclass
class Loop:
    """A loop of a stage: passes done and in all (None: not known); `counted` where it counts itself."""

    total: float | None
    unit: str
    done: float = 0.0
    note: str = ""
    counted: bool = False


@dataclass
class RunningStage:
    """A stage, its loops from the outermost inwards, its seconds without those of stages apart, the share of it that is
    through and the share that was when it began, and whether it was found finished.
    """

    name: str
    before: float = 0.0
    since: float = 0.0
    loops: list[Loop] = field(default_factory=list)
    share: float | None = None
    first: float = 0.0
    resumed: bool = False

    def elapsed(self) -> float:
        """Seconds until now."""
        return self.before + (time.monotonic() - self.since if self.since else 0.0)

    def pause(self) -> None:
        """Stop the clock."""
        self.before, self.since = self.elapsed(), 0.0

    def resume(self) -> None:
        """Start the clock."""
        self.since = time.monotonic()

    def moved(self) -> None:
        """Work out the share that is through: of an inner loop as a part of a pass of the loop around it."""
        inner = 0.0
        for loop in reversed(self.loops):
            if not loop.total:
                return
            inner = min(1.0, (loop.done + inner) / loop.total)
        if self.loops:
            self.first = inner if self.share is None and any(loop.counted for loop in self.loops) else self.first
            self.share = inner

    def left(self) -> float | None:
        """Seconds that the rest takes at the pace so far, None as long as too little is through."""
        if self.share is None or self.share - self.first < _TELLING * (1 - self.first):
            return None
        return self.elapsed() * (1 - self.share) / (self.share - self.first) if self.share < 1 else 0.0

    def counts(self) -> str:
        """The outermost loop in words, and the notes."""
        parts = []
        if self.loops:
            loop = self.loops[0]
            parts.append(f"{loop.done:.0f}{f'/{loop.total:.0f}' if loop.total else ''} {loop.unit}".rstrip())
        return ", ".join([*parts, *(loop.note for loop in self.loops if loop.note)])


class Job:
    """Seconds by stage, as they happened and as they were expected. A stage that was found finished has 0; `resumed`
    are these, `partly` those that found a part of their work done.
    """

    def __init__(self, expected: Mapping[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.resumed: set[str] = set()
        self.partly: set[str] = set()
        self.expected: dict[str, float] = dict(expected or {})

    def expect(self, expected: Mapping[str, float]) -> None:
        """Set the expected seconds by stage, when they are known after the job has begun."""
        self.expected = dict(expected)

    def add(self, ended: RunningStage) -> None:
        """Count a stage, or a part of one."""
        if ended.resumed:
            if ended.name not in self.seconds:
                self.seconds[ended.name] = 0.0
                self.resumed.add(ended.name)
            elif ended.name not in self.resumed:
                self.partly.add(ended.name)
        else:
            self.seconds[ended.name] = self.seconds.get(ended.name, 0.0) + ended.before
            if ended.name in self.resumed:
                self.resumed.discard(ended.name)
                self.partly.add(ended.name)

    def rows(self) -> list[tuple[str, float | None, float]]:
        """Name, expected seconds (None: none were, or work was found done, which they count) and seconds of every
        finished stage, in order.
        """
        done_before = self.resumed | self.partly
        return [
            (name, None if name in done_before else self.expected.get(name), seconds)
            for name, seconds in self.seconds.items()
        ]

    def outlook(self, stages: list[RunningStage]) -> tuple[float, float] | None:
        """The share of the whole job that is through and the seconds left, at the pace so far; None without
        expectations. `stages` are those that run.
        """
        whole, running = sum(self.expected.values()), {stage.name: stage for stage in stages}
        if not whole:
            return None
        ended = [name for name in self.expected if name in self.seconds and name not in running]
        told = {name: self.expected[name] for name in ended if name not in self.resumed | self.partly}
        spent = sum(self.seconds[name] for name in told)
        pace = (spent + _PRIOR * whole) / (sum(told.values()) + _PRIOR * whole)
        through, left = sum(self.expected[name] for name in ended), 0.0
        for name, expected in self.expected.items():
            if name in ended:
                continue
            share, rest = 0.0, expected * pace
            if name in running:
                share, rest = _rest(running[name], self.seconds.get(name, 0.0), rest)
            through, left = through + share * expected, left + rest
        return through / whole, left


def _rest(stage: RunningStage, earlier: float, expected: float) -> tuple[float, float]:
    """The share of a running stage that is through and the seconds it will still take; `earlier` are the seconds of its
    finished parts.
    """
    if stage.share is not None and not earlier:
        left = stage.left()
        return stage.share, expected * (1 - stage.share) if left is None else left
    share = min(_MOST, (earlier + stage.elapsed()) / expected) if expected else _MOST
    return share, expected * (1 - share)


def clock(seconds: float) -> str:
    """Seconds in words: 12 s, 3 min, 2 h 5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"

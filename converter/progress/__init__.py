"""What a person sees of long work, on stderr: stages with their seconds, the progress of the one that runs, and the
share and time left of the whole job.

On a terminal the running stage is one live line and a finished one leaves a line. Elsewhere there is a line for every
finished stage, and one at most every minute, the rarer the longer it takes, for one that runs.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .libraries import silenced

Item = TypeVar("Item")
Level = Literal["quiet", "normal", "verbose"]
EVERY = 60.0
"""Seconds between two lines on a running stage, at least, where stderr is no terminal."""
_RARER = 0.25  # of a stage's time: between two lines on it, so that an hour is 16 lines and ten hours are 26
_TICK = 1.0  # seconds between two drawings of a live line without news
_RELAY = 0.5  # seconds between two reports of a process to the one that started it
_PRIOR = 0.1  # of the whole job's expected time: how much weight expectations keep beside what has happened
_MOST = 0.95  # of a stage that does not say how far it is: never through before it ends
_TELLING = 0.1  # of a stage: what must be through before its own pace says how long the rest takes
_DRAWN = 0.1  # seconds between two drawings of a live line
_NAME, _BAR = 24, 20  # columns


@dataclass
class _Loop:
    """A loop of a stage: passes done and in all (None: not known); `counted` where it counts itself."""

    total: float | None
    unit: str
    done: float = 0.0
    note: str = ""
    counted: bool = False


@dataclass
class _Stage:
    """A stage, its loops from the outermost inwards, its seconds without those of stages apart, the share of it that is
    through and the share that was when it began, and whether it was found finished.
    """

    name: str
    before: float = 0.0
    since: float = 0.0
    loops: list[_Loop] = field(default_factory=list)
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

    def add(self, ended: _Stage) -> None:
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
        found = self.resumed | self.partly
        return [
            (name, None if name in found else self.expected.get(name), seconds)
            for name, seconds in self.seconds.items()
        ]

    def outlook(self, stages: list[_Stage]) -> tuple[float, float] | None:
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


def _rest(stage: _Stage, earlier: float, expected: float) -> tuple[float, float]:
    """The share of a running stage that is through and the seconds it will still take; `earlier` are the seconds of its
    finished parts.
    """
    if stage.share is not None and not earlier:
        left = stage.left()
        return stage.share, expected * (1 - stage.share) if left is None else left
    share = min(_MOST, (earlier + stage.elapsed()) / expected) if expected else _MOST
    return share, expected * (1 - share)


class _Nothing:
    """Says nothing."""

    def begin(self, stage: _Stage) -> None:
        pass

    def moved(self, stage: _Stage) -> None:
        pass

    def tick(self, stage: _Stage) -> None:
        pass

    def end(self, stage: _Stage, line: str | None) -> None:
        pass


class _File(_Nothing):
    """Lines that follow one another."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.last = stream, time.monotonic()

    def begin(self, stage: _Stage) -> None:
        self.last = time.monotonic()

    def tick(self, stage: _Stage) -> None:
        if time.monotonic() - self.last >= max(EVERY, _RARER * stage.elapsed()):
            self.last = time.monotonic()
            share = "" if stage.share is None else f"{stage.share:.0%}"
            self._say(
                _line(
                    stage.name,
                    "; ".join(filter(None, (share, stage.counts(), f"{_time(stage.elapsed())} so far", _left(stage)))),
                )
            )

    def end(self, stage: _Stage, line: str | None) -> None:
        if line is not None:
            self._say(line)

    def _say(self, line: str) -> None:
        self.stream.write(f"{line}\n")
        self.stream.flush()


class _Terminal(_Nothing):
    """One line that is drawn again, by tqdm, and a line for every finished stage."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.bar: Any = None
        self.drawn = time.monotonic()

    def begin(self, stage: _Stage) -> None:
        self._clear()
        self.bar = tqdm(
            total=1.0, bar_format=self._form(stage), file=self.stream, leave=False, dynamic_ncols=True, mininterval=0
        )

    def moved(self, stage: _Stage) -> None:
        if time.monotonic() - self.drawn > _DRAWN:
            self.tick(stage)

    def tick(self, stage: _Stage) -> None:
        if self.bar is not None:
            self.drawn, self.bar.n, self.bar.bar_format = time.monotonic(), stage.share or 0.0, self._form(stage)
            self.bar.refresh()

    def end(self, stage: _Stage, line: str | None) -> None:
        self._clear()
        if line is not None:
            self.stream.write(f"{line}\n")
            self.stream.flush()

    def _form(self, stage: _Stage) -> str:
        share = _time(stage.elapsed()) if stage.share is None else f"{stage.share:.0%}"
        text = "; ".join(filter(None, (share, stage.counts(), _left(stage))))
        return f"{_braced(stage.name):<{_NAME}} {{bar:{_BAR}}} {_braced(text)}"

    def _clear(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class _Relay(_Nothing):
    """A file from which the process that started this one reads how far the work is."""

    def __init__(self, path: Path) -> None:
        self.path, self.last = path, 0.0

    def moved(self, stage: _Stage) -> None:
        if time.monotonic() - self.last >= _RELAY and stage.loops:
            self.last, loop = time.monotonic(), stage.loops[0]
            partial = self.path.with_name(f"{self.path.name}.partial")
            partial.write_text(
                json.dumps({"done": loop.done, "total": loop.total, "unit": loop.unit, "note": loop.note}),
                encoding="utf-8",
            )
            partial.replace(self.path)


@dataclass
class _Work:
    """What runs in this process: the job, its stages (the last one runs, those before it wait), and where
    it is shown.
    """

    level: Level = "normal"
    stream: TextIO | None = None
    job: Job | None = None
    stages: list[_Stage] = field(default_factory=list)
    display: _Nothing = field(default_factory=_Nothing)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def shown_on(self) -> _Nothing:
        """A display for where stderr goes; none for the second and later of several processes."""
        stream = self.stream or sys.stderr
        if self.level == "quiet" or stream is None or os.environ.get("RANK", "0") not in ("", "0"):
            return _Nothing()
        return _Terminal(stream) if stream.isatty() else _File(stream)


_work = _Work()


@contextmanager
def shown(level: Level = "normal", stream: TextIO | None = None) -> Iterator[None]:
    """How much jobs inside the block show: no stages (quiet), or with `verbose` what libraries say too; on `stream`,
    stderr when there is none.
    """
    before = _work.level, _work.stream
    _work.level, _work.stream = level, stream
    try:
        yield
    finally:
        _work.level, _work.stream = before


@contextmanager
def job(expected: Mapping[str, float] | None = None) -> Iterator[Job]:
    """A job of several stages, with the expected seconds by stage where they are known; a job inside another one is a
    part of it.

    Libraries are silent inside, unless `shown` says verbose.
    """
    if _work.job is not None:
        yield _work.job
        return
    here = _work.shown_on()
    with silenced(bars=isinstance(here, _Terminal)) if _work.level != "verbose" else ExitStack():
        _work.job = Job(expected)
        try:
            yield _work.job
        finally:
            _work.job = None


@contextmanager
def stage(name: str, apart: bool = False) -> Iterator[None]:
    """A named stretch of work. Inside another one it is a part of that one, unless it stands `apart`: then the other
    one's clock waits.
    """
    if _work.stages and not apart:
        yield
        return
    with _work.lock:
        outer = _work.stages[-1] if _work.stages else None
        if outer is not None:
            outer.pause()
            _work.display.end(outer, None)
    begun = _Stage(name)
    with ExitStack() as stack:
        if outer is None:
            _work.display = _work.shown_on()
            stack.enter_context(_ticking())
            if isinstance(_work.display, _Terminal):
                stack.enter_context(logging_redirect_tqdm())
        _begin(begun)
        ended = False
        try:
            yield
            ended = True
        finally:
            _end(begun, ended)


def _begin(begun: _Stage) -> None:
    with _work.lock:
        begun.resume()
        _work.stages.append(begun)
        _work.display.begin(begun)


def _end(begun: _Stage, ended: bool) -> None:
    with _work.lock:
        begun.pause()
        _work.stages.remove(begun)
        _work.display.end(
            begun, _line(begun.name, "resumed" if begun.resumed else f"{begun.before:.1f} s") if ended else None
        )
        if _work.job is not None:
            _work.job.add(begun)
        if _work.stages:
            _work.stages[-1].resume()
            _work.display.begin(_work.stages[-1])
        else:
            _work.display = _Nothing()


def resumed(name: str | None = None) -> None:
    """Say that a stage was found finished and took no time in this job: the running one, or one by its name, unless
    that has done something before.
    """
    with _work.lock:
        if name is None:
            if _work.stages:
                _work.stages[-1].resumed = True
            return
        if _work.job is None or name in _work.job.seconds:
            return
        _work.job.add(_Stage(name, resumed=True))
        running, line = _work.stages[-1] if _work.stages else None, _line(name, "resumed")
        if running is None:
            _work.shown_on().end(_Stage(name), line)
        else:
            _work.display.end(running, line)
            _work.display.begin(running)


def partly() -> None:
    """Say that the running stage found a part of its work done."""
    with _work.lock:
        if _work.stages and _work.job is not None:
            _work.job.partly.add(_work.stages[-1].name)


def track(iterable: Iterable[Item], total: int | None = None, unit: str = "step") -> Iterator[Item]:
    """The items one by one, counted as passes of a loop of the running stage; `total` is their number, where it can't
    be asked of `iterable`.

    Of loops inside one another the outermost is shown, and the others as parts of its passes. Outside of a stage
    nothing is shown.
    """
    if not _work.stages:
        yield from iterable
        return
    running, loop = (
        _work.stages[-1],
        _Loop(total if total is not None else getattr(iterable, "__len__", lambda: None)(), unit),
    )
    running.loops.append(loop)
    try:
        for item in iterable:
            yield item
            loop.done += 1
            _moved(running)
    finally:
        with _work.lock:
            running.loops = [other for other in running.loops if other is not loop]


def update(done: float, total: float | None = None, note: str = "", unit: str = "step") -> None:
    """Say how far a loop of the running stage is that counts itself: `done` of `total`, and a note such as "loss .12"
    (the last one, where it is empty).

    The loop is over when `done` reaches `total`. Outside of a stage nothing is shown.
    """
    if not _work.stages:
        return
    running = _work.stages[-1]
    with _work.lock:
        loop = next((loop for loop in running.loops if loop.counted), None)
        if loop is None:
            loop = _Loop(total, unit, counted=True)
            running.loops.append(loop)
        loop.done, loop.total, loop.note = done, total, note or loop.note
    _moved(running)
    if total is not None and done >= total:
        with _work.lock:
            running.loops = [other for other in running.loops if other is not loop]


def _moved(running: _Stage) -> None:
    with _work.lock:
        running.moved()
        if _work.stages and _work.stages[-1] is running:
            _work.display.moved(running)


@contextmanager
def _ticking() -> Iterator[None]:
    """A thread that draws the running stage again when nothing is new: its time goes on."""
    if type(_work.display) is _Nothing:
        yield
        return
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(_TICK):
            with _work.lock:
                if _work.stages and not stop.is_set():
                    _work.display.tick(_work.stages[-1])

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def relayed(path: Path | None) -> Iterator[None]:
    """In a process that another one started: loops are written to `path`, where there is one, for the other one to
    `follow`, and nothing is shown.
    """
    with silenced(), shown("quiet"), stage(""):
        if path is not None:
            _work.display = _Relay(path)
        yield


def follow(path: Path) -> None:
    """Show how far the work is that another process reports in `path`, where it has."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return
    update(found["done"], found["total"], found["note"], found["unit"])


def _line(name: str, text: str) -> str:
    return f"{name:<{_NAME}} {text}"


def _braced(text: str) -> str:
    """Text as it stands in a format."""
    return text.replace("{", "{{").replace("}", "}}")


def _left(running: _Stage) -> str:
    """The whole job's share and time left where they are known, else the running stage's time left."""
    outlook = _work.job.outlook(_work.stages) if _work.job is not None else None
    if outlook is not None:
        return f"job {outlook[0]:.0%}, {_time(outlook[1])} left"
    left = running.left()
    return "" if left is None else f"{_time(left)} left"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"

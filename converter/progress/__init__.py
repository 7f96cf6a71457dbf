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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TextIO, TypeVar

from tqdm.contrib.logging import logging_redirect_tqdm

from .display import Display, LineDisplay, LiveDisplay, RelayDisplay, stage_line
from .libraries import silenced
from .timing import Job, Loop, RunningStage, clock

Item = TypeVar("Item")
Level = Literal["quiet", "normal", "verbose"]
_TICK = 1.0  # seconds between two drawings of a live line without news


@dataclass
class _Work:
    """What runs in this process: the job, its stages (the last one runs, those before it wait), and where
    it is shown.
    """

    level: Level = "normal"
    stream: TextIO | None = None
    job: Job | None = None
    stages: list[RunningStage] = field(default_factory=list)
    display: Display = field(default_factory=Display)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def shown_on(self) -> Display:
        """A display for where stderr goes; none for the second and later of several processes."""
        stream = self.stream or sys.stderr
        if self.level == "quiet" or stream is None or os.environ.get("RANK", "0") not in ("", "0"):
            return Display()
        return (LiveDisplay if stream.isatty() else LineDisplay)(stream, _left)


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
    with silenced(bars=isinstance(here, LiveDisplay)) if _work.level != "verbose" else ExitStack():
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
    begun = RunningStage(name)
    with ExitStack() as stack:
        if outer is None:
            _work.display = _work.shown_on()
            stack.enter_context(_ticking())
            if isinstance(_work.display, LiveDisplay):
                stack.enter_context(logging_redirect_tqdm())
        _begin(begun)
        ended = False
        try:
            yield
            ended = True
        finally:
            _end(begun, ended)


def _begin(begun: RunningStage) -> None:
    with _work.lock:
        begun.resume()
        _work.stages.append(begun)
        _work.display.begin(begun)


def _end(begun: RunningStage, ended: bool) -> None:
    with _work.lock:
        begun.pause()
        _work.stages.remove(begun)
        _work.display.end(
            begun, stage_line(begun.name, "resumed" if begun.resumed else f"{begun.before:.1f} s") if ended else None
        )
        if _work.job is not None:
            _work.job.add(begun)
        if _work.stages:
            _work.stages[-1].resume()
            _work.display.begin(_work.stages[-1])
        else:
            _work.display = Display()


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
        _work.job.add(RunningStage(name, resumed=True))
        running, line = _work.stages[-1] if _work.stages else None, stage_line(name, "resumed")
        if running is None:
            _work.shown_on().end(RunningStage(name), line)
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
        Loop(total if total is not None else getattr(iterable, "__len__", lambda: None)(), unit),
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
            loop = Loop(total, unit, counted=True)
            running.loops.append(loop)
        loop.done, loop.total, loop.note = done, total, note or loop.note
    _moved(running)
    if total is not None and done >= total:
        with _work.lock:
            running.loops = [other for other in running.loops if other is not loop]


def _moved(running: RunningStage) -> None:
    with _work.lock:
        running.moved()
        if _work.stages and _work.stages[-1] is running:
            _work.display.moved(running)


@contextmanager
def _ticking() -> Iterator[None]:
    """A thread that draws the running stage again when nothing is new: its time goes on."""
    if type(_work.display) is Display:
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
            _work.display = RelayDisplay(path)
        yield


def follow(path: Path) -> None:
    """Show how far the work is that another process reports in `path`, where it has."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return
    update(state["done"], state["total"], state["note"], state["unit"])


def _left(running: RunningStage) -> str:
    """The whole job's share and time left where they are known, else the running stage's time left."""
    outlook = _work.job.outlook(_work.stages) if _work.job is not None else None
    if outlook is not None:
        return f"job {outlook[0]:.0%}, {clock(outlook[1])} left"
    left = running.left()
    return "" if left is None else f"{clock(left)} left"

"""Where the running stage is shown: lines in a log, a live line on a terminal, a file for another process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from .timing import RunningStage, clock

EVERY = 60.0
"""Seconds between two lines on a running stage, at least, where stderr is no terminal."""
_RARER = 0.25  # of a stage's time: between two lines on it, so that an hour is 16 lines and ten hours are 26
_RELAY = 0.5  # seconds between two reports of a process to the one that started it
_DRAWN = 0.1  # seconds between two drawings of a live line
_NAME, _BAR = 24, 20  # columns


def stage_line(name: str, text: str) -> str:
    """A line on a stage: its name as a column, then the text."""
    return f"{name:<{_NAME}} {text}"


def _braced(text: str) -> str:
    """Text as it stands in a format."""
    return text.replace("{", "{{").replace("}", "}}")


class Display:
    """Says nothing."""

    def begin(self, stage: RunningStage) -> None:
        """A stage begins, or goes on."""

    def moved(self, stage: RunningStage) -> None:
        """A loop of the stage has moved on."""

    def tick(self, stage: RunningStage) -> None:
        """Time has passed."""

    def end(self, stage: RunningStage, line: str | None) -> None:
        """The stage ends, or waits; `line` is what stays of it."""


class LineDisplay(Display):
    """Lines that follow one another; `left` says in words what time is left."""

    def __init__(self, stream: TextIO, left: Callable[[RunningStage], str]) -> None:
        self.stream, self.left, self.last = stream, left, time.monotonic()

    def begin(self, stage: RunningStage) -> None:
        """Nothing yet."""
        self.last = time.monotonic()

    def tick(self, stage: RunningStage) -> None:
        """A line, where the last one is long ago."""
        if time.monotonic() - self.last >= max(EVERY, _RARER * stage.elapsed()):
            self.last = time.monotonic()
            share = "" if stage.share is None else f"{stage.share:.0%}"
            words = filter(None, (share, stage.counts(), f"{clock(stage.elapsed())} so far", self.left(stage)))
            self._say(stage_line(stage.name, "; ".join(words)))

    def end(self, stage: RunningStage, line: str | None) -> None:
        """The line."""
        if line is not None:
            self._say(line)

    def _say(self, line: str) -> None:
        self.stream.write(f"{line}\n")
        self.stream.flush()


class LiveDisplay(Display):
    """One line that is drawn again, by tqdm, and a line for every finished stage; `left` as above."""

    def __init__(self, stream: TextIO, left: Callable[[RunningStage], str]) -> None:
        self.stream, self.left = stream, left
        self.bar: Any = None
        self.drawn = time.monotonic()

    def begin(self, stage: RunningStage) -> None:
        """Draw the line."""
        self._clear()
        self.bar = tqdm(
            total=1.0, bar_format=self._form(stage), file=self.stream, leave=False, dynamic_ncols=True, mininterval=0
        )

    def moved(self, stage: RunningStage) -> None:
        """Draw it again, not too often."""
        if time.monotonic() - self.drawn > _DRAWN:
            self.tick(stage)

    def tick(self, stage: RunningStage) -> None:
        """Draw it again."""
        if self.bar is not None:
            self.drawn, self.bar.n, self.bar.bar_format = time.monotonic(), stage.share or 0.0, self._form(stage)
            self.bar.refresh()

    def end(self, stage: RunningStage, line: str | None) -> None:
        """Leave `line` in its place."""
        self._clear()
        if line is not None:
            self.stream.write(f"{line}\n")
            self.stream.flush()

    def _form(self, stage: RunningStage) -> str:
        share = clock(stage.elapsed()) if stage.share is None else f"{stage.share:.0%}"
        text = "; ".join(filter(None, (share, stage.counts(), self.left(stage))))
        return f"{_braced(stage.name):<{_NAME}} {{bar:{_BAR}}} {_braced(text)}"

    def _clear(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class RelayDisplay(Display):
    """A file from which the process that started this one reads how far the work is."""

    def __init__(self, path: Path) -> None:
        self.path, self.last = path, 0.0

    def moved(self, stage: RunningStage) -> None:
        """Write how far the outermost loop is, not too often."""
        if time.monotonic() - self.last >= _RELAY and stage.loops:
            self.last, loop = time.monotonic(), stage.loops[0]
            partial = self.path.with_name(f"{self.path.name}.partial")
            partial.write_text(
                json.dumps({"done": loop.done, "total": loop.total, "unit": loop.unit, "note": loop.note}),
                encoding="utf-8",
            )
            partial.replace(self.path)

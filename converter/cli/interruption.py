"""How a signal ends the command line: what runs is left in order, one line says what happened, and the status is 128
and the signal's number.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

ENDS = {"SIGINT": "Interrupted", "SIGTERM": "Terminated", "SIGHUP": "Hung up"}
"""Signals that end the command line, and what the line begins with."""
GO_ON = "Run the same command again to go on from the finished stages."
_AGAIN = 1.0  # seconds from which a second signal is meant as one: terminals and `timeout` send the same one twice


class Stop:
    """The signal that came, if one did."""

    def __init__(self) -> None:
        self.number: int = signal.SIGINT
        self.since: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler: the first signal leaves everything in order, a later one does not wait for that."""
        if self.since is None:
            self.number, self.since = number, time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self.since > _AGAIN:
            self.number = number
            self.tell()
            os._exit(self.status)

    @property
    def status(self) -> int:
        """The exit status."""
        return 128 + self.number

    def tell(self) -> None:
        """The line, as far as there is still somebody to read it."""
        with suppress(OSError, ValueError):
            print(f"{ENDS[signal.Signals(self.number).name]}. {GO_ON}", file=sys.stderr, flush=True)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Signals raise KeyboardInterrupt inside the block; those that the caller has ignored (nohup, a shell's background)
    or handles himself stay as they are.
    """
    stop, before = Stop(), dict[int, Any]()
    names = ENDS if threading.current_thread() is threading.main_thread() else ()
    try:
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, stop)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

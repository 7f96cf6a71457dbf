"""Work on a CPU in several processes of this machine: a small model's operations are too short to share out over threads, its windows are not.

The processes are started as programs of their own, wherever the caller's program came from, and join as torchrun's do (`distributed`). What they are to do
and what they make lies in files.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .artifact import InputError
from .distributed import processes, world

_REFUSAL = "refusal."
_PROGRAM = f"import sys; sys.path[:] = filter(None, sys.path); from {__name__} import main; main(*sys.argv[1:])"  # the working folder holds no modules
_FEW_STEPS = 300  # a process takes several seconds to start
_SMALL = 32_000_000  # parameters: larger models' operations fill several threads
_POLL = 0.1  # seconds


def cores() -> int:
    """Logical CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_for(asked: int | str, windows: int, steps: int, parameters: int, available: int) -> int:
    """How many processes to train in on a CPU: `asked`, or for "auto" as many as `available` cores and the `windows` of a micro-batch allow, for small models
    and more than a few steps; else one.
    """
    if isinstance(asked, int):
        return asked
    if steps < _FEW_STEPS or parameters > _SMALL:
        return 1
    return max(count for count in range(1, max(1, available) + 1) if windows % count == 0)


def run_in_processes(count: int, function: Callable[..., None], *arguments: str | Path) -> None:
    """Call `function(*arguments)`, a module's, in `count` new processes on the CPU, each with its share of the cores; arguments come as strings.

    Raises the first process's InputError, and RuntimeError when one ends otherwise; the others are ended then, and all are when the caller is interrupted.
    """
    with tempfile.TemporaryDirectory() as name:
        environment = os.environ | {
            "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": str(max(1, cores() // count)),
        }  # fmt: skip
        command = [sys.executable, "-c", _PROGRAM, name, function.__module__, function.__name__, *map(str, arguments)]
        started: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(count):
                own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, env=own))
            status = _wait(started)
        finally:
            for one in started:
                one.terminate()
            for one in started:
                one.wait()
        refusals = sorted(Path(name).glob(f"{_REFUSAL}*"))
        if refusals:
            raise InputError(refusals[0].read_text(encoding="utf-8"))
        if status:
            raise RuntimeError(f"A training process must end with status 0, got {status}. Its error stands above.")


def _wait(started: list[subprocess.Popen[bytes]]) -> int:
    """0 when all processes have ended well, or the status of one that has not, at once."""
    while True:
        codes = [one.poll() for one in started]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            return failed[0] if failed else 0
        time.sleep(_POLL)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main(folder: str, module: str, name: str, *arguments: str) -> None:
    """One of the processes."""
    try:
        with processes("cpu"):
            getattr(importlib.import_module(module), name)(*arguments)
    except InputError as error:
        (Path(folder) / f"{_REFUSAL}{world().rank:04}").write_text(str(error), encoding="utf-8")
        sys.exit(1)

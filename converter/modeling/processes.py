"""Work on a CPU in several processes of this machine: a small model's operations are too short to share out over
threads, its windows are not.

The processes are started as programs of their own, so that the caller's need no guard, and join as torchrun's do
(`distributed`). What they are to do and what they make lies in files.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ...runtime_onnx.errors import InputError
from ..checkpoint.locks import inherited
from ..checkpoint.stage import disk_full, is_disk_full
from ..progress import follow, relayed
from .distributed import processes, world

_REFUSAL, _PROGRESS = "refusal.", "progress.json"
_PROGRAM = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller ends its processes
sys.path[:] = filter(None, sys.path)  # the working folder holds no modules
from {__name__} import main
main(*sys.argv[1:])
"""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_MALLOC = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=4294967296:glibc.malloc.top_pad=67108864"
"""Freed memory stays with the process: a step's tensors are as many megabytes as the last one's, and asking anew for
their pages took a fifth of its time.
"""
_KEPT = {-3: 1 << 25, -1: (1 << 31) - 1, -2: 1 << 26}
"""The same for this process, by glibc's numbers in malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD."""
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_POLL = 0.1  # seconds


def keep_freed_memory() -> None:
    """From now on glibc keeps what this process frees, up to 32 MiB apiece, for what it allocates next; nothing happens
    with another C library.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "gnu_get_libc_version"):
        for option, value in _KEPT.items():
            libc.mallopt(option, value)


def cores() -> int:
    """Logical CPUs that this process may use: of its affinity, a container's quota and OMP_NUM_THREADS the least."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _QUOTA.read_text(encoding="ascii").split() if _QUOTA.is_file() else []
    if len(quota) == 2 and quota[0].isdigit():
        count = min(count, round(int(quota[0]) / int(quota[1])))
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(count, int(threads)) if threads.isdigit() else count)


def run_in_processes(count: int, function: Callable[..., None], *arguments: str | Path) -> None:
    """Call `function(*arguments)`, a module's, in `count` new processes on the CPU, each with its share of the cores;
    arguments come as strings.

    Raises InputError for the first one's InputError or system error, and RuntimeError when one ends otherwise; the
    others are ended then. None outlives the caller, however that ends.
    """
    with tempfile.TemporaryDirectory() as name:
        environment = {"GLIBC_TUNABLES": _MALLOC} | _own_environment()
        environment |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        environment |= dict.fromkeys(_THREADS, str(max(1, cores() // count))) | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path))
        }
        if sys.platform == "win32":
            environment["USE_LIBUV"] = "0"  # not in every torch for Windows
        command = [sys.executable, "-c", _PROGRAM, name, function.__module__, function.__name__, *map(str, arguments)]
        started: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(count):
                variables = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                started.append(
                    subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=sys.__stderr__, env=variables, pass_fds=inherited()
                    )
                )
            status = _wait(started, Path(name) / _PROGRESS)
        finally:
            for one in started:
                one.terminate()
            for one in started:
                one.communicate()
        refusals = sorted(Path(name).glob(f"{_REFUSAL}*"))
        if refusals:
            raise InputError(refusals[0].read_text(encoding="utf-8"))
        if status:
            if status < 0:
                ended = signal.Signals(-status).name
                raise InputError(
                    f"A process must end by itself, got {ended}, as when memory is short. Run the same command with "
                    "processes: 1 in the recipe."
                )
            raise RuntimeError(f"A process must end with status 0, got {status}. Its error stands above.")


def _own_environment() -> dict[str, str]:
    """The environment without what torchrun adds for its agent, whose store nobody serves here."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}


def _wait(started: list[subprocess.Popen[bytes]], progress: Path) -> int:
    """0 when all processes have ended well, or the status of one that has not, at once; meanwhile what the first one
    says in `progress` is shown.
    """
    while True:
        codes = [one.poll() for one in started]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            return min(failed, default=0)  # a signal before the errors of those who lost their peer
        follow(progress)
        time.sleep(_POLL)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main(folder: str, module: str, name: str, *arguments: str) -> None:
    """One of the processes."""
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    try:
        with processes("cpu"), relayed(None if world().rank else Path(folder) / _PROGRESS):
            getattr(importlib.import_module(module), name)(*arguments)
    except (InputError, OSError) as error:
        said = str(error)
        if isinstance(error, OSError):
            said = (
                str(disk_full(Path.cwd() / "out"))
                if is_disk_full(error)
                else f"The system refused: {error}. Check the path and its permissions."
            )
        partial = Path(folder) / f"partial.{world().rank}"
        partial.write_text(said, encoding="utf-8")
        partial.replace(partial.with_name(f"{_REFUSAL}{world().rank:04}"))
        sys.exit(1)


def _end_with_the_caller() -> None:
    while os.read(0, 1):  # until the caller closes it or is no more
        pass
    os._exit(1)

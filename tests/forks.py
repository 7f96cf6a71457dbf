"""Commands in processes that start at once: forks of one that has imported everything. They can be killed at the n-th
thing that they do to the disk.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

_CHANGES = {
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.truncate",
    "shutil.copyfile",
    "shutil.rmtree",
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Fork:
    """A command that was started: its process and the file of what it says."""

    process: int
    said: Path
    ended: int | None = None

    def wait(self) -> int:
        """Its exit status; minus the number of the signal that ended it."""
        return _server().wait(self)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        os.kill(self.process, number)

    def until(self, text: str) -> None:
        """Wait until it says `text`."""
        end = time.monotonic() + 120
        while text not in self.text:
            assert time.monotonic() < end, self.text
            time.sleep(0.02)

    @property
    def text(self) -> str:
        """What it has said."""
        return self.said.read_text(encoding="utf-8", errors="replace") if self.said.exists() else ""


class _Server:
    def __init__(self) -> None:
        root = Path(__file__).parent
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)]),
        }
        command = [sys.executable, "-c", "import forks; forks.serve()"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ended: dict[int, int] = {}

    def ask(self, **what: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def wait(self, fork: Fork) -> int:
        if fork.ended is None:
            fork.ended = int(self.ask(wait=fork.process))
        return fork.ended


_running: list[_Server] = []


def _server() -> _Server:
    if not _running:
        _running.append(_Server())
    return _running[0]


def start(
    folder: Path,
    *arguments: str | Path,
    call: str = f"{__file__}:command",
    kill_at: int | None = None,
    name: str = "said",
) -> Fork:
    """Start `sparsegate ARGUMENTS`, or the function `call` (FILE:NAME) on them; what it says goes to a file in
    `folder`.

    With `kill_at` it kills itself before its so many-th change of a file or folder below `folder`; the count of all is
    in NAME.count when it ends by itself.
    """
    said = folder / f"{name}.txt"
    process = _server().ask(
        run=call, arguments=[str(word) for word in arguments], said=str(said), kill_at=kill_at, root=str(folder)
    )
    return Fork(process, said)


def changes(fork: Fork) -> int:
    """How many changes a command made below its folder."""
    return int(fork.said.with_suffix(".count").read_text())


def serve() -> None:
    """The process that is forked."""
    import torch

    torch.set_num_threads(1)
    from conftest import RATES

    import sparsegate.converter.cli.convert
    import sparsegate.converter.cli.tune  # noqa: F401
    from sparsegate.converter.pipeline import candidates, time_budget  # noqa: F401
    from sparsegate.converter.pipeline import convert as conversion
    from sparsegate.converter.training import stages as tuning  # noqa: F401

    time_budget.measure = lambda *_, **__: RATES
    candidates._speed = lambda *_: {}
    conversion.measure_references = lambda *_: []
    out = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            answer = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                _child(asked, out)
        os.write(out, f"{answer}\n".encode())


def _child(asked: dict[str, Any], out: int) -> None:
    os.close(out)
    said = os.open(asked["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in (1, 2):
        os.dup2(said, descriptor)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as on a terminal, whatever the caller ignores
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    status = 99
    try:
        count = _count(asked["root"], asked["kill_at"])
        file, _, function = asked["run"].rpartition(":")
        spec = spec_from_file_location("forked", file)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        sys.modules["forked"] = module
        spec.loader.exec_module(module)
        status = getattr(module, function)(*asked["arguments"]) or 0
        number = count[0]
        Path(asked["said"]).with_suffix(".count").write_text(str(number))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _count(root: str, kill_at: int | None) -> list[int]:
    seen = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" and event not in _CHANGES:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
            return
        if not str(arguments[0]).startswith(root):
            return
        seen[0] += 1
        if seen[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def command(*arguments: str) -> int:
    """The command line in this process."""
    from sparsegate.converter.cli import main

    sys.argv = ["sparsegate", *arguments]
    try:
        main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 99

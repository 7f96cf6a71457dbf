"""A lock on a file that ends with its process, however that ends, and the record of who holds it."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime_onnx.untrusted import parse_json

try:
    import fcntl
except ImportError:  # Windows: two conversions to one folder are not told apart there
    fcntl = None  # type: ignore[assignment]

KIND = "sparsegate folder"
_UNABLE = (
    errno.ENOLCK,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EINVAL,
)  # what file systems without locks answer
_GRACE = 5.0  # seconds that processes which a dead holder had started may take to notice its end
_POLL = 0.05  # seconds
_held: list[int] = []


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock: its number, its host and since when."""

    process: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.process} on host {self.host} since {self.since}"

    @property
    def ended(self) -> bool:
        """Whether it is known to be no more: a process that it started holds the lock still."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False


class Held(Exception):  # noqa: N818 - what is so, not what went wrong
    """Another process holds the lock; None where its record cannot be read yet."""

    def __init__(self, holder: Holder | None) -> None:
        super().__init__(str(holder or "another process"))
        self.holder = holder


class NoLocks(Exception):  # noqa: N818
    """The file system has no locks."""


def inherited() -> tuple[int, ...]:
    """File descriptors that a process which writes into this one's folders is to be given, so that the locks last as
    long as it.
    """
    return tuple(_held)


def read_record(path: Path) -> dict[str, Any] | None:
    """What `locked` wrote into a file; an empty dict for a file that it had just made, None for anything else."""
    try:
        if path.is_symlink() or not path.is_file():
            return None
        text = path.read_text(encoding="utf-8")
        record = parse_json(text) if text else {}
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and (not record or record.get("kind") == KIND) else None


@contextmanager
def locked(path: Path, **fields: str) -> Iterator[None]:
    """Hold the lock on `path`, which is made where it is not there and holds the record: this process and `fields`.

    Raises Held when another process has it, NoLocks where there are none (the record is written all the same), and
    FileNotFoundError without the folder.
    """
    descriptor, able = _open(path)
    try:
        record = {
            "kind": KIND,
            "version": 1,
            **fields,
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(record) + "\n").encode(), 0)
        if not able:
            raise NoLocks
        _held.append(descriptor)
        yield
    finally:
        with suppress(ValueError):
            _held.remove(descriptor)
        os.close(descriptor)


@contextmanager
def abandoned(path: Path) -> Iterator[bool]:
    """Whether a record is one of ours whose process is no more; its lock is held meanwhile. Nothing is written."""
    descriptor = -1
    try:
        if read_record(path) is not None:
            with suppress(OSError):
                descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        yield descriptor >= 0 and _mine(descriptor, path)
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _mine(descriptor: int, path: Path) -> bool:
    try:
        return _take(descriptor) and os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:  # held, or removed by another process
        return False


def _open(path: Path) -> tuple[int, bool]:
    """The file, locked, and whether it could be."""
    until = time.monotonic() + _GRACE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            able = _take(descriptor)
            with suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # else its holder has removed it meanwhile
                    return descriptor, able
        except BlockingIOError:
            holder = _holder(path)
            if time.monotonic() > until or (holder is not None and not holder.ended):
                os.close(descriptor)
                raise Held(holder) from None
            time.sleep(_POLL)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in _UNABLE:
            return False
        raise
    return True


def _holder(path: Path) -> Holder | None:
    record = read_record(path) or {}
    try:
        return Holder(int(record["process"]), str(record["host"]), str(record["since"]))
    except (KeyError, TypeError, ValueError):
        return None

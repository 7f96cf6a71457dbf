"""Headers and hashes: what makes every stage a pure function from folders to a folder that can be resumed.

A stage folder holds `header.json` beside its data. The header names its parents by their fingerprints, so a fingerprint
covers the whole history. The file also lists the stage's files with sizes and hashes, which are no part of the
fingerprint: what was damaged since is made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import load_json
from ...runtime_onnx.untrusted import read_json as read_json
from .locks import Held, NoLocks, abandoned, locked, read_record

if TYPE_CHECKING:
    from torch import Tensor

VERSION = "0.1.0"
HEADER = "header.json"
RECORD = ".sparsegate.json"
"""What makes a folder ours: the record that `locks.locked` wrote into it."""
_FILES, _SEAL = "files", "seal"
"""Keys of header.json beside the header's own: the stage's files with sizes and hashes, and the hash of all the rest.
"""
_CHUNK = 1 << 22  # bytes read at a time
_PARTIAL = re.compile(r".*\.partial-[0-9a-f]{8}")
_OLD = ".old"
_FULL = re.compile(
    r"No space left on device|os error 28|File too large|os error 27|Disk quota exceeded|StorageFull|\d+ requested and "
    r"\d+ written"
)
"""What libraries say of a full disk, numpy last."""
_TRIES = 100  # another process may finish the same folder at any moment

log = logging.getLogger("sparsegate")


class CheckError(InputError):
    """What was made does not pass a check: no input was wrong by itself."""


class DiskFull(InputError):
    """No byte more can be written."""


class Header(BaseModel):
    """What a stage was made from; equal headers mean equal content.

    `parents` maps a parent's role to its fingerprint (sha256 hex), `config` is the stage's own recipe part,
    `calibration` the sha256 of the token batches.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: str
    version: int = 1
    tool: str = VERSION
    parents: dict[str, str] = {}
    config: dict[str, Any] = {}
    seed: int = 0
    calibration: str | None = None

    @property
    def fingerprint(self) -> str:
        """Sha256 (hex) of the canonical JSON of this header."""
        return hash_json(self.model_dump(mode="json"))


def hash_json(value: Any) -> str:
    """Sha256 (hex) of `value` as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Sha256 (hex) of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON beside `path` and rename it into place. Raises InputError for NaN and infinity,
    which no reader takes.
    """
    partial = partial_name(path)
    try:
        with open(partial, "x", encoding="utf-8") as file:
            try:
                json.dump(value, file, indent=2, sort_keys=False, allow_nan=False)
            except ValueError as error:
                raise InputError(
                    f"{path.name} must hold finite numbers, got NaN or infinity ({error}). Check the model's weights."
                ) from None
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` as safetensors beside `path` and rename it into place; its mode is the umask's.
    Raises DiskFull.
    """
    from safetensors.torch import save_file

    partial = partial_name(path)
    try:
        save_file(dict(tensors), partial, metadata)
        os.chmod(partial, 0o666 & ~_umask())  # the library gives it to its owner alone
        os.replace(partial, path)
    except Exception as error:
        partial.unlink(missing_ok=True)
        if is_disk_full(error):
            raise disk_full(path) from error
        raise


def partial_name(path: Path) -> Path:
    """A new name beside `path`."""
    return path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")


def _umask() -> int:
    with (
        suppress(OSError, StopIteration, ValueError),
        open("/proc/self/status", encoding="ascii", errors="replace") as status,
    ):
        return int(next(line for line in status if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o077)  # elsewhere it can be read only by changing it, for all threads
    os.umask(mask)
    return mask


@contextmanager
def atomic_folder(target: Path, new: bool = False) -> Iterator[Path]:
    """A new folder that is renamed to `target` when the block ends well and removed when it does not.

    1. It is made inside one beside `target` that carries a locked record of ours. So leftovers of killed runs are known
       from a user's folders and from those of runs that go on. They are removed first.
    2. A folder at `target` is replaced where it is ours: a stage, or something in a work folder. It is never replaced
       with `new`.

    Raises InputError for any other folder there, and DiskFull. Every other error passes through.
    """
    check_replaced(target, new)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target)
        with _shell(target) as shell:
            partial = shell / target.name
            partial.mkdir()
            yield partial
            _sync(partial)
            _put(partial, target, shell / _OLD, new)
    except BaseException as error:
        if is_disk_full(error):
            raise disk_full(target) from error
        raise


def check_replaced(target: Path, new: bool) -> None:
    """Raise InputError where `atomic_folder` would not put a folder at `target`."""
    while True:
        before = _identity(target)
        if before is None:
            return
        if new:
            raise InputError(
                f"{target} must be a new folder, got something that is there already. Choose another name, or remove "
                "it."
            )
        if not target.is_symlink() and (
            read_header(target) is not None or any(read_record(parent / RECORD) for parent in target.absolute().parents)
        ):
            return
        if _identity(target) == before:  # else another process has just put its own there
            raise InputError(
                f"{target} must be new or a folder that sparsegate made, got another one. Choose another name, or move "
                "it away."
            )


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file or folder from another one of the same name; None where there is none."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


@contextmanager
def _shell(target: Path) -> Iterator[Path]:
    """A folder beside `target` with a locked record; it goes at the end."""
    with ExitStack() as stack:
        while True:
            shell = partial_name(target)
            shell.mkdir()
            try:
                stack.enter_context(locked(shell / RECORD))
            except (FileNotFoundError, Held):  # taken for a leftover, in the moment before it had its record
                continue
            except NoLocks:
                pass
            break
        stack.callback(_remove, shell)
        yield shell


def remove_abandoned(target: Path) -> None:
    """Remove what killed runs left of `target`."""
    for shell in list(target.parent.iterdir()):
        if (
            not shell.name.startswith(f"{target.name}.partial-")
            or not _PARTIAL.fullmatch(shell.name)
            or shell.is_symlink()
        ):
            continue
        with abandoned(shell / RECORD) as free:
            if free:
                _remove(shell)
        with suppress(OSError):
            shell.rmdir()  # nothing in it: killed before it had its record


def _remove(shell: Path) -> None:
    """The record last: what is killed meanwhile is still known as a leftover."""
    for path in list(shell.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != RECORD:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        (shell / RECORD).unlink(missing_ok=True)
        shell.rmdir()


def _put(partial: Path, target: Path, old: Path, new: bool) -> None:
    """Rename `partial` to `target`, what is there aside first: a process that is killed while a folder is removed would
    leave a half.
    """
    for _ in range(_TRIES):
        check_replaced(target, new)
        with suppress(FileNotFoundError):
            os.replace(target, old)
        try:
            os.replace(partial, target)
            return
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another process was quicker
                shutil.rmtree(old, ignore_errors=True)
                continue
            if old.exists() and not target.exists():
                os.replace(old, target)
            raise
    raise InputError(
        f"{target} must be written by one process at a time, got others that do. Run the same command again."
    )


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that no byte more can be written: ENOSPC, EDQUOT, EFBIG, or a library's message of the same
    meaning.
    """
    if isinstance(error, DiskFull) or (
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    ):
        return True
    return _FULL.search(str(error)) is not None


def disk_full(target: Path) -> DiskFull:
    """The error for a full disk while `target` was written; free bytes are read now."""
    place = target.absolute().parent
    while not place.exists():
        place = place.parent
    cause = f"a full disk or a file-size limit ({size(shutil.disk_usage(place).free)} free now)"
    return DiskFull(
        f"Disk space must suffice for {target}, got {cause}. Free some space and run the same command again."
    )


def size(count: float) -> str:
    """Bytes as a person reads them, with three digits."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.{2 if count < 10 * factor else 1 if count < 100 * factor else 0}f} {unit}"
    return f"{count:.0f} bytes"


def write_header(folder: Path, header: Header) -> None:
    """Store `header` in a stage folder whose files are all there, with their sizes and hashes.

    A gigabyte takes about 0.8 s of one core (sha256 at 1.3 GB/s), here and once in a run that finds the stage finished;
    writing it takes longer.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    _write_header(
        folder,
        header,
        {
            name: {"size": (folder / name).stat().st_size, "sha256": known_hash(folder / name)}
            for name in names
            if name != HEADER
        },
    )


def mark(folder: Path, header: Header) -> None:
    """Store `header` in a folder that is made again whenever it is needed, as the record that it is ours; its files are
    not listed.
    """
    _write_header(folder, header, {})


def _write_header(folder: Path, header: Header, files: dict[str, Any]) -> None:
    stored = header.model_dump(mode="json") | {_FILES: files}
    write_json(folder / HEADER, stored | {_SEAL: hash_json(stored)})


def leave_out(folder: Path, names: list[str]) -> None:
    """Delete files of a finished stage that nothing needs any more; the stage stays finished without them."""
    header, files = read_header(folder), listed_files(folder)
    if header is not None and files is not None:  # before they go: a stage that holds more than it lists is whole
        _write_header(folder, header, {name: file for name, file in files.items() if name not in names})
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _read_header(folder: Path) -> dict[str, Any] | None:
    try:
        header = load_json(folder / HEADER)
    except (OSError, ValueError):
        return None
    return header if isinstance(header, dict) else None


def read_header(folder: Path) -> Header | None:
    """The header of a stage folder, or None when the folder is absent or was not written by this format. What it lists
    is not looked at.
    """
    stored = _read_header(folder)
    try:
        return (
            None
            if stored is None
            else Header.model_validate({name: value for name, value in stored.items() if name not in (_FILES, _SEAL)})
        )
    except ValidationError:
        return None


def listed_files(folder: Path) -> dict[str, Any] | None:
    """The files of a stage with size and hash, None where its header is damaged or of a version that listed none."""
    stored = _read_header(folder) or {}
    seal = stored.pop(_SEAL, None)
    return stored[_FILES] if seal == hash_json(stored) and isinstance(stored.get(_FILES), dict) else None


def is_finished(folder: Path, header: Header) -> bool:
    """Whether `folder` was finished with exactly this header and holds what it held then, so that the stage need not
    run again. The log names damage.
    """
    stored = read_header(folder)
    if stored == header:
        return is_intact(folder)
    if folder.is_dir() and (
        stored is None or (listed_files(folder) is None and _FILES in (_read_header(folder) or {}))
    ):
        log.warning("%s is made again: its %s is damaged.", folder, HEADER)
    return False


def is_intact(folder: Path) -> bool:
    """Whether a finished stage holds what it held when it was finished; more does not matter. The log says what is
    damaged.
    """
    files, wrong = listed_files(folder), ""
    if files is None:  # of an earlier version: nothing tells whether it is whole, and only making it again does
        earlier = _FILES not in (_read_header(folder) or {})
        wrong = (
            "it was finished by an earlier sparsegate, which kept no hashes" if earlier else f"its {HEADER} is damaged"
        )
    for name, file in (files or {}).items():
        path = folder / name
        if not path.is_file():
            wrong = f"{name} is missing"
        elif path.stat().st_size != file["size"]:
            wrong = f"{name} has {path.stat().st_size} bytes in place of {file['size']}"
        elif known_hash(path) != file["sha256"]:
            wrong = f"{name} has other bytes than when it was finished"
        if wrong:
            break
    if wrong:
        log.warning("%s is made again: %s.", folder, wrong)
    return not wrong


_hashes: dict[tuple[int, ...], str] = {}


def known_hash(path: Path) -> str:
    """Sha256 (hex) of a file's bytes, taken once as long as nobody writes to it: a stage or a model is asked for
    several times in a run.
    """
    status = path.stat()
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if key not in _hashes:
        _hashes[key] = hash_file(path)
    return _hashes[key]

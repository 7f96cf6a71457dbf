"""Headers, hashes and atomic folders: what makes every stage a pure function from folders to a folder that can be resumed.

A stage folder holds `header.json` beside its data. The header names its parents by their fingerprints, so a fingerprint covers the whole history.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..runtime_onnx.errors import InputError
from ..runtime_onnx.untrusted import read_json as read_json

if TYPE_CHECKING:
    from torch import Tensor

VERSION = "0.1.0"
HEADER = "header.json"
_CHUNK = 1 << 22  # bytes read at a time


class Header(BaseModel):
    """What a stage was made from; equal headers mean equal content.

    `parents` maps a parent's role to its fingerprint (sha256 hex), `config` is the stage's own recipe part, `calibration` the sha256 of the token batches.
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
    """Write `value` as indented JSON beside `path` and rename it into place."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, sort_keys=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` as safetensors beside `path` and rename it into place. Raises InputError when the disk is full."""
    from safetensors.torch import save_file

    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        save_file(dict(tensors), partial)
        os.replace(partial, path)
    except Exception as error:
        partial.unlink(missing_ok=True)
        if is_disk_full(error):
            raise disk_full(path) from error
        raise


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that is renamed to `target` when the block ends well and removed when it does not.

    Raises InputError when the disk is full; every other error passes through. Leftovers of killed runs are removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in list(target.parent.iterdir()):
        if stale.name.startswith(f"{target.name}.partial-"):
            shutil.rmtree(stale, ignore_errors=True)
    partial, old = (target.with_name(f"{target.name}.partial-{os.getpid()}{end}") for end in ("", "-old"))
    partial.mkdir()
    try:
        yield partial
        _sync(partial)
        if target.exists():  # aside for a moment: a process that is killed while a folder is removed would leave a half
            os.replace(target, old)
        os.replace(partial, target)
    except BaseException as error:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            raise disk_full(target) from error
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that no byte more can be written: ENOSPC, EDQUOT, EFBIG, or a library's message of the same meaning."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    text = str(error)
    return any(sign in text for sign in ("No space left on device", "os error 28", "File too large", "os error 27", "Disk quota exceeded", "StorageFull"))


def disk_full(target: Path) -> InputError:
    """The error for a full disk while `target` was written; free bytes are read now."""
    free = shutil.disk_usage(target.parent).free
    found = f"a full disk or a file-size limit ({free / 1e9:.1f} GB free now)"
    return InputError(f"Disk space must suffice for {target}, got {found}. Free some space and run the same command again.")


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def write_header(folder: Path, header: Header) -> None:
    """Store `header` in a stage folder."""
    write_json(folder / HEADER, header.model_dump(mode="json"))


def read_header(folder: Path) -> Header | None:
    """The header of a stage folder, or None when the folder is absent or was not written by this format."""
    path = folder / HEADER
    if not path.is_file():
        return None
    try:
        return Header.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError):
        return None


def is_finished(folder: Path, header: Header) -> bool:
    """Whether `folder` was finished with exactly this header, so that the stage need not run again."""
    return read_header(folder) == header

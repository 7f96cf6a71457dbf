"""Copies the native library into an ONNX folder and names it in genai_config.json, for onnxruntime-genai apps in C++,
C#, Java and for servers.

It has to be a real copy: genai refuses a library outside the model folder, and a link that leads there.
`sparsegate_link.json` beside it says what `link` put there:

    version, sha256      of the copied library
    config               the text of genai_config.json before
    linked_sha256        sha256 of the text of genai_config.json after

The record lies in a folder that others may have written. So it only restores how the present configuration was spelled,
and a library goes only where its bytes are those that the record names, or the installed ones.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from .errors import InputError
from .genai_config import CONFIG, read_config
from .generate import config_provider
from .library import DENSE, LIBRARY, executor, library_path, model_file, version
from .untrusted import inside, load_json, parse_json

RECORD = "sparsegate_link.json"
_WHAT = "A linked folder"
_LARGEST = 1 << 28  # bytes of a library: ours have a hundredth of it
_log = logging.getLogger("sparsegate")


def link(folder: str | Path) -> Path:
    """Copies the installed library beside genai_config.json and names it there; returns the copy. Run again, it renews
    a stale copy and changes nothing else.

    `folder` is an ONNX folder or a sparse checkpoint with onnx/ inside.

    Raises:
        InputError: No genai_config.json, or one with fields that are not known; a dense model; a library that does not
        support the model; a file of the
            library's name that `link` did not put there; a link in place of a file.
    """
    folder = model_file(folder).parent
    config = read_config(folder)
    chosen = executor(folder, config_provider(config))
    if not chosen.kernel:
        remedy = "Link a converted folder" if chosen.reason == DENSE else "The folder runs without the library as it is"
        raise InputError(
            f"The native library must support the model in {folder} to be linked, got: {chosen.reason}. {remedy}."
        )
    places = [inside(folder, name, _WHAT) for name in (RECORD, LIBRARY, CONFIG)]
    if places[1].exists() and not _ours(folder):
        raise InputError(
            f"{places[1]} must be a library that sparsegate link put there, got another file. Move it away, then link "
            "again."
        )
    text = _original(folder, config)
    config = parse_json(text)
    config["model"]["decoder"].setdefault("session_options", {})["custom_ops_library"] = LIBRARY
    linked = json.dumps(config, indent=4).encode()
    library = library_path().read_bytes()
    record = {
        "version": version(),
        "sha256": _hash(library),
        "config": text.decode("utf-8"),
        "linked_sha256": _hash(linked),
    }
    # Config last and, but where an older copy is renewed, record first: whatever was written before a crash, `unlink`
    # finds the record, the library there is known as ours, and no config names one that is not there.
    writes = list(zip(places, (json.dumps(record, indent=2).encode(), library, linked), strict=True))
    for path, content in [writes[1], writes[0], writes[2]] if places[1].exists() else writes:
        _write(path, content)
    _log.info("%s names %s, version %s", folder / CONFIG, LIBRARY, record["version"])
    return folder / LIBRARY


def unlink(folder: str | Path) -> bool:
    """Undoes `link`: genai_config.json is what it was, byte for byte, and the copy goes. A folder that is not linked
    stays as it is; returns whether it was.

    A config that was edited after `link` keeps the edits and loses the library's line only. A library that `link` did
    not put there stays. Raises InputError as `link` for the folder's genai_config.json and for links in place of files.
    """
    folder = model_file(folder).parent
    config = read_config(folder)
    record, library, named = (inside(folder, name, _WHAT) for name in (RECORD, LIBRARY, CONFIG))
    if not record.is_file():
        return False
    text = named.read_bytes()
    original = _original(folder, config)
    if original != text:
        _write(named, original)
    if library.exists():
        if _ours(folder):
            library.unlink()
        else:
            _log.warning(
                "%s stays: sparsegate link did not put it there. Take it away by hand if it is not wanted.", library
            )
    record.unlink()
    _log.info("%s names no library any more", named)
    return True


def _original(folder: Path, config: dict[str, Any]) -> bytes:
    """The text of the config without the library: as it stands, or as the record spells it where that says the same,
    else written anew.

    `config` is what the present text says.
    """
    text = (folder / CONFIG).read_bytes()
    before = copy.deepcopy(config)
    if before["model"]["decoder"].get("session_options", {}).pop("custom_ops_library", None) is None:
        return text
    record = _record(folder)
    try:
        stored = parse_json(record["config"]) if record["linked_sha256"] == _hash(text) else None
    except ValueError:
        stored = None
    if stored is not None and _exact(_spared(stored)) == _exact(_spared(before)):
        return record["config"].encode()
    _log.info("%s was edited after it was linked: only the library's line is taken out", folder / CONFIG)
    return json.dumps(before, indent=4).encode()


def _spared(config: Any) -> Any:
    """`config` with the empty session options that `link` may have added left out."""
    spared = copy.deepcopy(config)
    try:
        if spared["model"]["decoder"].get("session_options") == {}:
            del spared["model"]["decoder"]["session_options"]
    except (TypeError, KeyError, AttributeError):
        return None
    return spared


def _exact(value: Any) -> str:
    """JSON that differs wherever two values do: in Python 1, 1.0 and true are equal."""
    return json.dumps(value, sort_keys=True)


def _record(folder: Path) -> dict[str, str]:
    """The record of `link`; empty texts where there is none that `link` could have written."""
    names = ("version", "sha256", "config", "linked_sha256")
    try:
        record = load_json(folder / RECORD)
    except (OSError, ValueError):
        record = None
    if (
        isinstance(record, dict)
        and set(record) == set(names)
        and all(isinstance(value, str) for value in record.values())
    ):
        return record
    return dict.fromkeys(names, "")


def _ours(folder: Path) -> bool:
    """Whether the library in `folder` is what the record says that `link` put there, or the installed one."""
    if not (folder / LIBRARY).is_file() or (folder / LIBRARY).stat().st_size > _LARGEST:
        return False
    digest = _hash((folder / LIBRARY).read_bytes())
    return digest in (_record(folder)["sha256"], _hash(library_path().read_bytes()))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Write beside `path` and rename into place: a process that has the old library open keeps it."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.unlink(missing_ok=True)
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

"""Copies the native library into an ONNX folder and names it in genai_config.json, for onnxruntime-genai apps in C++, C#, Java and for servers.

It has to be a real copy: genai refuses a library outside the model folder, and a link that leads there. `sparsegate_link.json` beside it keeps what `unlink`
needs:

    version, sha256      of the copied library
    config               the text of genai_config.json before
    linked_sha256        sha256 of the text of genai_config.json after
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

from .generate import config_provider
from .library import DENSE, LIBRARY, executor, library_path, model_file, version
from .session import read_config

RECORD = "sparsegate_link.json"
CONFIG = "genai_config.json"


def link(folder: str | Path) -> Path:
    """Copies the installed library beside genai_config.json and names it there; returns the copy. Run again, it renews a stale copy and changes nothing else.

    `folder` is an ONNX folder or a sparse checkpoint with onnx/ inside.

    Raises:
        ValueError: No genai_config.json, a dense model, a library that does not support the model, or a config that names another library.
    """
    folder = model_file(folder).parent
    config = read_config(folder)
    chosen = executor(folder, config_provider(config))
    if not chosen.kernel:
        remedy = "Link a converted folder" if chosen.reason == DENSE else "The folder runs without the library as it is"
        raise ValueError(f"The native library must support the model in {folder} to be linked, got: {chosen.reason}. {remedy}.")
    options = config["model"]["decoder"].setdefault("session_options", {})
    if options.get("custom_ops_library", LIBRARY) != LIBRARY:
        raise ValueError(f"{CONFIG} in {folder} must name no other custom_ops_library, got {options['custom_ops_library']!r}. Take that line out first.")
    text = (folder / CONFIG).read_bytes()
    if "custom_ops_library" in options:
        text = _original(folder, text)
        config = json.loads(text)
        options = config["model"]["decoder"].setdefault("session_options", {})
    options["custom_ops_library"] = LIBRARY
    linked = json.dumps(config, indent=4).encode()
    library = library_path().read_bytes()
    record = {"version": version(), "sha256": _hash(library), "config": text.decode("utf-8"), "linked_sha256": _hash(linked)}
    # Record first and config last: whatever was written before a crash, `unlink` finds the record, and no config names a library that is not there.
    _write(folder / RECORD, json.dumps(record, indent=2).encode())
    _write(folder / LIBRARY, library)
    _write(folder / CONFIG, linked)
    logging.getLogger("sparsegate").info("%s names %s, version %s", folder / CONFIG, LIBRARY, record["version"])
    return folder / LIBRARY


def unlink(folder: str | Path) -> bool:
    """Undoes `link`: genai_config.json is what it was, byte for byte, and the copy goes. A folder that is not linked stays as it is; returns whether it was.

    A config that was edited after `link` keeps the edits and loses the library's line only. Raises ValueError when there is no genai_config.json.
    """
    folder = model_file(folder).parent
    read_config(folder)
    if not (folder / RECORD).is_file():
        return False
    text = (folder / CONFIG).read_bytes()
    original = _original(folder, text)
    if original != text:
        _write(folder / CONFIG, original)
    (folder / LIBRARY).unlink(missing_ok=True)
    (folder / RECORD).unlink()
    logging.getLogger("sparsegate").info("%s names no library any more", folder / CONFIG)
    return True


def _original(folder: Path, text: bytes) -> bytes:
    """The config before `link`, from the record when `text` is what `link` wrote, else `text` without the library's line."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["linked_sha256"] == _hash(text):
            return record["config"].encode()
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no usable record: the line is all that link adds
    config = json.loads(text)
    options = config["model"]["decoder"].get("session_options", {})
    if options.pop("custom_ops_library", None) is None:
        return text
    logging.getLogger("sparsegate").info("%s was edited after it was linked: only the library's line is taken out", folder / CONFIG)
    return json.dumps(config, indent=4).encode()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Write beside `path` and rename into place: a process that has the old library open keeps it."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

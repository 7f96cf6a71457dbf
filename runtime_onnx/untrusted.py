"""What every file and every name from outside passes: one reader of JSON, one check of paths, one list of what a
repository may hold.

A checkpoint, a model folder and a Hub repository are data from strangers. Two readers of one file must not see two
contents, so a key that stands twice is refused; a name must not lead out of its folder, and no file that a system can
run is fetched or pushed.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import Any

from .errors import InputError

LARGEST_JSON = 1 << 28
"""Most bytes of a JSON file; the largest tokenizers have a tenth of it."""
_LONGEST = 1024  # characters of a name
_DIGITS = "integer string conversion"  # of Python's error for more digits than it reads
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_HALF = re.compile("[\ud800-\udfff]")
_KEPT = {".cache", ".git", ".huggingface"}  # where the Hub's client and git keep notes of their own
_DATA = re.compile(r".*\.(json|safetensors|onnx|data|md|txt|png|html|jinja|model|tiktoken|pdf|rst)", re.IGNORECASE)
_TEXTS = re.compile(r"(licen[cs]e|notice|copying|use_policy)", re.IGNORECASE)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError with the reason alone: no JSON, too deep, a number of thousands of
    digits, NaN or infinity, half of a surrogate pair, or a key that stands twice in one object.
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_number, parse_float=_number)
    except RecursionError:
        raise ValueError("values inside values too deep to read") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise ValueError("a number of thousands of digits") if _DIGITS in str(error) else error from None
    if _ESCAPED.search(text):
        check_letters(value)
    return value


def check_letters(value: Any) -> None:
    """Raise ValueError where a text in plain lists and objects has half of a surrogate pair, which no file and no
    terminal can hold.
    """
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str) and _HALF.search(part):
            raise ValueError(f"half of a surrogate pair in {ascii(part):.100}")
        if isinstance(part, dict):
            waiting += [*part, *part.values()]
        elif isinstance(part, list | tuple):
            waiting += part


def load_json(path: Path) -> Any:
    """The value in a JSON file. Raises OSError where it cannot be read and ValueError as `parse_json`, or for what is
    no file or too large a one.
    """
    return parse_json(read_bytes(path, LARGEST_JSON))


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes, or a link to one; no pipe, no device. Raises OSError and
    ValueError as `load_json`.
    """
    if path.exists() and not path.is_file():
        raise ValueError("a folder" if path.is_dir() else "no regular file")
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{size} bytes, more than {most}")
    return path.read_bytes()


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises InputError naming `what` when the file is missing or is no JSON object, or has
    a key twice.
    """
    try:
        value = load_json(path)
    except FileNotFoundError:
        raise InputError(f"{what} must be a file, got nothing at {path}. Check the folder.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{what} must be JSON, got {path} ({error}). Fetch or write the file again.") from None
    if not isinstance(value, dict):
        raise InputError(
            f"{what} must be a JSON object, got {type(value).__name__} in {path}. Fetch or write the file again."
        )
    return value


def check_name(name: Any, what: str) -> str:
    """`name`, which must be a plain relative path: no `..`, drive, backslash, control character or folder of the Hub's
    notes. Raises InputError.
    """
    if reason := _reason(name):
        raise InputError(
            f"{what} must name files inside its own folder, got {ascii(name):.200} ({reason}). Do not use this copy; "
            "fetch or convert it again."
        )
    return name


def inside(folder: Path, name: Any, what: str, link: bool = False) -> Path:
    """The path of `name`, a relative path from outside, below `folder`; neither the file nor a folder on the way is a
    link.

    `link` lets the file itself be one, for reading alone: the Hub's cache and people with large disks link weights.
    Raises InputError.
    """
    path = folder / check_name(name, what)
    steps = [path, *list(path.parents)[: len(Path(name).parts) - 1]]
    bad = next((step for step in steps if step.is_symlink() and not (link and step == path)), None)
    if bad is not None or not (link or path.resolve().is_relative_to(folder.resolve())):
        actual = f"{bad or path}, a link to another place"
        raise InputError(
            f"{what} must name regular files inside its own folder, got {actual}. Put the file itself there."
        )
    return path


def regular(path: Path) -> Path:
    """`path`, a file that is to be copied out of a folder from outside: a link must lead into the cache that the Hub's
    client keeps. Raises InputError.
    """
    if path.is_symlink():
        blobs = path.parent.parent.parent / "blobs"
        if path.parent.parent.name != "snapshots" or path.resolve().parent != blobs.resolve():
            raise InputError(
                f"{path} must be a regular file to be copied, got a link to {path.resolve()}. Put the file itself "
                "there."
            )
    return path


def is_data(name: str) -> bool:
    """Whether a file's name is of a kind that models and checkpoints have: weights, graphs, JSON, texts, pictures."""
    last = name.split("/")[-1]
    return _DATA.fullmatch(last) is not None or (_TEXTS.match(last) is not None and "." not in last)


def check_data(names: Iterable[str], what: str) -> None:
    """Raise InputError for a name outside the folder and for one of a kind that `is_data` does not know, as libraries,
    programs, code and pickles.
    """
    for name in names:
        if not is_data(check_name(name, what)):
            raise InputError(
                f"{what} must list weights, graphs, JSON, texts and pictures alone, got {name}. Take that file out, or "
                "do not use this copy."
            )


def printable(text: str) -> str:
    """A text that may hold what a file says, for a terminal: what is no letter, as control characters, is escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _number(text: str) -> float:
    """A number that every reader understands and every comparison can fail on: NaN and infinity are no JSON."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text:.40}, which is not finite")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {ascii(twice):.100} twice in one object")
    return members


def _reason(name: Any) -> str:
    """Why `name` is no plain relative path; empty where it is."""
    if not isinstance(name, str) or not name or len(name) > _LONGEST:
        return f"no name of 1 to {_LONGEST} characters"
    if any(unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") for letter in name):
        return "a control character"
    if name.startswith("/"):
        return "an absolute path"
    if set(name) & set("\\:*") or PureWindowsPath(name).drive:
        return "a drive, a backslash or a star"
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "an empty part, '.' or '..'"
    if kept := next((part for part in parts if part.casefold() in _KEPT), None):
        return f"a folder of notes, {kept}"
    return ""

"""People's texts by their suffix: JSON lines hold a document each, everything else is plain text.

A line is an object with `text` or `content`, a text, or with `messages`, a conversation that the model's chat template writes out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..runtime_onnx.untrusted import parse_json
from .artifact import InputError
from .data import read_text

JSON_LINES = (".jsonl", ".ndjson")
FIELDS = ("text", "content", "messages")
_BETWEEN = "\n\n"
_OTHERS = (".json", ".parquet", ".arrow", ".csv", ".tsv", ".gz", ".zip", ".zst")
_WRITE = "Write it as text, or as JSON lines (.jsonl) with a field text"

Conversation = list[dict[str, Any]]
Render = Callable[[list[Conversation]], list[str]]
"""What writes conversations out as texts."""


def read_whole(path: Path, render: Render) -> tuple[str, str]:
    """The text of a file, and a line on what was read of one with documents ("" of a plain one).

    Raises InputError as `read_text` does, for a file of a kind that is none of text, and for a line that is no document.
    """
    suffix = path.suffix.lower()
    if suffix in _OTHERS:
        raise InputError(f"Calibration text must be text or JSON lines, got a {suffix} file, {path}. {_WRITE}.")
    text = read_text(path)
    if suffix not in JSON_LINES:
        return text, ""
    found = [(field, value) for number, line in enumerate(text.splitlines(), 1) if line.strip() for field, value in [_document(line, number, path)]]
    rendered = iter(render([value for field, value in found if field == "messages"]))
    counts = {field: sum(name == field for name, _ in found) for field in FIELDS}
    said = ", ".join(f"{count} of the field {field}" for field, count in counts.items() if count)
    return _BETWEEN.join(next(rendered) if field == "messages" else value for field, value in found), f"{path.name}: {len(found)} documents, {said}."


def _document(line: str, number: int, path: Path) -> tuple[str, Any]:
    """The field that a line has its document in, and the document."""
    try:
        value = parse_json(line)
    except ValueError as error:
        raise InputError(f"Line {number} of {path} must be JSON, got another text ({error}). Mend the line.") from None
    field = next((name for name in FIELDS if isinstance(value, dict) and value.get(name) is not None), None)
    if field is None:
        found = ", ".join(map(ascii, value)) if isinstance(value, dict) else type(value).__name__
        raise InputError(f"Line {number} of {path} must have one of the fields {', '.join(FIELDS)}, got {found:.200}. Rename the field.")
    if not (_is_conversation(value[field]) if field == "messages" else isinstance(value[field], str)):
        expected = "a list of objects with role and content" if field == "messages" else "a text"
        raise InputError(f"{field} in line {number} of {path} must be {expected}, got {ascii(value[field]):.100}. Mend the line.")
    return field, value[field]


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and isinstance(one.get("role"), str) and "content" in one for one in value)

"""People's texts by their suffix.

1. A line of JSON lines or a row of parquet holds a document: `text` or `content` is a text, `messages` a conversation
   that the model's chat template writes out.
2. Everything else is plain text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import parse_json
from .windows import LARGEST_TEXT, read_text

PARQUET = ".parquet"
JSON_LINES = (".jsonl", ".ndjson")
FIELDS = ("text", "content", "messages")
_BETWEEN = "\n\n"
_OTHERS = (".json", ".arrow", ".csv", ".tsv", ".gz", ".zip", ".zst")
_ROWS = 1024  # of parquet, read at once
_WRITE = "Write it as text, or as JSON lines (.jsonl) with a field text"

Conversation = list[dict[str, Any]]
Render = Callable[[list[Conversation]], list[str]]
"""What writes conversations out as texts."""


def read_whole(path: Path, render: Render) -> tuple[str, str]:
    """The text of a file, and a line on what was read of one with documents ("" of a plain one).

    Raises InputError as `read_text` does, for a file of a kind that is none of text, and for a line that is no
    document.
    """
    suffix = path.suffix.lower()
    if suffix in _OTHERS:
        raise InputError(f"Calibration text must be text or JSON lines, got a {suffix} file, {path}. {_WRITE}.")
    if suffix == PARQUET:
        documents = [_document(row, f"row {number}", path) for number, row in enumerate(_parquet_rows(path), 1)]
    elif suffix in JSON_LINES:
        documents = [
            _document(_json(line, number, path), f"line {number}", path)
            for number, line in enumerate(read_text(path).splitlines(), 1)
            if line.strip()
        ]
    else:
        return read_text(path), ""
    rendered = iter(render([value for field, value in documents if field == "messages"]))
    counts = {field: sum(name == field for name, _ in documents) for field in FIELDS}
    said = ", ".join(f"{count} of the field {field}" for field, count in counts.items() if count)
    return _BETWEEN.join(
        next(rendered) if field == "messages" else value for field, value in documents
    ), f"{path.name}: {len(documents)} documents, {said}."


def _json(line: str, number: int, path: Path) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise InputError(f"Line {number} of {path} must be JSON, got another text ({error}). Mend the line.") from None


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, with the columns that may hold a document; rows are counted against LARGEST_TEXT as
    they are unpacked.
    """
    if not path.is_file():
        raise InputError(f"Calibration text must be a regular file, got {path}. Check the path.")
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(
            f"A {PARQUET} file must have pyarrow to be read, got none. Run pip install pyarrow, or write JSON lines "
            "(.jsonl)."
        ) from None
    unpacked = 0
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if not set(names) & set(FIELDS):
                raise InputError(
                    f"{path} must have a column {', '.join(FIELDS)}, got {ascii(names):.200}. Rename the column."
                )
            for batch in file.iter_batches(_ROWS, columns=[name for name in FIELDS if name in names]):
                unpacked += batch.nbytes
                if unpacked > LARGEST_TEXT:
                    raise InputError(
                        f"Calibration text must be at most {LARGEST_TEXT >> 20} MiB, got more in {path}. Give fewer "
                        "rows."
                    )
                yield from batch.to_pylist()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} must be a {PARQUET} file, got one that pyarrow refuses ({str(error).splitlines()[0]:.200}). Write "
            "it again."
        ) from None


def _document(value: Any, place: str, path: Path) -> tuple[str, Any]:
    """The field that a line or row has its document in, and the document."""
    field = next((name for name in FIELDS if isinstance(value, dict) and value.get(name) is not None), None)
    if field is None:
        actual = ", ".join(map(ascii, value)) if isinstance(value, dict) else type(value).__name__
        raise InputError(
            f"{place.capitalize()} of {path} must have one of the fields {', '.join(FIELDS)}, got {actual:.200}. "
            "Rename the field."
        )
    if not (_is_conversation(value[field]) if field == "messages" else isinstance(value[field], str)):
        expected = "a list of objects with role and content" if field == "messages" else "a text"
        raise InputError(f"{field} in {place} of {path} must be {expected}, got {ascii(value[field]):.100}. Mend it.")
    return field, value[field]


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and isinstance(one.get("role"), str) and "content" in one for one in value)
    )

"""What pages are put together from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from records.folders import ROOT, repeatable
from records.model_results import Measured, ModelResult, TextFile


def page_text(parts: Iterable[str]) -> str:
    """Titles, paragraphs, lists and tables, with an empty line between them; those that are empty are left out."""
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def written_line(page: str, place: Path) -> str:
    """Which script of this folder writes a page, and from which result."""
    stored = place.relative_to(ROOT).as_posix()
    return f"Written by `python tests/bench/pages/{page}` from `{stored}`; nothing is typed by hand."


def weights_line(parameters: int, origin: str) -> str:
    """How large a model is and where it comes from."""
    return f"{parameters / 1e6:.1f} M parameters, weights from {origin}."


def text_name(text: TextFile, name: str | None = None, tokens: bool = False) -> str:
    """A text by its file, or a longer name, with its hash and, with `tokens`, how many are taken from it."""
    count = f"{text.tokens} tokens, " if tokens else ""
    return f"{name or text.file} ({count}sha256 {text.sha256[:16]})"


def versions_text(versions: Mapping[str, str], names: Sequence[str]) -> str:
    """Versions of the packages that are installed of some."""
    return ", ".join(f"{name} {versions[name]}" for name in names if name in versions)


def machine_line(
    result: Measured, details: Sequence[str], threads: int | None = None, commit: str | None = None
) -> str:
    """Machine and threads, details of the run, commit and date; `commit` in place of the record's."""
    cores = f"{result.machine.cpu}, {result.machine.cores} cores" + (f", {threads} threads" if threads else "")
    return "; ".join([cores, *details, f"commit {commit or result.commit or 'unknown'}, {result.date}"])


def missing_part(names: Sequence[str]) -> list[str]:
    """What was not measured, where something was not."""
    return [f"Not measured: {', '.join(names)}."] if names else []


def repeat_part(result: ModelResult) -> list[str]:
    """The command that measures a result again."""
    return ["## How to repeat it", f"`{repeatable(result.command)}`"]

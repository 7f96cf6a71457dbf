"""Text from outside in Markdown: names, paths, notes and licences are shown as they are and make no markup, as
autoescape does in HTML.
"""

from __future__ import annotations

import re
from urllib.parse import quote

_MARKS = re.compile(r"([\\`*\[\]|~])")
_URL = re.compile(r"https?://[^\s<>()\[\]\\\"'`|]+", re.ASCII | re.IGNORECASE)
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def inline(value: object) -> str:
    """One line of running text or a table's cell: no link, picture, code, emphasis, table or HTML begins in it."""
    return _MARKS.sub(r"\\\1", re.sub(r"[&<>]", lambda mark: _HTML[mark[0]], _line(value)))


def code(value: object) -> str:
    """A code span; its marks are longer than any run of them inside."""
    text = _line(value)
    marks = "`" * (_longest(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{marks}{space}{text}{space}{marks}"


def fenced(text: str, language: str) -> str:
    """A block of code; its fence is longer than any run of marks inside, and what does not print is spelled out."""
    fence = "`" * max(3, _longest(text) + 1)
    shown = "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text.rstrip()
    )
    return f"{fence}{language}\n{shown}\n{fence}"


def target(link: str | None, files: tuple[str, ...] = ()) -> str | None:
    """What a link may lead to: an http address, or one of the `files` beside the card. None for everything else, such
    as `javascript:`.
    """
    if link is None:
        return None
    if link in files:
        return quote(link)
    return link if _URL.fullmatch(link) else None


def _line(value: object) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(value)).split())


def _longest(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)

"""The error for a user's mistake, which every part of sparsegate raises, and the place where a library's own errors
become it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_SAID = 300  # characters of a library's text that a line holds


class InputError(ValueError):
    """A user's mistake: one line that says what must be, what was found and what to do."""


def either(names: Iterable[str]) -> str:
    """Names as a message lists them: a, b or c."""
    *before, last = names
    return f"{', '.join(before)} or {last}" if before else last


def said_by(error: BaseException) -> str:
    """The text of a library's error as one line, or its class where it has none."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.{_SAID}}"


@contextmanager
def explained(what: str, remedy: str = "Fetch or convert it again.") -> Iterator[None]:
    """Whatever a library raises inside the block, which must hold calls of it alone, becomes an InputError that names
    `what` and holds the library's text.

    ONNX Runtime, onnxruntime-genai and onnx raise classes without a common base, RuntimeErrors and plain Exceptions.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} must run, got: {said_by(error)}. {remedy}") from error

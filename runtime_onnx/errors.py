"""The error for a user's mistake, which every part of sparsegate raises."""

from __future__ import annotations


class InputError(ValueError):
    """A user's mistake: one line that says what must be, what was found and what to do."""

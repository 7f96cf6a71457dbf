"""What lies beside a stored benchmark: its table, and the roofline plot of an op."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .roofline import plot
from .speed import page


def write_speed(output: Path, result: dict[str, Any]) -> None:
    """The table of a stored result beside it, and for an op the roofline plot; a result without a kind has neither."""
    if not result.get("kind"):
        return
    output.with_suffix(".md").write_text(page(result), encoding="utf-8")
    if result["kind"] == "op":
        plot(output.with_suffix(".png"), [result])

"""Where benchmarks write to and pages read from."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "tests" / "bench" / "results"
DOCS = ROOT / "docs"
README = ROOT / "README.md"


def repeatable(command: str) -> str:
    """A recorded command with the path at which its benchmark lies now: records hold the path of their day."""
    return re.sub(r"tests/bench/(?=\w+\.py\b)", "tests/bench/benchmarks/", command)

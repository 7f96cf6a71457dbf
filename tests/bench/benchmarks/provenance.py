"""What stands beside every number that a benchmark stores."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsegate.converter import report as reporting


def commit() -> str | None:
    """The commit of the code that runs."""
    folder = Path(__file__).parent
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=folder)
    return done.stdout.strip() or None


def provenance() -> dict[str, Any]:
    """Machine, versions, commit and date, as the fields of `Measured`."""
    return {
        "machine": reporting.this_machine(),
        "versions": reporting.installed_versions(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }

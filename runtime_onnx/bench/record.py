"""What stands beside every measured number: machine, versions, commit and command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "sparsegate",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "onnxruntime-genai-cuda",
    "numpy",
    "torch",
    "llama-cpp-python",
    "gguf",
)


def record(command: str | None = None) -> dict[str, Any]:
    """Time, machine, versions and command, the head of every result; `command` is this process's own by default."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "command": command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def machine() -> dict[str, Any]:
    """This machine: processor, CPUs this process may use, memory, system."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    model = (
        f"{fields.get('model name', platform.processor())} (family {fields.get('cpu family', '?')}, model "
        f"{fields.get('model', '?')})"
    )
    return {
        "cpu": model,
        "cpus": usable_cpus(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter, and the commit of a source tree that runs in place."""
    installed: dict[str, str | None] = {"python": platform.python_version(), "commit": _commit()}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _commit() -> str | None:
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

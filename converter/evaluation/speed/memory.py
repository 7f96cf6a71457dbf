"""Peak memory of one model: a process of its own opens it, runs it once and says how much of the machine's memory it
held at most.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def peak(runtime: str, path: Path, threads: int, precision: str, ids: list[int], following: list[int]) -> int | None:
    """Largest resident set in bytes, mapped files included, of a process that runs the model once; None where the
    system does not tell or it failed.
    """
    wish = json.dumps(
        {
            "runtime": runtime,
            "path": str(path),
            "threads": threads,
            "precision": precision,
            "ids": ids,
            "following": following,
        }
    )
    done = subprocess.run([sys.executable, "-m", __name__], input=wish, capture_output=True, text=True, check=False)
    last = done.stdout.strip().rpartition("\n")[2]
    return int(last) if done.returncode == 0 and last.isdigit() else None


def _main() -> None:
    from .peers import OPENERS

    wish = json.load(sys.stdin)
    ids, following = wish["ids"], wish["following"]
    model = OPENERS[wish["runtime"]].open(
        Path(wish["path"]), wish["threads"], wish["precision"], len(ids) + len(following)
    )
    model.run(ids, following)
    peaks = [
        line.split()[1]
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith("VmHWM:")
    ]
    sys.stdout.write(f"\n{int(peaks[0]) * 1024}\n" if peaks else "\nunknown\n")


if __name__ == "__main__":
    _main()

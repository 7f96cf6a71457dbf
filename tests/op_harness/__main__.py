"""`python -m tests.op_harness MODE`."""

from __future__ import annotations

import argparse
import sys

from . import CASES, MODES, mode_of
from .case import ISAS


def main() -> int:
    """Reads the command line and runs the mode."""
    parser = argparse.ArgumentParser(prog="python -m tests.op_harness", description=__doc__)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--op", choices=CASES, action="append", help="only this op; may be repeated")
    parser.add_argument(
        "--isa", choices=ISAS, action="append", help="only this build of the CPU kernels; may be repeated"
    )
    parser.add_argument("--full", action="store_true", help="every variant, not a sample")
    given = parser.parse_args()
    return mode_of(given.mode).main(given.op or list(CASES), given.isa or list(ISAS), given.full)


if __name__ == "__main__":
    sys.exit(main())

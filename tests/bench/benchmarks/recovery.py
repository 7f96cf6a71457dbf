"""Keep what recovery trainings measured, and write docs/turbosparse.md and its pictures anew.

    python tests/bench/benchmarks/recovery.py [--take OUT] [--predictors OUT] [--scratch WORK]

The trainings run on their own: `--take OUT` stores the records of a checkpoint that `sparsegate convert --recipe
turbosparse` wrote, as recovery.json and recovered.json; `--predictors OUT` those of the recipe turbosparse_predictors,
as recovery_predictors.json and recovered_predictors.json; `--scratch WORK` curves of `examples/pretrain.py` runs below
WORK (folders silu0, drelu0, silu1 and so on), as scratch.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsegate.converter.checkpoint.stage import write_json
from sparsegate.converter.evaluation.records import RESULTS as REPORT
from sparsegate.converter.evaluation.records import this_machine
from sparsegate.converter.evaluation.recovery_record import RECOVERY

sys.path.insert(0, str(Path(__file__).parents[1]))
from pages.recovery_page import PREDICTORS, PREDICTORS_RECORD, RECORD, RECOVERED, SCRATCH, write_page
from records.folders import RESULTS


def store(out: Path, record: str, report: str) -> None:
    """Keep what a conversion measured."""
    for name, target in ((RECOVERY, record), (REPORT, report)):
        write_json(RESULTS / target, json.loads((out / name).read_text(encoding="utf-8")))


def scratch_runs(work: Path) -> list[dict[str, Any]]:
    """Trainings from scratch: held-out bits per byte by step, and processor seconds as `time` wrote them into the logs
    beside.
    """
    import torch

    runs = []
    for folder in sorted(path for path in work.iterdir() if path.is_dir()):
        name = re.fullmatch(r"(silu|drelu)(\d+)", folder.name)
        if name and (folder / "checkpoint.pt").is_file():
            state = torch.load(folder / "checkpoint.pt", weights_only=True)
            seconds = re.search(r"cpu ([\d.]+)", (work / f"{folder.name}.log").read_text())
            runs.append(
                {
                    "activation": name[1],
                    "seed": int(name[2]),
                    "steps": state["step"],
                    "cpu_seconds": float(seconds[1]) if seconds else None,
                    "curve": state["curve"],
                }
            )
    return runs


def store_scratch(work: Path) -> None:
    """Keep the trainings from scratch."""
    command = "python examples/pretrain.py train --steps N"
    write_json(
        RESULTS / SCRATCH, {"machine": this_machine().model_dump(), "command": command, "runs": scratch_runs(work)}
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Store what is named and write the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, metavar="OUT", help="checkpoint of the recipe turbosparse")
    parser.add_argument("--predictors", type=Path, metavar="OUT", help="checkpoint of turbosparse_predictors")
    parser.add_argument("--scratch", type=Path, metavar="WORK", help="folder of examples/pretrain.py runs")
    options = parser.parse_args(arguments)
    if options.take:
        store(options.take, RECORD, RECOVERED)
    if options.predictors:
        store(options.predictors, PREDICTORS_RECORD, PREDICTORS)
    if options.scratch:
        store_scratch(options.scratch)
    write_page()


if __name__ == "__main__":
    main()

"""A real model, all methods: what each loses at a density.

    python tests/bench/real_model.py MODEL --text FILE --heldout FILE --work WORK [--only METHOD,...]

Every result is a stage below WORK, so the run can be stopped and started again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from real_model_plans import METHODS, Sizes, Study, is_planned, plans, training_of


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a model folder")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to calibrate and train on")
    parser.add_argument("--heldout", type=Path, help="UTF-8 text to measure on; default: the last fifth of --text")
    parser.add_argument("--work", type=Path, required=True, help="where stages are kept")
    parser.add_argument("--only", help="methods, separated by commas; default: all")
    parser.add_argument("--train-minutes", type=float, default=15.0, help="of one core, for each trained method")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    study = Study(Path(args.model), args.text, args.heldout, args.work, Sizes(minutes=args.train_minutes))
    for method in METHODS if args.only is None else args.only.split(","):
        plans(study, method)
        print(f"{method}: planned {is_planned(study, method)}", training_of(study, method) if (study.work / "trained" / method).is_dir() else "", flush=True)


if __name__ == "__main__":
    main()

"""Where the loss of sparse networks sits in a real model: by block, by position, by kind of sparsity; and the
comparison of scores of "Achieving Sparse Activation in Small Language Models" (arXiv 2406.06562) on it.

python tests/bench/benchmarks/fidelity.py MODEL --text FILE [--heldout FILE] [--work WORK] [-o RESULT.json]
[--windows 8] [--few 8] [--short 128] [--minutes M]

MODEL is a folder, or smollm2 as in real_model.py. Nothing is trained: thresholds are quantiles of the calibration text,
equal in all blocks. Every part is a stage below WORK, so the run can be stopped and started again; what is not measured
is named in the result. Writes RESULT.json and, where that is the stored one, docs/fidelity.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from sparsegate.converter import report as reporting
from sparsegate.runtime_onnx.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import smollm2
from benchmarks.fidelity_parts import Bench, compare_scores, measure, stored_scores
from benchmarks.fidelity_summary import summary
from benchmarks.real_model_plans import Sizes, Study
from records.fidelity_results import PLACE, Fidelity, ScoreRow, Scores
from records.real_model_results import TextFile

SCORES = {
    "scores": "--windows 4 --length 128 --scores gate chess abs_z magnitude gxo snip corrected_gxo",
    "answers": "--windows 2 --length 64 --scores gate abs_z corrected_gxo --sparsity 0.5 0.8 --answers 24",
}
"""Arguments of examples/compare_scores.py: all scores that take minutes on text; answers to questions by three of
them.
"""


def result(bench: Bench, origin: str, command: str) -> Fidelity:
    """Everything that is stored."""
    study = bench.study
    calibration, heldout = study.calibration, study.heldout
    hashes = study.text_hashes
    found, missing = summary(bench)
    scores = {name: _scores(bench, name) for name in ("scores", "answers")}
    return Fidelity(
        model=study.name or study.source.name,
        origin=origin,
        fingerprint=study.source.fingerprint,
        length=study.sizes.length,
        calibration=TextFile(
            **hashes["calibration"],
            windows=len(calibration.tokens),
            tokens=calibration.count,
            batches=calibration.sha256,
        ),
        heldout=TextFile(
            **hashes["heldout"], windows=len(heldout.tokens), tokens=heldout.count, batches=heldout.sha256
        ),
        few=bench.few,
        short=bench.short,
        machine=reporting.this_machine(),
        versions=reporting.installed_versions(),
        commit=_commit(),
        date=datetime.now(UTC).date().isoformat(),
        command=command,
        blocks=bench.layers,
        **found,
        **scores,
        missing=missing + [name for name, value in scores.items() if value is None],
    )


def _scores(bench: Bench, name: str) -> Scores | None:
    stored = stored_scores(bench, name) if name in bench.scores else None
    if stored is None:
        return None
    rows = [
        ScoreRow(**{field: row[field] for field in ScoreRow.model_fields if field in row}) for row in stored["rows"]
    ]
    kept = {field: stored[field] for field in ("windows", "length", "tokens", "answers", "text_sha256")}
    return Scores(**kept, command=" ".join(bench.scores[name]), rows=rows)


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or None


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", help=f"a model folder, or {smollm2.NAME}")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to calibrate on")
    parser.add_argument("--heldout", type=Path, help="UTF-8 text to measure on; default: the last fifth of --text")
    parser.add_argument("--work", type=Path, help="where stages are kept; default: MODEL.work")
    parser.add_argument("-o", "--output", type=Path, default=PLACE, help="the JSON to write")
    parser.add_argument("--minutes", type=float, help="begin no other part after so many; default: measure all")
    parser.add_argument(
        "--score-words", default="", help="further arguments of the comparison of scores on text, as one word"
    )
    parser.add_argument("--without-scores", action="store_true", help="leave out the comparison of scores")
    for flag, default, what in (
        ("--length", 256, "tokens of a window"),
        ("--calibration-windows", 32, "windows that thresholds are calibrated on"),
        ("--windows", 8, "held-out windows"),
        ("--few", 8, "of every 8 of them those on which blocks and positions are masked one by one"),
        ("--short", 128, "tokens of those"),
        ("--threads", 2, "of torch"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{what}; default: {default}")
    return parser.parse_args(words)


def run(words: Sequence[str] | None = None) -> Fidelity:
    """The benchmark. Raises InputError for a user's mistake."""
    args = _arguments(words)
    begun = time.monotonic()
    torch.set_num_threads(args.threads)
    work = args.work or Path(f"{Path(args.model).name}.work")
    folder, name, origin = Path(args.model), None, f"the folder {Path(args.model).name}"
    if args.model == smollm2.NAME:
        folder, name, origin = smollm2.make_folder(work), smollm2.MODEL, smollm2.origin()
    sizes = Sizes(length=args.length, calibration=args.calibration_windows, heldout=args.windows)
    study = Study(folder, args.text, args.heldout, work, sizes, name)
    scores = {} if args.without_scores else {key: value.split() for key, value in SCORES.items()}
    if "scores" in scores:
        scores["scores"] += args.score_words.split()
    bench = Bench(study, args.few, args.short, scores)

    def is_over() -> bool:
        return args.minutes is not None and time.monotonic() - begun > 60 * args.minutes

    measure(bench, is_over)
    for part in scores:
        if not is_over():
            compare_scores(bench, part)
    command = f"python tests/bench/benchmarks/fidelity.py {Path(args.model).name} --text {args.text.name}"
    command += f" --heldout {args.heldout.name}" if args.heldout else ""
    command += f" --score-words '{args.score_words}'" if args.score_words else ""
    measured = result(bench, origin, command + f" --windows {args.windows} --few {args.few} --short {args.short}")
    measured.save(args.output)
    said = f"; not measured: {', '.join(measured.missing)}" if measured.missing else ""
    print(f"{args.output}: {len(measured.rows)} rows{said}", flush=True)
    if args.output.resolve() == PLACE:
        from pages.fidelity_page import write_page

        write_page()
    return measured


if __name__ == "__main__":
    try:
        run()
    except InputError as error:
        sys.exit(f"error: {error}")

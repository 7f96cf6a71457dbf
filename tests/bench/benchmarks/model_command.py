"""The command that the benchmarks of a real model share: arguments, their checks, and how a run ends."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import smollm2
from benchmarks.model_study import WindowSizes
from records.model_results import ModelResult
from sparsegate.runtime_onnx.errors import InputError


def new_parser(description: str | None, place: Path, suffix: str = "work") -> argparse.ArgumentParser:
    """MODEL, where its stages are kept, and where the result goes that is stored in `place`."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("model", help=f"a model folder, or {smollm2.NAME}")
    parser.add_argument("--work", type=Path, help=f"where stages are kept; default: MODEL.{suffix}")
    parser.add_argument("-o", "--output", type=Path, default=place, help="the JSON to write")
    parser.set_defaults(suffix=suffix)
    return parser


def add_texts(parser: argparse.ArgumentParser, use: str) -> None:
    """A text to calibrate on and one to measure on."""
    parser.add_argument("--text", type=Path, required=True, help=f"UTF-8 text to {use} on")
    parser.add_argument("--heldout", type=Path, help="UTF-8 text to measure on; default: the last fifth of --text")


def add_numbers(parser: argparse.ArgumentParser, numbers: Iterable[tuple[str, type, Any, str]]) -> None:
    """Flag, type, default and meaning of arguments."""
    for flag, kind, default, what in numbers:
        parser.add_argument(flag, type=kind, default=default, help=f"{what}; default: {default}")


def add_windows(parser: argparse.ArgumentParser, sizes: WindowSizes, threads: int, heldout: str) -> None:
    """Sizes of windows, of which `heldout` says those that are measured on, and threads."""
    numbers = (
        ("--length", int, sizes.length, "tokens of a window"),
        ("--calibration-windows", int, sizes.calibration, "windows that are calibrated on"),
        ("--windows", int, sizes.heldout, heldout),
        ("--threads", int, threads, "of torch, and of every runtime"),
    )
    add_numbers(parser, numbers)


def known_words(text: str, known: Iterable[str], flag: str) -> list[str]:
    """The words of a list with commas. Raises InputError for one that is not known."""
    words = [word for word in text.split(",") if word]
    if strangers := sorted(set(words) - set(known)):
        raise InputError(f"{flag} must name some of {', '.join(known)}, got {', '.join(strangers)}. Correct it.")
    return words


def study_fields(args: argparse.Namespace) -> dict[str, Any]:
    """What MODEL and --work are of a `ModelStudy`: folder, work, name and origin."""
    work = args.work or Path(f"{Path(args.model).name}.{args.suffix}")
    if args.model != smollm2.NAME:
        return {"folder": Path(args.model), "work": work}
    return {
        "folder": smollm2.make_folder(work),
        "work": work,
        "name": smollm2.MODEL,
        "origin": smollm2.origin(),
    }


def command_line(script: str, args: argparse.Namespace, words: Sequence[str]) -> str:
    """The command of a benchmark, without folders."""
    return shlex.join(["python", f"tests/bench/benchmarks/{script}", Path(args.model).name, *words])


def text_words(args: argparse.Namespace) -> list[str]:
    """The arguments of `add_texts`, without folders."""
    return ["--text", args.text.name, *(["--heldout", args.heldout.name] if args.heldout else [])]


def save_result(
    result: ModelResult, what: str, args: argparse.Namespace, place: Path, write: Callable[[], Any]
) -> None:
    """Store a result, and `write` its pages where it is the one that they are made from."""
    result.save(args.output)
    missing = f"; not measured: {', '.join(result.missing)}" if result.missing else ""
    print(f"{args.output}: {what}{missing}", flush=True)
    if args.output.resolve() == place:
        write()


def run_script(run: Callable[[], Any]) -> None:
    """Run a benchmark as a script: a user's mistake is one line."""
    try:
        run()
    except InputError as error:
        sys.exit(f"error: {error}")

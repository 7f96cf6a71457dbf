"""The command line: one file per verb, one row per file. Flags are the parameters of the verb's function; user mistakes
end in one line and status 2.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ...runtime_onnx.errors import InputError, said_by
from ...runtime_onnx.untrusted import printable
from .interruption import Stop, stoppable

if TYPE_CHECKING:
    import typer

VERBS = {
    "convert": (".convert", "Turn a model into a sparse checkpoint with ONNX."),
    "tune": (".tune", "Give a model an activation with exact zeros and recover it by training."),
    "inspect": (".inspect", "Say from headers what can be converted, and what it will need."),
    "generate": (".generate", "Stream a continuation of a prompt."),
    "verify": (".verify", "Check integrity, equality of executors and the quality budget."),
    "eval": (".eval", "Measure quality, answers, realised sparsity and lm-eval tasks of a checkpoint."),
    "bench": (".bench", "Time models or ops against dense ones, back to back."),
    "report": (".report", "Write the HTML report and its pictures again from stored results."),
    "export": (".export", "Write a model with predictors as another system's file: PowerInfer's GGUF."),
    "push": (".push", "Upload a checkpoint to the Hub."),
    "link": (".link", "Put the native library beside the model for genai apps in other languages."),
    "unlink": (".unlink", "Take the native library out again."),
    "doctor": (".doctor", "Print versions, providers, library and CPU features, and what mends what is missing."),
}
_INTERRUPTED = 130
"""What typer turns a KeyboardInterrupt into."""


def _application(argv: list[str]) -> typer.Typer:
    """The typer application; only the verb that is asked for is imported, so that help stays quick."""
    import typer

    application = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Sparse checkpoints for ONNX Runtime.",
    )
    requested = next((word for word in argv if not word.startswith("-")), None)
    for verb, (module, text) in VERBS.items():
        if requested == verb:
            application.command(verb, help=text)(getattr(import_module(module, __name__), verb))
        else:
            application.command(verb, help=text)(lambda: None)
    return application


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exits with 0, 1 (a check that failed), 2 (a user's mistake), or 128 and the number of the
    signal that ended it.
    """
    with stoppable() as stop:  # before anything that takes time is imported
        try:
            code = _run(sys.argv[1:] if argv is None else argv, stop)
        except KeyboardInterrupt:
            code = _INTERRUPTED
        if code == _INTERRUPTED:
            stop.tell()
            code = stop.status
        sys.exit(code)


def _run(argv: list[str], stop: Stop) -> int:
    """The exit status of a command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("sparsegate").setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import typer.main

    from ..checkpoint.stage import CheckError, disk_full, is_disk_full

    try:
        application = _application(argv)
        code = typer.main.get_command(application).main(argv, prog_name="sparsegate", standalone_mode=False)
    except Exception as error:
        if stop.since is not None:  # whatever a library made of the interruption
            return _INTERRUPTED
        if isinstance(error, InputError):
            return _told(str(error), 1 if isinstance(error, CheckError) else 2)
        if is_disk_full(error):  # of whichever library wrote
            name = getattr(error, "filename", None)
            return _told(str(disk_full(Path(name if isinstance(name, str) else "OUT"))))
        if isinstance(error, OSError):
            return _told(f"The system refused: {error}. Check the path and its permissions.")
        if (line := _foreign(error)) is not None:
            logging.getLogger("sparsegate").debug("The error in full:", exc_info=error)
            return _told(line)
        if type(error).__module__.split(".")[0] not in ("typer", "click"):
            raise
        if type(error).__name__ == "Abort":
            return _INTERRUPTED
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        return int(getattr(error, "exit_code", 2))
    return code if isinstance(code, int) else 0


_LIBRARIES = {
    "onnxruntime": "ONNX Runtime",
    "onnxruntime_genai": "onnxruntime-genai",
    "safetensors": "safetensors",
    "safetensors_rust": "safetensors",
}
_NO_MEMORY = ("DefaultCPUAllocator", "bad allocation", "std::bad_alloc", "out of memory", "Failed to allocate memory")


def _foreign(error: BaseException) -> str | None:
    """The line for what a library or Python says of data that no reader refused: too large, too deep, or not readable.
    None for a defect of ours.
    """
    if isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY):
        return (
            f"The work must fit into memory, got: {said_by(error)}. Take a smaller model, text or number, or a "
            "machine with more memory."
        )
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # pathlib's before Python 3.13
        return f"A path must lead to a file or folder, got a link to itself: {said_by(error)}. Remove the link."
    if isinstance(error, RecursionError):
        return "Values must not lie so deep inside one another, got a file or a text that does. Take another one."
    if isinstance(error, UnicodeError):
        return f"Names and texts must be UTF-8, got others: {said_by(error)}. Rename the file or correct the text."
    if (library := _LIBRARIES.get(type(error).__module__.split(".")[0])) is not None:
        return f"{library} must be able to read the files, got: {said_by(error)}. Fetch or convert the folder again."
    return None


def _told(text: str, status: int = 2) -> int:
    line = " ".join(part.strip() for part in text.splitlines())
    print(f"sparsegate: {printable(line)}", file=sys.stderr)
    return status

"""The command line: one file per verb, one row per file. Flags are the parameters of the verb's function; user mistakes end in one line and status 1."""

from __future__ import annotations

import dis
import logging
import os
import sys
from importlib import import_module

import typer
import typer.main

VERBS = {
    "convert": (".convert", "Turn a model into a sparse checkpoint with ONNX."),
    "tune": (".tune", "Give a model an activation with exact zeros and recover it by training."),
    "inspect": (".inspect", "Say from headers what can be converted, and what it will need."),
    "generate": (".generate", "Stream a continuation of a prompt."),
    "verify": (".verify", "Check integrity, equality of executors and the quality budget."),
    "eval": (".eval", "Measure quality, answers, realised sparsity and lm-eval tasks of a checkpoint."),
    "bench": (".bench", "Time models or ops against dense ones, back to back."),
    "report": (".report", "Write the HTML report and its pictures again from stored results."),
    "push": (".push", "Upload a checkpoint to the Hub."),
    "link": (".link", "Put the native library beside the model for genai apps in other languages."),
    "unlink": (".unlink", "Take the native library out again."),
    "doctor": (".doctor", "Print versions, providers, library and CPU features, and what mends what is missing."),
}
_INTERRUPTED = 130
_GO_ON = "Interrupted. Run the same command again to go on from the finished stages."


def _application(argv: list[str]) -> typer.Typer:
    """The typer application; only the verb that is asked for is imported, so that help stays quick."""
    application = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Sparse checkpoints for ONNX Runtime.")
    asked = next((word for word in argv if not word.startswith("-")), None)
    for verb, (module, text) in VERBS.items():
        if asked == verb:
            application.command(verb, help=text)(getattr(import_module(module, __name__), verb))
        else:
            application.command(verb, help=text)(lambda: None)
    return application


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exits with 0, 1 (a user's mistake or a failed check), 2 (usage) or 130 (interrupted)."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("sparsegate").setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from ..artifact import disk_full, is_disk_full

    try:
        application = _application(argv)
        code = typer.main.get_command(application).main(argv, prog_name="sparsegate", standalone_mode=False)
    except KeyboardInterrupt:
        _end(_GO_ON, _INTERRUPTED)
    except ValueError as error:
        if not _is_ours(error):
            raise
        _end(str(error), 1)
    except OSError as error:
        from pathlib import Path

        _end(str(disk_full(Path.cwd() / "out")) if is_disk_full(error) else f"The system refused: {error}. Check the path and its permissions.", 1)
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("typer", "click"):
            raise
        if type(error).__name__ == "Abort":
            _end(_GO_ON, _INTERRUPTED)
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))
    if code == _INTERRUPTED:  # what typer turns a KeyboardInterrupt into
        _end(_GO_ON, _INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _is_ours(error: BaseException) -> bool:
    """Whether a `raise` in sparsegate made the error, which then speaks to the user; any other one is a defect and keeps its traceback."""
    last = error.__traceback__
    while last and last.tb_next:
        last = last.tb_next
    if last is None or not str(last.tb_frame.f_globals.get("__name__", "")).startswith("sparsegate."):
        return False
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"  # not int("x") or an unpacking that failed in our code


def _end(text: str, code: int) -> None:
    line = " ".join(part.strip() for part in text.splitlines())
    print(f"sparsegate: {line}" if code != _INTERRUPTED else line, file=sys.stderr)
    sys.exit(code)

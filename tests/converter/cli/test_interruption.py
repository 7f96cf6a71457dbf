"""Signals end the command line in one line, with 128 and the signal's number, at every moment of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import start
from small_recipe import small_recipe

from sparsegate.converter.cli.interruption import GO_ON

SIGNALS = {"SIGINT": "Interrupted", "SIGTERM": "Terminated", "SIGHUP": "Hung up"}
LONG = {"steps": 100000, "data": 16, "windows": 2, "precision": "fp32"}
_AT_IMPORT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # as on a terminal, whatever the caller ignores
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
def hook(event, arguments):
    if event == "import" and arguments[0] == {module!r}:
        os.kill(os.getpid(), signal.{name})
from sparsegate.converter.cli import main
sys.addaudithook(hook)
main({arguments!r})
"""


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_leaves_nothing_half_written_and_says_so(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = small_recipe(
        tiny_model("llama"), tmp_path, stages=[{"method": "predictor", "config": {"sparsity": 0.4, "tune": LONG}}]
    )
    child = start(tmp_path, "convert", "--recipe", recipe, "-o", tmp_path / "out", "--quiet")
    finished = tmp_path / "out.work" / "stats" / "layers.1.ffn"
    end = time.monotonic() + 120
    while not finished.exists() and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.3)
    child.kill(getattr(signal, name))
    assert child.wait() == 128 + getattr(signal, name), child.text
    assert child.text == f"{SIGNALS[name]}. {GO_ON}\n"
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.partial-*")) and finished.exists()


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("module", ["typer", "pydantic", "torch"])
def test_a_signal_while_modules_are_imported(module: str, name: str, tmp_path: Path) -> None:
    """The first moments of a command are spent there."""
    code = _AT_IMPORT.format(module=module, name=name, arguments=["inspect", str(tmp_path)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 128 + getattr(signal, name), done.stderr
    assert done.stderr == f"{SIGNALS[name]}. {GO_ON}\n" and done.stdout == ""


def test_nothing_that_takes_time_is_imported_before_signals_are_met() -> None:
    code = (
        "import sys, sparsegate.converter.cli; sys.stdout.write(repr(sorted({name.split('.')[0] for name in "
        "sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert not {"typer", "click", "pydantic", "torch", "numpy", "transformers"} & set(eval(done.stdout))


def ignoring(out: str) -> int:
    """A command whose caller ignores hangups, as nohup does."""
    from sparsegate.converter.cli.interruption import stoppable

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stoppable() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.since is None
        before = time.monotonic()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            assert stop.number == signal.SIGTERM and time.monotonic() - before < 5
        os.kill(os.getpid(), signal.SIGTERM)  # the same once more
        time.sleep(1.2)
        os.kill(os.getpid(), signal.SIGINT)  # a person who does not want to wait
        time.sleep(5)
    return 3


def test_a_signal_that_comes_twice_and_one_that_is_ignored(tmp_path: Path) -> None:
    child = start(tmp_path, tmp_path, call=f"{__file__}:ignoring")
    assert child.wait() == 128 + signal.SIGINT, child.text
    assert child.text == f"Interrupted. {GO_ON}\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "nothing stays behind in a process that calls main"

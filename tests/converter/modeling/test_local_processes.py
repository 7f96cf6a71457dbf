"""Processes of this machine: how many, what they are given, and what becomes of their errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sparsegate.converter.modeling import processes as local_processes
from sparsegate.converter.modeling.distributed import sum_over_processes, world
from sparsegate.converter.modeling.processes import cores, run_in_processes
from sparsegate.converter.training.settings import Recovery, count_for
from sparsegate.runtime_onnx.errors import InputError


@pytest.mark.parametrize(
    ("asked", "windows", "steps", "parameters", "available", "count"),
    [
        ("auto", 8, 1000, 2_000_000, 2, 2),
        ("auto", 8, 1000, 2_000_000, 3, 2),
        ("auto", 6, 1000, 2_000_000, 8, 6),
        ("auto", 5, 1000, 2_000_000, 4, 1),
        ("auto", 8, 1000, 2_000_000, 1, 1),
        ("auto", 8, 1000, 1_000_000_000, 8, 1),
        ("auto", 8, 10, 2_000_000, 8, 1),
        (3, 8, 10, 1_000_000_000, 1, 3),
    ],
)
def test_how_many(asked: int | str, windows: int, steps: int, parameters: int, available: int, count: int) -> None:
    recovery = Recovery.model_validate({"processes": asked, "windows": windows, "steps": steps})
    assert count_for(recovery, parameters, available) == count
    assert count_for(recovery.model_copy(update={"end_to_end": False}), parameters, available) == 1


def note(folder: str, word: str) -> None:
    """What a process sees."""
    found = sum_over_processes(torch.tensor(world().rank + 1))
    threads = os.environ["OMP_NUM_THREADS"]  # torch itself takes no more than there are cores
    Path(folder, f"{world().rank}").write_text(f"{world().size} {int(found)} {threads} {word}", encoding="utf-8")


def refuse(rank: str) -> None:
    """One process refuses while the others wait for it."""
    if world().rank == int(rank):
        raise InputError(f"It must be well, got process {rank}. Mend it.")
    sum_over_processes(torch.zeros(1))


def end() -> None:
    """The last process ends without a word while the others go on for long."""
    if world().rank == world().size - 1:
        os._exit(7)
    time.sleep(600)


def killed() -> None:
    """As by a system that is short of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(folder: str) -> None:
    """For much longer than the caller lives."""
    partial = Path(folder).parent / f"sleep.{world().rank}"
    partial.write_text(str(os.getpid()))
    partial.replace(Path(folder) / f"{world().rank}")
    time.sleep(600)


def alive(number: int) -> bool:
    """Whether there is a process of that number that has not ended."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep
    )  # of the caller that is a process itself


def test_each_is_called_and_all_belong_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_processes, "cores", lambda: 6)
    monkeypatch.setenv(
        "TORCHELASTIC_USE_AGENT_STORE", "True"
    )  # of a torchrun that this is a process of: its store is not theirs
    run_in_processes(2, note, tmp_path, "two words")
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["2 3 3 two words"] * 2


@pytest.mark.slow
def test_modules_in_the_working_folder_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    run_in_processes(1, note, tmp_path, "")
    assert (tmp_path / "0").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_a_refusal_ends_all(rank: str) -> None:
    with pytest.raises(InputError, match=rf"^It must be well, got process {rank}\. Mend it\.$"):
        run_in_processes(2, refuse, rank)


@pytest.mark.slow
def test_a_system_s_refusal_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^The system refused: .*nowhere.* Check the path and its permissions\.$"):
        run_in_processes(1, note, tmp_path / "nowhere", "")


@pytest.mark.slow
def test_a_process_that_ends_otherwise_ends_all() -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="got 7"):
        run_in_processes(2, end)
    with pytest.raises(InputError, match="got SIGKILL, as when memory is short"):
        run_in_processes(2, killed)
    assert time.monotonic() - began < 300


@pytest.mark.slow
def test_none_outlives_the_caller(tmp_path: Path) -> None:
    said = f"from test_local_processes import sleep, run_in_processes; run_in_processes(2, sleep, {str(tmp_path)!r})"
    caller = subprocess.Popen([sys.executable, "-c", said], env=os.environ)
    deadline = time.monotonic() + 200
    while len(list(tmp_path.iterdir())) < 2:
        assert caller.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    caller.kill()
    caller.wait()
    numbers = [int(path.read_text()) for path in tmp_path.iterdir()]
    while any(alive(number) for number in numbers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("affinity", "quota", "threads", "found"),
    [
        (8, None, None, 8),
        (8, "max 100000", None, 8),
        (8, "250000 100000", None, 2),
        (8, "10000 100000", None, 1),
        (8, None, "3", 3),
        (2, None, "6", 2),
    ],
)
def test_cores(
    affinity: int, quota: str | None, threads: str | None, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    monkeypatch.setattr(local_processes, "_QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert cores() == found

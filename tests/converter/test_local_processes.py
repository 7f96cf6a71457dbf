"""Processes of this machine: how many, what they are given, and what becomes of their errors."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from sparsegate.converter.artifact import InputError
from sparsegate.converter.distributed import sum_over_processes, world
from sparsegate.converter.local_processes import cores, count_for, run_in_processes


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
    assert count_for(asked, windows, steps, parameters, available) == count


def note(folder: str, word: str) -> None:
    """What a process sees."""
    found = sum_over_processes(torch.tensor(world().rank + 1))
    Path(folder, f"{world().rank}").write_text(f"{world().size} {int(found)} {torch.get_num_threads()} {word}", encoding="utf-8")


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


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)


def test_each_is_called_and_all_belong_together(tmp_path: Path) -> None:
    run_in_processes(2, note, tmp_path, "two words")
    share = max(1, cores() // 2)
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == [f"2 3 {share} two words"] * 2


def test_modules_in_the_working_folder_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    run_in_processes(1, note, tmp_path, "")
    assert (tmp_path / "0").is_file()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_refusal_ends_all(rank: str) -> None:
    with pytest.raises(InputError, match=rf"^It must be well, got process {rank}\. Mend it\.$"):
        run_in_processes(2, refuse, rank)


def test_a_process_that_ends_otherwise_ends_all() -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="got 7"):
        run_in_processes(2, end)
    assert time.monotonic() - began < 300

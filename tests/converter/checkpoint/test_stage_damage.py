"""Finished stages that were damaged since, and runs that were killed: what is published in the end is what an
undisturbed run makes.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forks import changes, start
from small_recipe import small_recipe

from sparsegate.converter.checkpoint.stage import (
    HEADER,
    RECORD,
    Header,
    atomic_folder,
    is_finished,
    is_intact,
    leave_out,
    read_header,
    write_header,
)
from sparsegate.converter.pipeline import candidates, finish
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.tune import tune
from sparsegate.converter.training import end_to_end
from sparsegate.runtime_onnx.untrusted import read_json

DAMAGES = ("flip", "truncate", "delete", "empty")
TUNE = {
    "data": {"windows": 12, "length": 32},
    "windows": 2,
    "accumulate": 2,
    "steps": 6,
    "precision": "fp32",
    "processes": 1,
}


@pytest.fixture(autouse=True)
def _no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_speed", lambda base, onnx, texts: {})


def damage(path: Path, kind: str, drawn: random.Random) -> None:
    """Flip a bit of a file, cut it, empty it or delete it; its inode may be shared, so it is made anew first."""
    data = bytearray(path.read_bytes())
    path.unlink()
    if kind == "delete":
        return
    if kind == "flip":
        data[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
    path.write_bytes(data if kind == "flip" else data[: drawn.randrange(len(data)) if kind == "truncate" else 0])


def published(out: Path) -> dict[str, bytes]:
    """What is the same in every run: all but reports, which hold times."""
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    return {name: data for name, data in files.items() if not name.startswith(("report", "README.md", "manifest.json"))}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["a", "deep/b", HEADER])
def test_a_damaged_stage_is_not_finished(
    kind: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    header, stage = Header(format="plan", seed=3), tmp_path / "stage"
    with atomic_folder(stage) as partial:
        (partial / "deep").mkdir()
        for each in ("a", "deep/b"):
            (partial / each).write_bytes(bytes(range(256)))
        write_header(partial, header)
    assert is_finished(stage, header) and not is_finished(stage, Header(format="plan", seed=4)) and not caplog.messages
    (stage / "more").write_text("does not matter")
    assert is_finished(stage, header)
    for seed in range(20):
        other = shutil.copytree(stage, tmp_path / f"{seed}")
        caplog.clear()
        damage(other / name, kind, random.Random(seed))
        with caplog.at_level(logging.WARNING, logger="sparsegate"):
            assert not is_finished(other, header)
        assert len(caplog.messages) == 1 and f"{other} is made again: " in caplog.messages[0], caplog.messages
        assert name.split("/")[-1] in caplog.messages[0]


def test_files_that_are_left_out_are_no_damage(tmp_path: Path) -> None:
    header = Header(format="stats")
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    write_header(tmp_path, header)
    leave_out(tmp_path, ["a"])
    assert is_finished(tmp_path, header) and sorted(path.name for path in tmp_path.iterdir()) == ["b", HEADER]
    (tmp_path / "b").unlink()
    assert not is_intact(tmp_path)


def damaged_conversions(
    tiny_model: Callable[[str], Path], folder: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """So many conversions that find one of their stages' files damaged; returns what the log said of each."""
    stages = [
        {
            "method": "auto",
            "config": {"sparsity": 0.4, "tune": {"steps": 3, "data": 16, "windows": 2, "precision": "fp32"}},
        }
    ]
    recipe = small_recipe(tiny_model("llama"), folder, stages=stages, export={"precision": "int8"})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finish, "write_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        convert(recipe=recipe, output=folder / "out")
    whole = (folder / "out.work").rename(folder / "whole.work")
    expected = published(convert_again(recipe, folder, whole, None, "", random.Random()))
    files = sorted(
        path.relative_to(whole)
        for path in whole.rglob("*")
        if path.is_file() and path.name != RECORD and "samples" not in path.name
    )
    said, drawn = [], random.Random(5)
    for number in range(count):
        log = _Lines()
        logging.getLogger("sparsegate").addHandler(log)
        try:
            out = convert_again(recipe, folder, whole, drawn.choice(files), DAMAGES[number % len(DAMAGES)], drawn)
        finally:
            logging.getLogger("sparsegate").removeHandler(log)
        assert published(out) == expected
        said += [line for line in log.lines if "is made again" in line]
    return said


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def convert_again(recipe: Path, folder: Path, whole: Path, file: Path | None, kind: str, drawn: random.Random) -> Path:
    """OUT of a conversion that finds finished stages with one damaged file."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.rmtree(folder / "out.work", ignore_errors=True)
    shutil.copytree(whole, folder / "out.work")
    if file is not None:
        damage(folder / "out.work" / file, kind, drawn)
    return convert(recipe=recipe, output=folder / "out").folder


def test_damaged_stages_are_made_again(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert damaged_conversions(tiny_model, tmp_path, 4, monkeypatch)


@pytest.mark.slow
def test_damaged_stages_are_made_again_many_times(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(damaged_conversions(tiny_model, tmp_path, 50, monkeypatch)) > 25


def tune_recipe(folder: Path, model: Path) -> Path:
    """A small training stage for `tune`."""
    return small_recipe(model, folder, stages=[{"method": "exact", "config": {"activation": "drelu"}, "tune": TUNE}])


@pytest.mark.parametrize(
    "name",
    [
        "state/training.safetensors",
        "heldout",
        pytest.param("state/training.json", marks=pytest.mark.slow),
        pytest.param("heldout/heldout.json", marks=pytest.mark.slow),
        pytest.param("generated/tokens.safetensors", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_training_does_not_go_on_from_damage(
    name: str,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = tune_recipe(tmp_path, tiny_model("llama"))
    whole = tune(recipe=str(recipe), output=tmp_path / "whole")
    steps: list[int] = []

    def interrupted(self: Any, step: int, plain: Any = end_to_end.RecoveryObjective.after) -> Any:
        steps.append(step)
        if step == 4:
            raise KeyboardInterrupt
        return plain(self, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            end_to_end,
            "settings_of",
            lambda asked, seed, plain=end_to_end.settings_of: _saving(plain(asked, seed)),
        )
        patch.setattr(end_to_end.RecoveryObjective, "after", interrupted)
        tune(recipe=str(recipe), output=tmp_path / "out")
    stage = tmp_path / "out.work" / "stage_0"
    assert read_json(stage / "state" / "training.json", "")["step"] == 3 and read_header(stage / "heldout")
    if name == "heldout":
        shutil.rmtree(stage / name)
    else:
        damage(stage / name, "flip", random.Random(7))
    steps.clear()
    with caplog.at_level(logging.WARNING, logger="sparsegate"), monkeypatch.context() as patch:
        plain = end_to_end.RecoveryObjective.after
        patch.setattr(end_to_end.RecoveryObjective, "after", lambda self, step: steps.append(step) or plain(self, step))
        found = tune(recipe=str(recipe), output=tmp_path / "out")
    assert steps == list(range(6)) or (name.startswith("generated") and steps == [3, 4, 5])
    assert name == "heldout" or "is made again" in caplog.text
    assert published(tmp_path / "out") == published(tmp_path / "whole")
    assert [(row.step, row.nll) for row in found.record.heldout] == [
        (row.step, row.nll) for row in whole.record.heldout
    ]


def _saving(settings: Any) -> Any:
    """Settings that store the state every third step."""
    return replace(settings, save_every=3)


def killed(verb: str, recipe: Path, folder: Path, points: int) -> None:
    """Runs that are killed at so many points spread over what they do to the disk, and then run to their end."""
    folder.mkdir()
    whole = start(folder, verb, "--recipe", recipe, "-o", folder / "whole", "--quiet", name="whole-said")
    assert whole.wait() == 0, whole.text
    count, expected = changes(whole), published(folder / "whole")
    assert count > 100
    for point in range(points):
        out = folder / f"out{point}"
        first = start(
            folder,
            verb,
            "--recipe",
            recipe,
            "-o",
            out,
            "--quiet",
            kill_at=1 + count * (2 * point + 1) // (2 * points),
            name=f"first{point}",
        )
        assert first.wait() == -9, first.text
        if out.exists():
            assert published(out) == expected, "what appears is whole"
        again = start(folder, verb, "--recipe", recipe, "-o", out, "--quiet", name=f"again{point}")
        done = again.wait()
        assert done == 0 or (verb == "tune" and "OUT must be a new folder" in again.text), again.text
        assert published(out) == expected
        left = [path.name for path in folder.iterdir() if path.name.startswith(f"{out.name}.")]
        assert not left or (verb == "tune" and done and left == [f"{out.name}.work"]), left
        shutil.rmtree(out)


@pytest.mark.parametrize("verb", ["convert", pytest.param("tune", marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_an_undisturbed_one(verb: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    killed(
        verb,
        small_recipe(tiny_model("llama"), tmp_path)
        if verb == "convert"
        else tune_recipe(tmp_path, tiny_model("llama")),
        tmp_path / verb,
        2,
    )


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["convert", "tune"])
def test_runs_killed_at_thirty_points_end_as_undisturbed_ones(
    verb: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    killed(
        verb,
        small_recipe(tiny_model("llama"), tmp_path)
        if verb == "convert"
        else tune_recipe(tmp_path, tiny_model("llama")),
        tmp_path / verb,
        30,
    )


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_every_file_has_the_mode_that_the_umask_says(
    mask: int, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Case 6."""
    before = os.umask(mask)
    try:
        recipe = small_recipe(tiny_model("llama"), tmp_path, export={"precision": "int8"})
        convert(recipe=recipe, output=tmp_path / "out", keep_stages=True)
    finally:
        os.umask(before)
    for path in (
        tmp_path / "out",
        *(tmp_path / "out").rglob("*"),
        tmp_path / "out.work",
        *(tmp_path / "out.work").rglob("*"),
    ):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path

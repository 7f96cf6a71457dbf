"""OUT.work and the folders on the way to OUT: what is not ours is never removed, and one process at a time writes
there.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import start
from models import TEXT
from small_recipe import call_cli, small_recipe

from sparsegate.converter.checkpoint import work_folder
from sparsegate.converter.checkpoint.stage import HEADER, RECORD, Header, atomic_folder, write_header, write_json
from sparsegate.converter.checkpoint.work_folder import ENTRIES, claimed, remove
from sparsegate.converter.pipeline import candidates, finish
from sparsegate.converter.pipeline import convert as conversion
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.tune import tune
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.untrusted import read_json

FLAGS = ("--method", "gate", "--sparsity", "0.5")


@pytest.fixture(autouse=True)
def _no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_speed", lambda base, onnx, texts: {})


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, and every folder and link."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str | Path) -> str:
    """The one line with which a command is refused that changes nothing in `folder`."""
    before = content(folder)
    done = call_cli(capsys, *arguments)
    assert done.status == 2 and done.out == "" and done.err.startswith("sparsegate: ") and done.err.count("\n") == 1, (
        done
    )
    assert content(folder) == before
    return done.err


@pytest.mark.parametrize("verb", ["convert", "tune"])
def test_a_model_that_lies_where_the_stages_would_is_refused(
    verb: str, tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Case 1: the model lies in llama.work, with a note."""
    flags = FLAGS if verb == "convert" else ()
    model = shutil.copytree(tiny_model("llama"), tmp_path / "llama.work")
    (model / "notes.txt").write_text("mine")
    line = refused(capsys, tmp_path, verb, model, "-o", tmp_path / "llama", *flags)
    assert "MODEL must lie outside" in line and "Choose another -o" in line
    inside = shutil.copytree(tiny_model("llama"), tmp_path / "out.work" / "deep" / "model")
    assert "MODEL must lie outside" in refused(capsys, tmp_path, verb, inside, "-o", tmp_path / "out", *flags)
    (tmp_path / "alias").symlink_to(inside)
    assert "MODEL must lie outside" in refused(
        capsys, tmp_path, verb, tmp_path / "alias", "-o", tmp_path / "out", *flags
    )


def test_what_a_conversion_reads_is_never_below_its_work_folder(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, work = tiny_model("llama"), tmp_path / "out.work"
    with claimed(tmp_path / "out"):
        (work / "plan").mkdir()  # one of ours, of an earlier run
    (work / "text.txt").write_text(TEXT * 20)
    assert "The calibration text must lie outside" in refused(
        capsys, tmp_path, "convert", model, "-o", tmp_path / "out", *FLAGS, "--calibration", work / "text.txt"
    )
    recipe = small_recipe(model, work)
    assert "The recipe must lie outside" in refused(
        capsys, tmp_path, "convert", "--recipe", recipe, "-o", tmp_path / "out"
    )
    line = refused(capsys, tmp_path, "tune", model, "--data", work / "text.txt", "-o", tmp_path / "out")
    assert "The training text must lie outside" in line
    linked = shutil.copytree(model, tmp_path / "linked")
    shutil.move(linked / "model.safetensors", work / "model.safetensors")
    (linked / "model.safetensors").symlink_to(work / "model.safetensors")
    assert "MODEL must lie outside" in refused(capsys, tmp_path, "convert", linked, "-o", tmp_path / "out", *FLAGS)


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("kind", ["folder", "stage names", "file", "link", "link to nothing", "newer"])
def test_another_folder_of_the_same_name_is_refused(
    kind: str, dry: bool, tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Case 1: an unrelated out.work."""
    work = tmp_path / "out.work"
    if kind in ("folder", "stage names"):
        (work / "plan").mkdir(parents=True)
        (work / ("thesis.txt" if kind == "folder" else "plan/thesis.txt")).write_text("mine")
    elif kind == "file":
        work.write_text("mine")
    elif kind == "newer":
        work.mkdir()
        write_json(work / RECORD, {"kind": "sparsegate folder", "version": 2})
    else:
        if kind == "link":
            (tmp_path / "elsewhere").mkdir()
        work.symlink_to(tmp_path / "elsewhere")
    line = refused(
        capsys,
        tmp_path,
        "convert",
        tiny_model("llama"),
        "-o",
        tmp_path / "out",
        *FLAGS,
        *(["--dry-run"] if dry else []),
    )
    assert "out.work must be free for the stages" in line and "Choose another -o, or move it away." in line


def test_neighbours_survive_a_conversion(
    tiny_model: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Case 1: an unrelated out.partial-mine; and what a person puts into the work folder of an earlier run."""
    others = {
        "out.partial-mine/thesis.txt",
        "out.partial-0123abcd/thesis.txt",
        "out.partial-7/thesis.txt",
        "out.work/notes.txt",
        "out.work/plan.txt",
    }
    with claimed(tmp_path / "out"):
        (tmp_path / "out.work" / "stats").mkdir()
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    recipe = small_recipe(tiny_model("llama"), tmp_path)
    with caplog.at_level(logging.WARNING, logger="sparsegate"):
        out = convert(recipe=recipe, output=tmp_path / "out").folder
    assert all((tmp_path / name).read_text() == "mine" for name in others)
    assert sorted(path.name for path in (tmp_path / "out.work").iterdir()) == ["notes.txt", "plan.txt"]
    assert "is left where it is: it holds notes.txt, plan.txt, which sparsegate did not make" in caplog.text
    assert not (out / RECORD).exists() and not (out / HEADER).exists()
    assert convert(recipe=recipe, output=out).up_to_date, (
        "a foreign work folder does not stand in the way of what is there"
    )


def test_a_replaced_folder_is_ours(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a").write_text("mine")
    for new in (False, True):
        with pytest.raises(InputError, match="mine must be"), atomic_folder(mine, new):
            raise AssertionError
    stage = tmp_path / "stage"
    for text in ("one", "two"):
        with atomic_folder(stage) as partial:
            (partial / "a").write_text(text)
            write_header(partial, Header(format="plan"))
    assert (stage / "a").read_text() == "two"
    with pytest.raises(InputError, match="stage must be a new folder"), atomic_folder(stage, new=True):
        raise AssertionError
    late = tmp_path / "late"
    with pytest.raises(InputError, match="late must be a new folder"), atomic_folder(late, new=True) as partial:
        late.mkdir()
    with claimed(tmp_path / "out") as work:
        (work / "plan").mkdir()
        (work / "plan" / "half").write_text("a stage whose header is gone")
        with atomic_folder(work / "plan") as partial:
            (partial / "whole").write_text("")
        assert [path.name for path in (work / "plan").iterdir()] == ["whole"]
        remove(work)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late", "mine", "stage"]


def test_stages_of_a_version_without_records_are_made_again(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing tells whether they are whole."""
    recipe, out = small_recipe(tiny_model("llama"), tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finish, "write_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        convert(recipe=recipe, output=out)
    (tmp_path / "out.work" / RECORD).unlink()
    for path in (tmp_path / "out.work").rglob(HEADER):
        write_json(path, {name: value for name, value in read_json(path, "").items() if name not in ("files", "seal")})
    with caplog.at_level(logging.WARNING, logger="sparsegate"):
        assert not convert(recipe=recipe, output=out).up_to_date
    for stage in ("plan/gate", "base", "checkpoint/gate", "onnx/gate"):
        assert (
            f"out.work/{stage} is made again: it was finished by an earlier sparsegate, which kept no hashes."
            in caplog.text
        )
    assert not (tmp_path / "out.work").exists()


def test_every_stage_has_a_row(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its folder would be left behind."""
    seen: set[str] = set()
    monkeypatch.setattr(
        conversion, "remove", lambda work: seen.update(path.name for path in work.iterdir()) or remove(work)
    )
    convert(recipe=small_recipe(tiny_model("llama"), tmp_path, export={"precision": "int8"}), output=tmp_path / "out")
    assert seen - {RECORD} <= set(ENTRIES) and len(seen) > 9
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("command", [convert, tune])
def test_an_output_that_cannot_appear_is_refused_at_once(
    command: Callable[..., object], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    before = content(tmp_path)
    with pytest.raises(
        InputError,
        match=r"OUT must be a new folder, got .*gone, a link to .*nowhere, which is not there\. Remove the link",
    ):
        command(str(tiny_model("llama")), tmp_path / "gone")
    with pytest.raises(
        InputError, match=r"OUT must lie in a folder, got .*out in .*file, which is none\. Choose another -o"
    ):
        command(str(tiny_model("llama")), tmp_path / "file" / "deep" / "out")
    assert content(tmp_path) == before


def test_a_dry_run_writes_nothing(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = small_recipe(tiny_model("llama"), tmp_path)
    before = content(tmp_path)
    convert(recipe=recipe, output=tmp_path / "out", dry_run=True)
    assert content(tmp_path) == before


def test_a_refused_conversion_leaves_no_work_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        convert(str(tmp_path / "no" / "model"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_leftover_of_a_finished_conversion_goes(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was killed while it removed its stages, or before."""
    recipe, out = small_recipe(tiny_model("llama"), tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(conversion, "remove", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        convert(recipe=recipe, output=out)
    assert (tmp_path / "out.work" / "plan").is_dir()
    assert convert(recipe=recipe, output=out, keep_stages=True).up_to_date and (tmp_path / "out.work" / "plan").is_dir()

    def killed(path: Path, *arguments: object, **flags: object) -> None:
        if "out.work" in str(path):
            raise KeyboardInterrupt
        plain(path, *arguments, **flags)  # type: ignore[arg-type]

    plain = shutil.rmtree
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(work_folder.shutil, "rmtree", killed)
        convert(recipe=recipe, output=out)
    shutil.rmtree(tmp_path / "out.work" / "checkpoint")
    shutil.rmtree(tmp_path / "out.work" / "onnx")
    shell, mine = (
        tmp_path / "out.partial-99999999",
        tmp_path / "out.partial-mine",
    )  # where OUT was renamed from, and a person's
    for folder in (shell, mine):
        (folder / "kept").mkdir(parents=True)
    write_json(shell / RECORD, {"kind": "sparsegate folder", "process": 1 << 30, "host": "gone", "since": "then"})
    assert convert(recipe=recipe, output=out).up_to_date and not (tmp_path / "out.work").exists()
    assert not shell.exists() and (mine / "kept").is_dir()


def hold(out: str) -> int:
    """Claim the work folder of OUT and wait."""
    with claimed(Path(out)) as work:
        (work / "plan").mkdir()
        sys.stderr.write("held\n")
        time.sleep(120)
    return 0


def test_a_second_conversion_is_refused_while_the_first_one_lives(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(tmp_path, tmp_path / "out", call=f"{__file__}:hold")
    first.until("held")
    for verb, flags in (("convert", FLAGS), ("tune", ())):
        line = refused(capsys, tmp_path, verb, tiny_model("llama"), "-o", tmp_path / "out", *flags)
        assert (
            f"another conversion that is writing {tmp_path / 'out'} (process {first.process} on host " in line
            and " since 2" in line
        ), line
    first.kill()
    assert first.wait() == -signal.SIGKILL and (tmp_path / "out.work" / "plan").is_dir()
    with claimed(tmp_path / "out") as work:
        assert os.path.samefile(work, tmp_path / "out.work"), "the lock died with its process"


def write(target: str, number: str) -> int:
    """One of several processes that write the same folder."""
    for _ in range(20):
        with atomic_folder(Path(target)) as partial:
            for name in ("a", "b", "c"):
                (partial / name).write_text(number)
            write_header(partial, Header(format="plan", seed=int(number)))
    return 0


def race(folder: Path) -> None:
    """Three processes write one folder: it is always one of theirs, whole."""
    folder.mkdir()
    racing = [
        start(folder, folder / "out", number, call=f"{__file__}:write", name=f"said{number}") for number in range(3)
    ]
    assert [one.wait() for one in racing] == [0, 0, 0], [one.text for one in racing]
    assert len({(folder / "out" / name).read_text() for name in ("a", "b", "c")}) == 1
    assert not list(folder.glob("*partial*"))


def race_of_conversions(folder: Path, recipe: Path, reference: dict[str, bytes | None]) -> None:
    """Three conversions to one OUT at the same moment: one makes it, and the others are refused in one line or find it
    up to date.
    """
    folder.mkdir()
    racing = [
        start(folder, "convert", "--recipe", recipe, "-o", folder / "out", "--quiet", name=f"said{number}")
        for number in range(3)
    ]
    ended = [one.wait() for one in racing]
    assert 0 in ended and set(ended) <= {0, 2}, [one.text for one in racing]
    for status, one in zip(ended, racing, strict=True):
        assert "Traceback" not in one.text
        assert status == 0 or ("must be written by one process at a time" in one.text and one.text.count("\n") == 1), (
            one.text
        )
    assert same(folder / "out") == reference
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith("said")) == ["out"]


def same(out: Path) -> dict[str, bytes | None]:
    """What is the same in every run: all but reports, which hold times."""
    return {
        name: data
        for name, data in content(out).items()
        if not name.startswith(("report", "README.md", "manifest.json"))
    }


@pytest.mark.slow
def test_races(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    races(tiny_model, tmp_path, 2)


@pytest.mark.slow
def test_races_many_times(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    races(tiny_model, tmp_path, 50)


def races(tiny_model: Callable[[str], Path], folder: Path, count: int) -> None:
    """So many races for a folder and for OUT."""
    recipe = small_recipe(tiny_model("llama"), folder)
    assert start(folder, "convert", "--recipe", recipe, "-o", folder / "reference").wait() == 0
    reference = same(folder / "reference")
    for number in range(count):
        race(folder / f"folder{number}")
        race_of_conversions(folder / f"out{number}", recipe, reference)

"""Folders and files appear whole or not at all, and a full disk is one line."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsegate.converter.checkpoint import stage as artifact
from sparsegate.converter.checkpoint.stage import (
    RECORD,
    Header,
    atomic_folder,
    is_disk_full,
    size,
    write_header,
    write_json,
    write_tensors,
)
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.untrusted import read_json

HEADER = Header(format="plan", seed=3)


def one_line(error: pytest.ExceptionInfo[InputError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text and ", got " in text and " must " in text and text.endswith("."), text
    for word in words:
        assert word in text, (word, text)


@pytest.mark.parametrize("name", ["out", "out[1]*?"])
def test_atomic_folder(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    stale, other = tmp_path / f"{name}.partial-99999999", tmp_path / "other.partial-99999999"
    for folder in (stale, other):
        (folder / name).mkdir(parents=True)
        write_json(folder / RECORD, {"kind": "sparsegate folder", "process": 1 << 30, "host": "gone", "since": "then"})
    (tmp_path / f"{name}.partial-abcdef01").mkdir()
    mine = tmp_path / f"{name}.partial-mine"
    mine.mkdir()
    with pytest.raises(RuntimeError), atomic_folder(target) as partial:
        (partial / "a").write_text("half")
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([mine.name, other.name]), (
        "failure leaves nothing, other folders stay"
    )
    for text in ("one", "two"):
        with atomic_folder(target) as partial:
            (partial / "a").write_text(text)
            write_header(partial, HEADER)
            assert not target.exists() or (target / "a").read_text() != text
        assert (target / "a").read_text() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([mine.name, other.name, name])


def test_a_replaced_folder_is_never_there_by_half(tmp_path: Path) -> None:
    """What another process finishes in between is replaced too."""
    target = tmp_path / "out"
    with atomic_folder(target) as first:
        (first / "a").write_text("first")
        write_header(first, HEADER)
        with atomic_folder(target) as second:
            (second / "a").write_text("second")
            write_header(second, HEADER)
        assert (target / "a").read_text() == "second"
    assert (target / "a").read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_atomic_folder_says_that_the_disk_is_full(tmp_path: Path) -> None:
    for failure in (
        OSError(errno.ENOSPC, "x"),
        OSError(errno.EFBIG, "x"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ):
        with pytest.raises(InputError) as error, atomic_folder(tmp_path / "out"):
            raise failure
        one_line(error, "out", "GB free")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error, full",
    [
        (OSError("4096 requested and 0 written"), True),  # numpy's
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (RuntimeError("I/O error: File too large (os error 27)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("a shape was requested"), False),
    ],
)
def test_what_says_that_the_disk_is_full(error: Exception, full: bool) -> None:
    assert is_disk_full(error) == full


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (12_300, "12.3 kB"),
        (1_750_000, "1.75 MB"),
        (5e8, "500 MB"),
        (1.5e10, "15.0 GB"),
        (2e12, "2000 GB"),
    ],
)
def test_sizes_as_a_person_reads_them(count: float, text: str) -> None:
    assert size(count) == text


def test_atomic_folder_keeps_the_old_one_until_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, plain = tmp_path / "out", os.replace
    target.mkdir()
    (target / "a").write_text("old")
    write_header(target, HEADER)

    def fails(source: Path, place: Path) -> None:
        if Path(place) == target and ".old" not in str(source):
            raise OSError("no")
        plain(source, place)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no"), atomic_folder(target) as partial:
        (partial / "a").write_text("new")
    assert (target / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tensors_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """A file-size limit is met by the library that writes, whose error is its own."""
    import resource

    write_tensors(tmp_path / "a", {"x": torch.ones(3)})
    assert torch.equal(load_file(tmp_path / "a")["x"], torch.ones(3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(InputError) as error:
            write_tensors(tmp_path / "a", {"x": torch.ones(3000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    one_line(error, "Disk space must suffice", "GB free")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and torch.equal(
        load_file(tmp_path / "a")["x"], torch.ones(3)
    )


def test_write_json_keeps_the_old_file_on_failure(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"b": {1, 2}})
    assert read_json(tmp_path / "a.json", "x") == {"b": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_vanishes_while_it_is_looked_at_is_no_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes it away and puts its own there, for a moment without one."""
    target, plain = tmp_path / "out", artifact.read_header

    def write() -> None:
        with atomic_folder(target) as partial:
            (partial / "a").write_text("")
            write_header(partial, HEADER)

    write()

    def vanishing(folder: Path) -> Header | None:
        monkeypatch.setattr(artifact, "read_header", plain)
        (folder / "gone").mkdir()
        os.replace(folder, tmp_path / "aside")
        write()
        return None

    monkeypatch.setattr(artifact, "read_header", vanishing)
    write()
    assert (target / "a").exists()

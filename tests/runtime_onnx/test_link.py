"""link and unlink: a folder that genai opens from any language with the kernel inside, and the way back to the same
bytes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import onnx
import onnx_folders as folders
import pytest

import sparsegate.runtime_onnx as runtime
from sparsegate.runtime_onnx.library import LIBRARY

linking = sys.modules["sparsegate.runtime_onnx.link"]  # the package's attribute of that name is the function
RECORD, CONFIG = linking.RECORD, linking.CONFIG

# An app that knows nothing of sparsegate; the last line says whether a library from the model folder is mapped.
APP = """
import sys
import onnxruntime_genai as og
folder, prompt = sys.argv[1:]
model = og.Model(folder)
tokenizer = og.Tokenizer(model)
parameters = og.GeneratorParams(model)
ids = tokenizer.encode(prompt)
parameters.set_search_options(max_length=len(ids) + 8, do_sample=False)
generator = og.Generator(model, parameters)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
print(repr(tokenizer.decode(generator.get_sequence(0)[len(ids):])))
print(any(folder in line and line.rstrip().endswith("libsparsegate_onnx.so") for line in open("/proc/self/maps")))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sparse ONNX folder inside a checkpoint folder."""
    (tmp_path / "out").mkdir()
    return folders.copy(folders.sparse("gate"), tmp_path / "out" / "onnx")


def content(folder: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def app(folder: Path, cwd: Path) -> list[str]:
    """Output lines of APP, run in `cwd`."""
    done = subprocess.run(
        [sys.executable, "-c", APP, str(folder), folders.PROMPT], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_round_trip(folder: Path) -> None:
    """link adds a copy, a record and one line; unlink gives the same bytes back; both may be run twice, on the
    checkpoint or its ONNX folder.
    """
    (folder / CONFIG).write_bytes((folder / CONFIG).read_bytes().replace(b"\n", b"\r\n") + b"\n \n")
    before = content(folder)
    copy = runtime.link(folder.parent)
    assert (
        copy == folder / LIBRARY and not copy.is_symlink() and copy.read_bytes() == runtime.library_path().read_bytes()
    )
    config = json.loads((folder / CONFIG).read_text())
    assert config["model"]["decoder"]["session_options"].pop("custom_ops_library") == LIBRARY
    assert config == json.loads(before[CONFIG])
    assert json.loads((folder / RECORD).read_text())["sha256"] == hashlib.sha256(copy.read_bytes()).hexdigest()
    linked = content(folder)
    assert set(linked) - set(before) == {LIBRARY, RECORD}
    runtime.link(folder)
    assert content(folder) == linked
    assert runtime.unlink(folder) is True
    assert content(folder) == before
    assert runtime.unlink(folder.parent) is False
    assert content(folder) == before


def test_apps_get_the_kernel(folder: Path, tmp_path: Path) -> None:
    """An app without sparsegate, started elsewhere: linked it maps the copy, unlinked it does not, and the text is the
    same.
    """
    text, mapped = app(folder, tmp_path)
    assert mapped == "False"
    runtime.link(folder)
    assert app(folder, tmp_path) == [text, "True"]
    assert "".join(runtime.generate(folder, folders.PROMPT, 8, chat=False)) == ast.literal_eval(text)
    runtime.unlink(folder)
    assert app(folder, tmp_path) == [text, "False"]


def test_stale_copy_is_renewed(folder: Path) -> None:
    """A copy from an older installation is refused by load with the remedy, and renewed by link; the way back stays."""
    before = content(folder)
    runtime.link(folder)
    linked = content(folder)
    older = linked[LIBRARY] + b"older"
    (folder / LIBRARY).write_bytes(older)
    record = json.loads(linked[RECORD]) | {"version": "0.0.1", "sha256": hashlib.sha256(older).hexdigest()}
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"must be the installed library.*sparsegate link"):
        runtime.load(folder)
    runtime.link(folder)
    assert content(folder) == linked
    runtime.unlink(folder)
    assert content(folder) == before


def test_edits_after_link_survive(folder: Path) -> None:
    """A config that a person changed while linked loses the library's line only, also when it was linked again in
    between.
    """
    runtime.link(folder)
    for value in (0.5, 0.6):
        config = json.loads((folder / CONFIG).read_text())
        config["search"]["temperature"] = value
        (folder / CONFIG).write_text(json.dumps(config))
        if value == 0.5:
            runtime.link(folder)
    runtime.unlink(folder)
    del config["model"]["decoder"]["session_options"]["custom_ops_library"]
    assert json.loads((folder / CONFIG).read_text()) == config
    assert not (folder / LIBRARY).exists() and not (folder / RECORD).exists()


@pytest.mark.parametrize("failing", [RECORD, LIBRARY, CONFIG])
def test_full_disk(folder: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever file cannot be written, the config still opens, nothing partial stays, and unlink cleans up."""
    before = content(folder)
    write = linking.os.replace

    def replace(source: Path, target: Path) -> None:
        if target.name == failing:
            raise OSError(28, "No space left on device")
        write(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(linking.os, "replace", replace)
        with pytest.raises(OSError, match="No space"):
            runtime.link(folder)
    assert (folder / CONFIG).read_bytes() == before[CONFIG]
    assert not list(folder.glob("*.partial-*"))
    runtime.unlink(folder)
    assert content(folder) == before


def test_linked_folder_without_the_library(folder: Path, tmp_path: Path) -> None:
    """From Python the copy is never what runs: the body does where it is asked for. A config that names something else
    is refused everywhere.
    """
    runtime.link(folder)
    linked = content(folder)
    assert list(runtime.generate(folder, folders.PROMPT, 4, library=False)) == list(
        runtime.generate(folders.sparse("gate"), folders.PROMPT, 4, library=False)
    )
    assert content(folder) == linked
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace(LIBRARY, "libother.so"))
    for function in (runtime.load, runtime.link, runtime.unlink):
        with pytest.raises(
            ValueError, match=r"must name no other custom_ops_library than libsparsegate_onnx\.so, got 'libother\.so'"
        ):
            function(folder)


def test_a_foreign_library_stays(folder: Path) -> None:
    """link does not write over a library that it did not put there, and unlink does not delete one, whatever a record
    says of another one.
    """
    runtime.link(folder)
    record = (folder / RECORD).read_bytes()
    runtime.unlink(folder)
    before = content(folder)
    (folder / LIBRARY).write_bytes(b"somebody's own build")
    with pytest.raises(
        ValueError, match=r"must be a library that sparsegate link put there, got another file\. Move it away"
    ):
        runtime.link(folder)
    assert content(folder) == before | {LIBRARY: b"somebody's own build"}
    (folder / RECORD).write_bytes(record)
    assert runtime.unlink(folder) is True
    assert content(folder) == before | {LIBRARY: b"somebody's own build"}


@pytest.mark.parametrize(
    "wish", ["another value", "one for true", "a library elsewhere", "no JSON", "not even a record"]
)
def test_a_forged_record_writes_nothing(folder: Path, wish: str) -> None:
    """What a record says was the config before is written only where it says the same as the present one does."""
    runtime.link(folder)
    record, now = json.loads((folder / RECORD).read_text()), json.loads((folder / CONFIG).read_text())
    del now["model"]["decoder"]["session_options"]["custom_ops_library"]
    forged = json.loads(json.dumps(now))
    if wish == "another value":
        forged["search"]["temperature"] = 0.25
    elif wish == "one for true":
        forged["search"]["early_stopping"] = 1
    elif wish == "a library elsewhere":
        forged["model"]["decoder"]["pipeline"] = [{"a": {"session_options": {"custom_ops_library": "evil.so"}}}]
    record["config"] = "{" if wish == "no JSON" else json.dumps(forged)
    (folder / RECORD).write_text(json.dumps([record] if wish == "not even a record" else record))
    assert runtime.unlink(folder) is True
    assert (
        json.loads((folder / CONFIG).read_text()) == now
        and json.loads((folder / CONFIG).read_text())["search"]["early_stopping"] is True
    )
    assert not (folder / RECORD).exists() and not (folder / LIBRARY).exists()


@pytest.mark.parametrize("name", [CONFIG, LIBRARY, RECORD])
def test_links_in_place_of_files_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    """Neither link nor unlink writes or deletes through a symbolic link, or follows one."""
    if name != CONFIG:
        runtime.link(folder)
    (folder / name).rename(tmp_path / name)
    outside = (tmp_path / name).read_bytes()
    (folder / name).symlink_to(tmp_path / name)
    for function in (runtime.link, runtime.unlink):
        with pytest.raises(ValueError, match="must name regular files inside its own folder"):
            function(folder)
    assert (tmp_path / name).read_bytes() == outside and (folder / name).is_symlink()


def test_refusals(folder: Path, tmp_path: Path) -> None:
    """No genai_config.json, a dense model, a variant that the library does not know: one line each, and nothing is
    written.
    """
    dense = folders.copy(folders.dense(), tmp_path / "dense")
    before = content(dense)
    with pytest.raises(ValueError, match="dense model"):
        runtime.link(dense)
    assert content(dense) == before
    folders.rename_variant(folder, "GatedMLP.9/silu")
    before = content(folder)
    with pytest.raises(ValueError, match=r"must support the model.*GatedMLP\.9/silu"):
        runtime.link(folder)
    assert content(folder) == before
    (folder / CONFIG).unlink()
    for function in (runtime.link, runtime.unlink):
        with pytest.raises(ValueError, match="must have a genai_config.json"):
            function(folder)
    assert onnx.load(str(folder / "model.onnx"), load_external_data=False)

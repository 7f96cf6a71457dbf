"""Repositories of strangers against a local Hub server, and folders with links: nothing outside is read, written or
removed, and nothing but data moves.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_server import Account, HubServer
from huggingface_hub import HfApi, constants
from test_hub import GENAI, MODEL, TOKEN, contents, make_checkpoint, one_line

from sparsegate.converter.checkpoint.manifest import check_files, read_manifest
from sparsegate.converter.pipeline import push as push_module
from sparsegate.converter.sources import hub
from sparsegate.runtime_onnx.errors import InputError

NAMES = [
    "../outside.txt",
    "onnx/../../outside.txt",
    "/tmp/outside.txt",
    "C:/outside.txt",
    "C:outside.txt",
    "..\\outside.txt",
    "onnx\\outside.json",
    ".cache/sparsegate.json",
    "onnx/.CACHE/x.json",
    ".git/config.json",
    "./x.json",
    "onnx//x.json",
    "x.json/",
    "",
    ".",
    "..",
    "a\nb.json",
    "a\x00.json",
    "a\u202ebad.json",
    "x" * 2000 + ".json",
]
"""Names that lead outside the folder or are no plain names in it."""
PROGRAMS = [
    "onnx/evil.so",
    "evil.dll",
    "libx.dylib",
    "onnx/libsparsegate_onnx.so",
    "libx.so.1",
    "run.sh",
    "run.exe",
    "model.py",
    "x.pyc",
    "pytorch_model.bin",
    "x.pkl",
    "x.pt",
    "LICENSE.so",
    "license.exe",
    "run",
    "Makefile",
    "x.bat",
    "x.desktop",
    "x.whl",
    "x.zip",
]
"""Kinds of file that no checkpoint has."""


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as found:
        yield found


@pytest.fixture(autouse=True)
def _client(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A client without Xet, stored tokens or shared cache, and an empty server."""
    for kept in (server.repos, server.uploads, server.log, server.created, server.faults):
        kept.clear()
    server.accounts = {TOKEN: Account("ada")}
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    huggingface_hub.utils.disable_progress_bars()


def repository(tmp_path: Path, extra: dict[str, bytes]) -> dict[str, bytes]:
    """A checkpoint's files by name with more that its manifest lists too."""
    folder = make_checkpoint(tmp_path / "theirs")
    files = contents(folder)
    shutil.rmtree(folder)
    manifest = json.loads(files["manifest.json"])
    manifest["files"] |= {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in extra.items()
    }
    return files | extra | {"manifest.json": json.dumps(manifest).encode()}


@pytest.mark.parametrize("name", [*NAMES, *PROGRAMS])
def test_a_manifest_of_a_stranger_names_no_other_places_and_no_programs(
    server: HubServer, tmp_path: Path, name: str
) -> None:
    """Refused in one line after the manifest alone; no file of the repository is there, nor is the folder."""
    server.add_repo("eve/model", repository(tmp_path, {name: b"theirs"}))
    with pytest.raises(
        InputError, match="must (name files inside its own folder|list weights, graphs, JSON, texts and pictures alone)"
    ) as error:
        hub.fetch_checkpoint("eve/model", tmp_path / "a" / "m", endpoint=server.url)
    one_line(error)
    assert not [line for line in server.log if "/resolve/" in line and not line.endswith("/manifest.json")]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == []


def test_a_record_from_a_repository_deletes_nothing(server: HubServer, tmp_path: Path) -> None:
    """The way that did: a record among the files, a download that breaks off, and the next one removes what the record
    calls its own.
    """
    victim, folder = tmp_path / "victim.txt", tmp_path / "a" / "m"
    victim.write_text("mine")
    record = {"id": "eve/model", "requested": None, "revision": "0" * 40, "files": {"../../victim.txt": 4}}
    server.add_repo(
        "eve/model", repository(tmp_path, {".cache/sparsegate.json": json.dumps(record).encode(), "zzz.json": b"{}"})
    )
    for _ in range(2):
        server.fail(r"GET .*/zzz\.json", 418)
        with pytest.raises(InputError):
            hub.fetch_checkpoint("eve/model", folder, endpoint=server.url)
    assert victim.read_text() == "mine"
    server.faults.clear()
    (folder / ".cache").mkdir(parents=True, exist_ok=True)
    for files in ({"../../victim.txt": 4}, {str(victim): 4}, {"config.json": 1, "../../victim.txt": 4}):
        (folder / ".cache" / "sparsegate.json").write_text(json.dumps(record | {"files": files}))
        server.add_repo("eve/model", repository(tmp_path, {}))
        hub.fetch_checkpoint("eve/model", folder, endpoint=server.url)
        assert victim.read_text() == "mine" and not check_files(folder, read_manifest(folder))
        (folder / "manifest.json").unlink()
    (folder / ".cache" / "sparsegate.json").write_text(json.dumps(record)[:-1] + ', "files": {"config.json": 1}}')
    hub.fetch_checkpoint("eve/model", folder, endpoint=server.url)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("name", ["onnx", "onnx/model.onnx", "config.json", "sparsity"])
def test_a_download_writes_through_no_link(server: HubServer, tmp_path: Path, name: str) -> None:
    server.add_repo("eve/model", repository(tmp_path, {}))
    folder, outside = tmp_path / "m", tmp_path / "outside"
    (folder / name).parent.mkdir(parents=True)
    outside.mkdir() if "." not in name else outside.write_text("mine")
    (folder / name).symlink_to(outside)
    with pytest.raises(InputError, match="must name regular files inside its own folder") as error:
        hub.fetch_checkpoint("eve/model", folder, endpoint=server.url)
    one_line(error)
    assert list(outside.iterdir()) == [] if outside.is_dir() else outside.read_text() == "mine"


def test_a_dense_model_brings_data_alone(server: HubServer, tmp_path: Path) -> None:
    hostile = {name: b"x" for name in PROGRAMS if "/" not in name} | {
        "NOTICE.so": b"x",
        "use_policy.py": b"x",
        "README.md.exe": b"x",
    }
    server.add_repo("eve/model", MODEL | hostile)
    hub.download("eve/model", tmp_path / "m", endpoint=server.url)
    assert not set(contents(tmp_path / "m")) & set(hostile)


def test_keys_that_stand_twice_are_refused(server: HubServer, tmp_path: Path) -> None:
    files = repository(tmp_path, {})
    twice = files["manifest.json"].rstrip()[:-1] + b', "files": {}}'
    server.add_repo("eve/model", files | {"manifest.json": twice})
    with pytest.raises(InputError, match="the key 'files' twice") as error:
        hub.fetch_checkpoint("eve/model", tmp_path / "m", endpoint=server.url)
    one_line(error)
    server.add_repo("eve/dense", MODEL | {"config.json": b'{"model_type": "llama", "model_type": "phi"}'})
    with pytest.raises(InputError, match="the key 'model_type' twice") as error:
        hub.remote_inspect("eve/dense", endpoint=server.url)
    one_line(error)


# pushes


def linked_file(name: str) -> Callable[[Path], None]:
    """Puts a link to a file outside in a file's place, with the same bytes where the manifest knows it."""

    def change(folder: Path) -> None:
        outside = folder.parent / f"{folder.name}-outside"
        shutil.move(folder / name, outside) if (folder / name).exists() else outside.write_text("private")
        (folder / name).symlink_to(outside)

    return change


def listed(name: str) -> Callable[[Path], None]:
    """Puts a file into the folder and its manifest."""

    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = {"sha256": hashlib.sha256(b"x").hexdigest(), "size": 1}
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


def genai(text: str) -> Callable[[Path], None]:
    """Gives the ONNX folder another genai_config.json, which the manifest knows."""

    def change(folder: Path) -> None:
        (folder / "onnx/genai_config.json").write_text(text)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["onnx/genai_config.json"] = {
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "size": len(text),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


PIPELINE = json.dumps({"model": GENAI["model"] | {"decoder": GENAI["model"]["decoder"] | {"pipeline": []}}})
TWICE = json.dumps(GENAI).replace('"session_options": {}', '"session_options": {"log_id": "a"}, "session_options": {}')
REFUSED = {
    "a linked folder": (linked_file("onnx"), "a link"),
    "a linked graph": (linked_file("onnx/model.onnx"), "a link"),
    "a linked card": (linked_file("README.md"), "a link"),
    "a linked licence": (linked_file("LICENSE"), "a link"),
    "a linked manifest": (linked_file("manifest.json"), "a link"),
    "a link deeper": (linked_file("sparsity/sparsity.safetensors"), "a link"),
    "a library": (listed("onnx/evil.so"), "evil.so"),
    "code": (listed("modeling.py"), "modeling.py"),
    "a program": (listed("run"), "got run"),
    "a pickle": (listed("weights.bin"), "weights.bin"),
    "a pipeline": (genai(PIPELINE), "pipeline"),
    "a key twice": (genai(TWICE), "'session_options' twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_pushed_is_a_regular_file_of_a_known_kind(server: HubServer, tmp_path: Path, case: str) -> None:
    folder = make_checkpoint(tmp_path / "out")
    change, said = REFUSED[case]
    change(folder)
    with pytest.raises(InputError) as error:
        push_module.push(folder, "ada/sparse", token=TOKEN, endpoint=server.url)
    assert said in one_line(error)
    assert server.repos == {} and server.uploads == {}


def test_what_was_uploaded_is_compared_with_what_is_listed(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the client leaves a file out in silence, the manifest does not go up either."""
    upload = HfApi.upload_folder

    def lossy(self: HfApi, **options: Any) -> Any:
        return upload(
            self,
            **options | {"allow_patterns": [name for name in options["allow_patterns"] if name != "onnx/model.onnx"]},
        )

    folder = make_checkpoint(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "upload_folder", lossy)
        with pytest.raises(
            InputError, match=r"must hold every file of the manifest after the upload, got onnx/model\.onnx missing"
        ) as error:
            push_module.push(folder, "ada/sparse", token=TOKEN, endpoint=server.url)
    assert "run `sparsegate push" in one_line(error) and "manifest.json" not in server.repos["ada/sparse"].head.files
    push_module.push(folder, "ada/sparse", token=TOKEN, endpoint=server.url)
    assert "manifest.json" in server.repos["ada/sparse"].head.files


def test_a_linked_file_does_not_pass_for_the_one_that_was_written(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "out")
    linked_file("onnx/model.onnx")(folder)
    assert check_files(folder, read_manifest(folder)) == ["onnx/model.onnx is a link to another place"]

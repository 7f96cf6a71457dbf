"""What lies on the disk and what lies on the Hub are compared byte by byte: damaged copies, downloads and uploads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import Account, Blob, Commit, HubServer
from huggingface_hub import constants
from test_hub import MODEL, TOKEN, WANTED, contents, make_checkpoint, one_line

from sparsegate.converter.pipeline import push as push_module
from sparsegate.converter.sources import hub
from sparsegate.runtime_onnx.errors import InputError

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    huggingface_hub.utils.disable_progress_bars()
    with HubServer() as hub_server:
        hub_server.accounts = {TOKEN: Account("ada")}
        yield hub_server


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_copy_is_fetched_again(
    server: HubServer, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The client looks at no byte of what it fetched within the same second, and sizes say nothing here."""
    server.add_repo("ada/model", MODEL)
    first = hub.download("ada/model", tmp_path / "m", endpoint=server.url)
    data = (tmp_path / "m" / name).read_bytes()
    (tmp_path / "m" / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match="reachable"):
        hub.download("ada/model", tmp_path / "m", endpoint=NOWHERE)
    assert f"{name} in" in caplog.text and "is fetched again" in caplog.text
    assert hub.download("ada/model", tmp_path / "m", endpoint=server.url) == first
    assert contents(tmp_path / "m") == {name: MODEL[name] for name in WANTED}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_download_that_came_otherwise_than_listed(
    server: HubServer, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_repo("ada/model", MODEL)
    fetch = hub.snapshot_download

    def damaging(*arguments: object, **keywords: object) -> str:
        found = fetch(*arguments, **keywords)
        (tmp_path / "m" / name).write_bytes(MODEL[name][:-1] + b"?")
        return found

    monkeypatch.setattr(hub, "snapshot_download", damaging)
    with pytest.raises(InputError, match=f"{name} of ada/model must have the bytes that the repository lists") as error:
        hub.download("ada/model", tmp_path / "m", endpoint=server.url)
    one_line(error)
    monkeypatch.setattr(hub, "snapshot_download", fetch)
    hub.download("ada/model", tmp_path / "m", endpoint=server.url)
    assert contents(tmp_path / "m") == {name: MODEL[name] for name in WANTED}


def test_small_files_of_a_fetched_checkpoint_are_compared(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_module.push(make_checkpoint(tmp_path / "a"), "ada/sparse", token=TOKEN, endpoint=server.url)
    hub.fetch_checkpoint("ada/sparse", tmp_path / "b", token=TOKEN, endpoint=server.url)
    monkeypatch.setattr(hub, "SMALL", 500)  # model.onnx.data is larger, the others are smaller
    for name, kept in (("onnx/model.onnx.data", True), ("onnx/model.onnx", False), ("config.json", False)):
        before = (tmp_path / "b" / name).read_bytes()
        (tmp_path / "b" / name).write_bytes(b"?" + before[1:])
        hub.fetch_checkpoint("ada/sparse", tmp_path / "b", token=TOKEN, endpoint=server.url)
        assert ((tmp_path / "b" / name).read_bytes() != before) == kept, name
        (tmp_path / "b" / name).write_bytes(before)


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "manifest.json"])
def test_an_upload_is_compared_byte_by_byte(server: HubServer, tmp_path: Path, name: str) -> None:
    """Other bytes of the same size under the right name."""

    def damage(commit: Commit) -> None:
        if name in commit.files:
            blob = commit.files[name]
            commit.files[name] = Blob(blob.data[:-1] + b"?", blob.lfs)

    server.after = damage
    with pytest.raises(
        InputError,
        match=f"must hold every file of the manifest after the upload, got {name} missing or with other bytes",
    ) as error:
        push_module.push(make_checkpoint(tmp_path / "a"), "ada/sparse", token=TOKEN, endpoint=server.url)
    one_line(error)

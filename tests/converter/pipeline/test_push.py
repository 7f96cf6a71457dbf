"""Pushes to a local Hub: rights, what is committed and in which order, what is refused, and the way back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import Account, Blob, HubServer
from huggingface_hub import constants
from test_hub import MODEL, TOKEN, WEIGHTS, contents, make_checkpoint, one_line

from sparsegate.converter.checkpoint.manifest import LINK_FILES
from sparsegate.converter.pipeline import push as push_module
from sparsegate.converter.sources import hub
from sparsegate.runtime_onnx.errors import InputError


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A server, and a client without Xet, stored tokens or shared cache."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    huggingface_hub.utils.disable_progress_bars()
    with HubServer() as hub_server:
        hub_server.accounts = {TOKEN: Account("ada", orgs={"lab": "write", "club": "read"})}
        yield hub_server


def test_check_push_rights(server: HubServer) -> None:
    scope = {"entity": {"type": "user", "name": "ada"}, "permissions": ["repo.write"]}
    server.accounts |= {
        "reader": Account("ada", role="read"),
        "fine": Account("ada", role="fineGrained", scoped=(scope,)),
        "finer": Account("ada", role="fineGrained", scoped=({**scope, "permissions": ["repo.content.read"]},)),
    }
    server.add_repo("ada/old", {"config.json": b'{"sparsity": {}}'}, private=True)
    server.add_repo("ada/dense", MODEL)
    check = {"endpoint": server.url}
    assert push_module.check_push("ada/new", token=TOKEN, **check) == hub.PushTarget("ada/new", False, None)
    assert push_module.check_push("new", token=TOKEN, **check) == hub.PushTarget("ada/new", False, None)
    assert push_module.check_push("old", token=TOKEN, **check) == hub.PushTarget("ada/old", True, True)
    assert push_module.check_push("lab/new", token=TOKEN, **check).id == "lab/new"
    assert push_module.check_push("ada/new", token="fine", **check).id == "ada/new"
    refused = {
        ("ada/new", None): "hf auth login",
        ("ada/new", "reader"): "role write",
        ("ada/new", "finer"): "write access",
        ("bob/new", TOKEN): "ada, lab",
        ("club/new", TOKEN): "ada, lab",
        ("a/b/c", TOKEN): "owner/name",
        ("ada/dense", TOKEN): "another model",
    }
    for (repo, token), sign in refused.items():
        with pytest.raises(InputError) as error:
            push_module.check_push(repo, token=token, **check)
        assert sign in one_line(error), repo
    assert not [line for line in server.log if line.startswith(("POST", "PUT"))]


def test_push_then_download_is_byte_equal(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_checkpoint(tmp_path / "out")
    (folder / "notes.txt").write_text("private")
    assert push_module.push(folder, "ada/sparse", token=TOKEN, endpoint=server.url) == f"{server.url}/ada/sparse"
    assert capsys.readouterr().out == ""
    repo = server.repos["ada/sparse"]
    assert repo.private and [wish.get("visibility") for wish in server.created] == ["private"]
    (folder / "notes.txt").unlink()
    huggingface_hub.snapshot_download(
        "ada/sparse", local_dir=tmp_path / "back", token=TOKEN, endpoint=server.url, ignore_patterns=".gitattributes"
    )
    assert contents(tmp_path / "back") == contents(folder)


def test_manifest_is_committed_last_and_alone(server: HubServer, tmp_path: Path) -> None:
    push_module.push(make_checkpoint(tmp_path / "out"), "ada/sparse", private=False, token=TOKEN, endpoint=server.url)
    first, second = server.repos["ada/sparse"].commits[1:]
    assert "manifest.json" not in first.changed and second.changed == ("manifest.json",)
    assert not server.repos["ada/sparse"].private
    writes = [line for line in server.log if line.startswith(("POST /api/models/ada/sparse/commit", "PUT"))]
    assert writes[-2:] == ["POST /api/models/ada/sparse/commit/main"] * 2


def test_push_through_the_streamed_pipeline(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's default way of uploading, which commits in batches, keeps the manifest last and removes old files
    too.
    """
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    server.lfs = False
    push_module.push(
        make_checkpoint(tmp_path / "a", {"report/old.png": b"old"}), "ada/sparse", token=TOKEN, endpoint=server.url
    )
    folder = make_checkpoint(tmp_path / "b", {"report/new.png": b"new"})
    for _ in range(2):
        push_module.push(folder, "ada/sparse", token=TOKEN, endpoint=server.url)
    commits = server.repos["ada/sparse"].commits
    assert [commit.changed == ("manifest.json",) for commit in commits[1:]] == [False, True, False, True]
    assert {name: blob.data for name, blob in commits[-1].files.items() if name != ".gitattributes"} == contents(folder)


def test_push_again_changes_nothing(server: HubServer, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "out")
    push_module.push(folder, "ada/sparse", token=TOKEN, endpoint=server.url)
    commits = list(server.repos["ada/sparse"].commits)
    server.log.clear()
    push_module.push(folder, "ada/sparse", token=TOKEN, endpoint=server.url)
    assert server.repos["ada/sparse"].commits == commits
    assert not [line for line in server.log if "/commit/" in line or line.startswith("PUT")]


@pytest.mark.parametrize("broken", [r"PUT /_lfs/", r"POST /api/repos/create", r"POST .*/commit/main", "manifest"])
def test_failed_push_names_the_retry_and_continues(server: HubServer, tmp_path: Path, broken: str) -> None:
    folder = make_checkpoint(tmp_path / "my out")
    if broken == "manifest":  # the second commit: let the first one pass
        server.after = lambda commit: server.fail(r"POST .*/commit/main", 418)
    else:
        server.fail(broken, 418)
    with pytest.raises(InputError, match="418") as error:
        push_module.push(folder, "ada/sparse", private=False, token=TOKEN, endpoint=server.url)
    assert one_line(error).endswith(f"`sparsegate push '{folder}' ada/sparse --public`.")
    half = server.repos["ada/sparse"].head.files if "ada/sparse" in server.repos else {}
    assert "manifest.json" not in half and ("onnx/model.onnx" in half) == (broken == "manifest")
    server.after = None
    push_module.push(folder, "ada/sparse", private=False, token=TOKEN, endpoint=server.url)
    done = {name: blob.data for name, blob in server.repos["ada/sparse"].head.files.items() if name != ".gitattributes"}
    assert done == contents(folder)


def test_new_version_removes_only_its_own_old_files(server: HubServer, tmp_path: Path) -> None:
    push_module.push(
        make_checkpoint(tmp_path / "a", {"report/old.png": b"old"}), "ada/sparse", token=TOKEN, endpoint=server.url
    )
    repo = server.repos["ada/sparse"]
    repo.commit("by hand", {**repo.head.files, "notes.md": repo.head.files["README.md"]}, ("notes.md",))
    push_module.push(
        make_checkpoint(tmp_path / "b", {"report/new.png": b"new"}), "ada/sparse", token=TOKEN, endpoint=server.url
    )
    names = set(repo.head.files)
    assert "report/old.png" not in names and {"report/new.png", "notes.md", "manifest.json"} <= names


def test_push_refuses_what_is_no_finished_checkpoint(server: HubServer, tmp_path: Path) -> None:
    def altered(name: str, change) -> Path:
        folder = make_checkpoint(tmp_path / name)
        change(folder)
        return folder

    def relist(folder: Path, change) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest["files"])
        (folder / "manifest.json").write_text(json.dumps(manifest))

    outside = {"sha256": "0" * 64, "size": 1}
    cases = {
        "nothing at": altered("no-manifest", lambda folder: (folder / "manifest.json").unlink()),
        "must be JSON": altered("broken", lambda folder: (folder / "manifest.json").write_text("{")),
        "follow version 1": altered("empty", lambda folder: (folder / "manifest.json").write_text("{}")),
        "got none": altered("nothing", lambda folder: relist(folder, lambda files: files.clear())),
        "onnx/model.onnx is missing": altered("missing", lambda folder: (folder / "onnx/model.onnx").unlink()),
        "model.safetensors has other bytes": altered(
            "changed", lambda folder: (folder / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"!")
        ),
        "inside its own folder": altered(
            "outside", lambda folder: relist(folder, lambda files: files.update({"../secret": outside}))
        ),
        "README.md is missing": altered("lost-card", lambda folder: (folder / "README.md").unlink()),
        "model card": altered(
            "no-card",
            lambda folder: ((folder / "README.md").unlink(), relist(folder, lambda files: files.pop("README.md"))),
        ),
        "onnx/model.onnx is not listed": altered(
            "off-list", lambda folder: relist(folder, lambda files: files.pop("onnx/model.onnx"))
        ),
        "sparsegate_link.json": altered(
            "linked", lambda folder: (folder / "onnx" / "sparsegate_link.json").write_text("{}")
        ),
        "sparsegate unlink": altered(
            "named", lambda folder: (folder / "onnx/genai_config.json").write_text('{"custom_ops_library": "libx.so"}')
        ),
    }
    for sign, folder in cases.items():
        with pytest.raises(InputError) as error:
            push_module.push(folder, "ada/sparse", token=TOKEN, endpoint=server.url)
        assert sign in one_line(error)
    assert server.log == [] and server.repos == {}


def test_card_edited_by_hand_is_pushed(server: HubServer, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "out")
    (folder / "README.md").write_text("# mine\n")
    push_module.push(folder, "ada/sparse", token=TOKEN, endpoint=server.url)
    assert server.repos["ada/sparse"].head.files["README.md"].data == b"# mine\n"


def test_link_record_has_the_runtimes_name() -> None:
    from sparsegate.runtime_onnx.library import LIBRARY
    from sparsegate.runtime_onnx.link import RECORD

    assert set(LINK_FILES) == {RECORD, LIBRARY}


def test_checkpoint_comes_back_whole(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "out")
    push_module.push(folder, "ada/sparse", token=TOKEN, endpoint=server.url)
    server.repos["ada/sparse"].commit(
        "by hand", {**server.repos["ada/sparse"].head.files, "notes.md": Blob(b"x", False)}, ("notes.md",)
    )
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    made = hub.fetch_checkpoint("ada/sparse", token=TOKEN, endpoint=server.url)
    assert made.folder == tmp_path / "home" / "sparsegate" / "sparse" / "ada--sparse" and contents(
        made.folder
    ) == contents(folder)
    assert not any(path.is_symlink() for path in made.folder.rglob("*"))
    server.add_repo("ada/half", {"config.json": MODEL["config.json"], "model.safetensors": WEIGHTS})
    with pytest.raises(InputError, match="finished sparse checkpoint") as error:
        hub.fetch_checkpoint("ada/half", tmp_path / "half", endpoint=server.url)
    one_line(error)

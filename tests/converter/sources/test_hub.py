"""The Hub side against a local server: downloads, inspection, a Hub out of reach, and every mistake in one line."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import Account, HubServer
from huggingface_hub import constants

from sparsegate.converter.checkpoint.manifest import File, Manifest, write_manifest
from sparsegate.converter.pipeline import push as push_module
from sparsegate.converter.sources import hub
from sparsegate.runtime_onnx.errors import InputError

TOKEN = "hf_secretsecretsecret"
CONFIG = {"model_type": "llama", "hidden_size": 4}
GENAI = {"model": {"context_length": 8, "decoder": {"filename": "model.onnx", "head_size": 4, "session_options": {}}}}


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


WEIGHTS = safetensors({"a": ("F16", [2, 4], bytes(range(16))), "b": ("F32", [3], bytes(range(12)))})
MODEL = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE.txt": b"terms",
    "README.md": b"---\nlicense: mit\n---\n",
    "pytorch_model.bin": b"pickle",
    "modeling_custom.py": b"raise SystemExit",
    "onnx/model.onnx": b"graph",
    "consolidated.safetensors": WEIGHTS,
    "model-00001-of-00001.safetensors": WEIGHTS,
    "model.safetensors.index.json": b"{}",
}
WANTED = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "LICENSE.txt", "README.md"}


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as hub_server:
        yield hub_server


@pytest.fixture(autouse=True)
def client(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A client without Xet, stored tokens or shared cache, and an empty server."""
    server.repos.clear(), server.uploads.clear(), server.log.clear(), server.created.clear(), server.faults.clear()
    server.after, server.lfs = None, True
    server.accounts = {TOKEN: Account("ada", orgs={"lab": "write", "club": "read"})}
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    huggingface_hub.utils.disable_progress_bars()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def make_checkpoint(folder: Path, extra: dict[str, bytes] | None = None) -> Path:
    files = {
        "config.json": json.dumps({**CONFIG, "sparsity": {"version": 1, "sites": {}}}).encode(),
        "model.safetensors": WEIGHTS,
        "sparsity/sparsity.safetensors": WEIGHTS,
        "onnx/model.onnx": b"graph",
        "onnx/model.onnx.data": bytes(1000),
        "onnx/genai_config.json": json.dumps(GENAI).encode(),
        "README.md": b"---\nlicense: mit\n---\n# card\n",
        "report/report.json": b"{}",
        **(extra or {}),
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    rows = {name: File(sha256=hashlib.sha256(data).hexdigest(), size=len(data)) for name, data in files.items()}
    write_manifest(
        folder,
        Manifest(
            fingerprint="0",
            source={},
            calibration={},
            recipe={},
            seed=0,
            budget={},
            measured={},
            versions={},
            files=rows,
        ),
    )
    return folder


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith((".", "`.")) and "got" in text, text
    assert TOKEN not in text
    return text


def test_hub_id_or_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ada").mkdir()
    (tmp_path / "ada" / "here").mkdir()
    assert hub.is_hub_id("ada/model-1.5") and hub.is_hub_id("gpt2")
    for local in ("ada/here", "./ada/model", "/tmp/x", "~/x", "a/b/c", "ada/model/", "", "ada/mo del", "ada/x.git"):
        assert not hub.is_hub_id(local), local


def test_download_takes_what_is_needed_as_real_files(server: HubServer, tmp_path: Path) -> None:
    repo = server.add_repo("ada/model", MODEL)
    made = hub.download("ada/model", tmp_path / "m", endpoint=server.url)
    assert made == hub.Download(tmp_path / "m", "ada/model", repo.head.sha)
    assert contents(tmp_path / "m") == {name: MODEL[name] for name in WANTED}
    assert not any(path.is_symlink() for path in (tmp_path / "m").rglob("*"))


def test_download_again_fetches_nothing_then_follows_the_new_commit(server: HubServer, tmp_path: Path) -> None:
    server.add_repo("ada/model", MODEL)
    first = hub.download("ada/model", tmp_path / "m", endpoint=server.url)
    server.log.clear()
    assert hub.download("ada/model", tmp_path / "m", endpoint=server.url) == first
    assert not [line for line in server.log if line.startswith("GET") and "/resolve/" in line]
    server.log.clear()
    assert hub.download("ada/model", tmp_path / "m", revision=first.revision, endpoint=server.url) == first
    assert server.log == []
    index = json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode()
    sharded = {
        "config.json": MODEL["config.json"],
        "model-00001-of-00001.safetensors": WEIGHTS,
        "model.safetensors.index.json": index,
    }
    server.add_repo("ada/model", sharded)
    second = hub.download("ada/model", tmp_path / "m", endpoint=server.url)
    assert second.revision != first.revision and contents(tmp_path / "m") == sharded


def test_finished_download_serves_without_a_network(
    server: HubServer, tmp_path: Path, closed_port: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.add_repo("ada/model", MODEL)
    first = hub.download("ada/model", tmp_path / "m", endpoint=server.url)
    assert hub.download("ada/model", tmp_path / "m", endpoint=closed_port) == first
    assert "cannot be reached" in caplog.text
    with pytest.raises(InputError, match="reachable"):
        hub.download("ada/model", tmp_path / "m", revision="other", endpoint=closed_port)
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="reachable"):
        hub.download("ada/model", tmp_path / "m", endpoint=closed_port)


def test_interrupted_download_goes_on(server: HubServer, tmp_path: Path) -> None:
    server.add_repo("ada/model", MODEL)
    server.fail(r"GET .*/resolve/.*/tokenizer\.json", 418)
    with pytest.raises(InputError, match="418"):
        hub.download("ada/model", tmp_path / "m", endpoint=server.url)
    hub.download("ada/model", tmp_path / "m", endpoint=server.url)
    assert contents(tmp_path / "m") == {name: MODEL[name] for name in WANTED}


def test_disk_is_checked_before_any_byte(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add_repo("ada/model", MODEL)
    needed = sum(len(MODEL[name]) for name in WANTED)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(InputError, match="Free disk space") as error:
        hub.download("ada/model", tmp_path / "m", endpoint=server.url)
    one_line(error)
    assert not (tmp_path / "m").exists() and not [line for line in server.log if "/resolve/" in line]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    hub.download("ada/model", tmp_path / "m", endpoint=server.url)


def test_inspect_reads_headers_only(server: HubServer) -> None:
    big = safetensors(
        {
            "w": ("BF16", [1000, 500], bytes(1_000_000)),
            **{f"layer.{k}.weight": ("F32", [2, 2], bytes(16)) for k in range(3000)},
        }
    )
    assert struct.unpack("<Q", big[:8])[0] > 100_000  # longer than the client's first request
    server.add_repo("ada/big", {"config.json": MODEL["config.json"], "model.safetensors": big})
    found = hub.remote_inspect("ada/big", endpoint=server.url)
    assert found.config == CONFIG and found.revision == server.repos["ada/big"].head.sha
    assert found.tensors["w"] == ((1000, 500), "BF16") and len(found.tensors) == 3001
    assert found.total_bytes == 1_000_000 + 3000 * 16 and found.download_bytes == len(big) + len(MODEL["config.json"])
    assert len([line for line in server.log if "model.safetensors" in line]) == 2


def test_inspect_shards(server: HubServer) -> None:
    shards = {f"model-0000{k}-of-00002.safetensors": safetensors({f"t{k}": ("F32", [k], bytes(4 * k))}) for k in (1, 2)}
    server.add_repo(
        "ada/sharded", {"config.json": MODEL["config.json"], "model.safetensors.index.json": b"{}", **shards}
    )
    found = hub.remote_inspect("ada/sharded", endpoint=server.url)
    assert found.tensors == {"t1": ((1,), "F32"), "t2": ((2,), "F32")} and found.total_bytes == 12


@pytest.mark.parametrize(
    "read", [hub.remote_inspect, lambda repo, **options: hub.download(repo, Path("unused"), **options)]
)
def test_what_is_no_model_is_refused(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read) -> None:
    monkeypatch.chdir(tmp_path)
    config = {"config.json": MODEL["config.json"]}
    server.add_repo("ada/pickle", {**config, "pytorch_model.bin": b"x"})
    server.add_repo("ada/gguf", {"model.gguf": b"x"})
    server.add_repo("ada/none", config)
    server.add_repo("ada/other", {**config, "consolidated.safetensors": WEIGHTS})
    server.add_repo("ada/gated", MODEL, gated=True)
    server.add_repo("ada/secret", MODEL, private=True)
    cases = {
        "ada/pickle": "spaces/safetensors/convert",
        "ada/gguf": "config.json",
        "ada/none": "got none",
        "ada/other": "consolidated.safetensors",
        "ada/missing": "neither",
        "ada/secret": "neither",
        "ada/gated": "gated",
    }
    for repo, sign in cases.items():
        with pytest.raises(InputError) as error:
            read(repo, endpoint=server.url)
        assert sign in one_line(error)
    with pytest.raises(InputError) as error:
        read("ada/gated", revision="nowhere", endpoint=server.url)
    assert "revision" in one_line(error)
    assert not Path("unused").exists() or not contents(Path("unused"))


def test_lying_header_is_refused(server: HubServer) -> None:
    server.add_repo(
        "ada/lying",
        {"config.json": MODEL["config.json"], "model.safetensors": struct.pack("<Q", 20) + b"{not json, not at all"},
    )
    with pytest.raises(InputError, match="valid headers") as error:
        hub.remote_inspect("ada/lying", endpoint=server.url)
    one_line(error)


@pytest.fixture
def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def silent_port() -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def actions(tmp_path: Path, endpoint: str, token: str | None = TOKEN):
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    yield lambda: hub.remote_inspect("ada/model", token=token, endpoint=endpoint)
    yield lambda: hub.download("ada/model", tmp_path / "m", token=token, endpoint=endpoint)
    yield lambda: push_module.check_push("ada/model", token=token, endpoint=endpoint)
    yield lambda: push_module.push(checkpoint, "ada/model", token=token, endpoint=endpoint)


def test_unreachable_hub_fails_within_seconds(tmp_path: Path, closed_port: str) -> None:
    start = time.monotonic()
    for action in actions(tmp_path, closed_port):
        with pytest.raises(InputError, match="reachable") as error:
            action()
        assert closed_port in one_line(error)
    assert time.monotonic() - start < 5


def test_silent_hub_times_out(tmp_path: Path, silent_port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hub, push_module):
        monkeypatch.setattr(module, "TIMEOUT", 0.2)
    start = time.monotonic()
    for action in actions(tmp_path, silent_port):
        with pytest.raises(InputError, match="reachable"):
            action()
    assert time.monotonic() - start < 5


def test_offline_mode(tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for action in actions(tmp_path, server.url):
        with pytest.raises(InputError, match="offline mode") as error:
            action()
        one_line(error)
    assert server.log == []


def test_wrong_token(tmp_path: Path, server: HubServer) -> None:
    server.add_repo("ada/model", MODEL)
    for action in actions(tmp_path, server.url, token="hf_wrong"):
        with pytest.raises(InputError, match="401") as error:
            action()
        assert "hf_wrong" not in one_line(error)


def test_full_disk_while_downloading(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add_repo("ada/model", MODEL)

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(hub, "snapshot_download", full)
    with pytest.raises(InputError, match="Disk space") as error:
        hub.download("ada/model", tmp_path / "m", endpoint=server.url)
    one_line(error)

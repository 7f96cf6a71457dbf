"""From a Hub id to a pushed checkpoint and back, through the command line, against a local Hub server; no network."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hub_server
import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from hub_server import Account, HubServer
from huggingface_hub import constants
from small_recipe import WITHOUT_SPEED, Done, call_cli, run_cli, small_recipe

import sparsegate.converter
import sparsegate.runtime_onnx as runtime
from sparsegate.converter.modeling.gated import load, load_dense

WRITE, READ, OTHER = "hf_writewritewrite", "hf_readreadread", "hf_otherotherother"
FOREIGN = {
    "pytorch_model.bin": b"pickle",
    "modeling_tiny.py": b"raise SystemExit",
    "onnx/model.onnx": b"graph",
    "consolidated.safetensors": b"other",
    "original/params.json": b"{}",
}
CARD = b"---\nlicense: apache-2.0\nlanguage: en\n---\n# Tiny\n"


class Push(NamedTuple):
    """A conversion of ada/tiny that was pushed to lab/tiny-sparse: its folder, its output, and what the server had
    logged.
    """

    folder: Path
    report: dict[str, Any]
    log: list[str]


@pytest.fixture(scope="module")
def server(tiny_model: Callable[[str], Path]) -> Iterator[HubServer]:
    """A Hub with ada/tiny, a Llama with files that nothing may fetch."""
    model = {path.name: path.read_bytes() for path in tiny_model("llama").iterdir()}
    with HubServer() as hub:
        hub.accounts = {WRITE: Account("ada", orgs={"lab": "write"}), READ: Account("ada", "read")}
        hub.add_repo("ada/tiny", {**model, **FOREIGN, "README.md": CARD, "LICENSE.txt": b"terms"})
        yield hub


@pytest.fixture(scope="module")
def pushed(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Push:
    """`convert --push` in a process of its own, which knows the Hub by its environment alone. The token's user may
    write to `lab`.
    """
    folder = tmp_path_factory.mktemp("push")
    recipe = small_recipe("ada/tiny", folder)
    environment = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": WRITE,
    }
    done = run_cli(
        "convert",
        "--recipe",
        recipe,
        "-o",
        folder / "out",
        "--push",
        "lab/tiny-sparse",
        "--json",
        preamble=WITHOUT_SPEED,
        **environment,
    )
    assert done.returncode == 0 and "\r" not in done.stderr, done.stderr  # no bars of the Hub's client
    return Push(folder / "out", json.loads(done.stdout), list(server.log))


def set_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT does when it is set before the client is imported."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)


@pytest.fixture
def home(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty Hugging Face home for the client in this process, which is ada's."""
    server.log.clear()
    set_endpoint(monkeypatch, server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setenv("HF_TOKEN", WRITE)
    monkeypatch.chdir(tmp_path)
    huggingface_hub.utils.disable_progress_bars()
    return tmp_path / "home"


@pytest.fixture
def call(home: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the command line in this process, against the server."""
    return partial(call_cli, capsys)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that the server sends of each file, by path in the repository."""
    counts: dict[str, int] = {}
    send = hub_server._Handler._send

    def counted(self: Any, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        if self.command == "GET" and "/resolve/" in self.path and isinstance(content, bytes):
            name = self.path.split("/resolve/")[1].split("/", 1)[1]
            counts[name] = counts.get(name, 0) + len(content)
        send(self, status, content, headers)

    monkeypatch.setattr(hub_server._Handler, "_send", counted)
    return counts


def one_line(done: Done) -> str:
    assert done.status == 2 and done.out == "", done
    assert done.err.startswith("sparsegate: ") and done.err.count("\n") == 1, done.err
    assert not any(token in done.err for token in (WRITE, READ, OTHER))
    return done.err


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def fetched(log: list[str], repo: str) -> set[str]:
    """Files of a repository that were asked for by GET."""
    lines = [line.split("/resolve/")[1].split("/", 1)[1] for line in log if line.startswith(f"GET /{repo}/resolve/")]
    return set(lines)


# convert from the Hub and push


def test_only_what_a_conversion_needs_is_fetched(pushed: Push, server: HubServer) -> None:
    names = fetched(pushed.log, "ada/tiny")
    assert names == set(server.repos["ada/tiny"].head.files) - set(FOREIGN)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "LICENSE.txt"} <= names
    assert not pushed.folder.with_name("out.work").exists()


def test_rights_were_asked_before_the_first_file(pushed: Push) -> None:
    first = next(k for k, line in enumerate(pushed.log) if "/resolve/" in line)
    assert pushed.log.index("GET /api/whoami-v2") < first
    assert "POST /api/repos/create" in pushed.log[first:]


def test_manifest_report_and_card_name_the_source(pushed: Push, server: HubServer) -> None:
    commit = server.repos["ada/tiny"].head.sha
    source = json.loads((pushed.folder / "manifest.json").read_text())["source"]
    assert (source["id"], source["revision"]) == ("ada/tiny", commit)
    assert (pushed.report["report"]["model"], pushed.report["report"]["revision"]) == ("ada/tiny", commit)
    card = (pushed.folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["license"], front["library_name"]) == ("ada/tiny", "apache-2.0", "sparsegate")
    assert (pushed.folder / "LICENSE.txt").read_bytes() == b"terms"
    assert f"[ada/tiny]({server.url}/ada/tiny)" in card and 'snapshot_download("lab/tiny-sparse"' in card
    assert commit in card


def test_nothing_in_the_checkpoint_tells_where_it_was_made(pushed: Push) -> None:
    for name, data in contents(pushed.folder).items():
        assert str(pushed.folder.parent).encode() not in data, name
    assert (
        pushed.report["report"]["command"]
        == "sparsegate convert --recipe recipe.yaml -o out --push lab/tiny-sparse --json"
    )


def test_the_repository_is_private_and_its_manifest_came_last(pushed: Push, server: HubServer) -> None:
    repo = server.repos["lab/tiny-sparse"]
    assert repo.private and pushed.report["url"] == f"{server.url}/lab/tiny-sparse"
    assert repo.head.changed == ("manifest.json",)
    assert all("manifest.json" not in commit.files for commit in repo.commits[:-1])
    assert {name: blob.data for name, blob in repo.head.files.items() if name != ".gitattributes"} == contents(
        pushed.folder
    )


def test_convert_and_push_again_change_nothing(pushed: Push, call: Callable[..., Done], server: HubServer) -> None:
    commits = len(server.repos["lab/tiny-sparse"].commits)
    recipe = pushed.folder.with_name("recipe.yaml")
    done = call("convert", "--recipe", recipe, "-o", pushed.folder, "--push", "lab/tiny-sparse")
    assert done.status == 0, done.err
    assert (
        done.out.splitlines()[0] == f"{pushed.folder} is up to date"
        and f"pushed to {server.url}/lab/tiny-sparse" in done.out.splitlines()
    )
    assert not fetched(server.log, "ada/tiny") and not pushed.folder.with_name("out.work").exists()
    assert len(server.repos["lab/tiny-sparse"].commits) == commits


def test_a_moved_source_is_another_conversion(pushed: Push, call: Callable[..., Done], server: HubServer) -> None:
    repo = server.repos["ada/tiny"]
    old = list(repo.commits)
    try:
        repo.commit("change", {**repo.head.files, "notes.txt": repo.head.files["README.md"]}, ("notes.txt",))
        line = one_line(call("convert", "--recipe", pushed.folder.with_name("recipe.yaml"), "-o", pushed.folder))
        assert "another conversion" in line and not fetched(server.log, "ada/tiny")
    finally:
        repo.commits[:] = old


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a port where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    return url


@pytest.mark.parametrize(
    "token, repository, said",
    [
        (READ, "ada/x", "role write"),
        (OTHER, "ada/x", "401"),
        ("", "ada/x", "Hub token, got none"),
        (WRITE, "club/x", "ada, lab"),
        (WRITE, "ada/tiny", "got a repository with another model"),
    ],
)
def test_a_push_that_will_be_refused_is_refused_before_the_work(
    token: str,
    repository: str,
    said: str,
    call: Callable[..., Done],
    server: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    for words in (["convert", "ada/tiny", "-o", tmp_path / "out"], ["convert", "ada/tiny", "--dry-run"], ["convert"]):
        assert said in one_line(call(*words, "--push", repository))
    assert not fetched(server.log, "ada/tiny") - {"config.json"} and not server.created[1:]
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_hub_is_one_line_within_seconds(
    call: Callable[..., Done], dead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_endpoint(monkeypatch, dead)
    start = time.monotonic()
    for words in (
        ["convert", "ada/tiny"],
        ["convert", "--push", "ada/x"],
        ["inspect", "ada/tiny"],
        ["verify", "ada/x"],
        ["generate", "ada/x", "a"],
    ):
        line = one_line(call(*words))
        assert dead in line and "reachable" in line
    assert time.monotonic() - start < 20
    assert list(tmp_path.iterdir()) == []


def test_a_repository_that_does_not_exist(call: Callable[..., Done], tmp_path: Path) -> None:
    for words in (
        ["convert", "ada/nothing"],
        ["inspect", "ada/nothing"],
        ["verify", "ada/nothing"],
        ["bench", "ada/nothing", "ada/nothing"],
    ):
        assert "ada/nothing" in one_line(call(*words))
    assert "sparsegate convert" in one_line(call("generate", "ada/tiny", "x"))  # a model, but no sparse checkpoint
    assert list(tmp_path.iterdir()) == []


# headers only


def test_what_cannot_be_converted_is_not_downloaded(
    call: Callable[..., Done], server: HubServer, sent: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    enough = json.loads(call("convert", "ada/tiny", "--dry-run", "--json").out)["disk_bytes"]
    sent.clear()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=enough - 1))
        assert "Free disk space" in one_line(call("convert", "ada/tiny"))
    files = {name: blob.data for name, blob in server.repos["ada/tiny"].head.files.items()}
    config = json.loads(files["config.json"])
    server.add_repo("ada/foreign", {**files, "config.json": json.dumps(config | {"model_type": "olmo"}).encode()})
    server.add_repo("ada/lying", {**files, "config.json": json.dumps(config | {"intermediate_size": 100}).encode()})
    assert "olmo" in one_line(call("convert", "ada/foreign"))
    assert "must have shape" in one_line(call("convert", "ada/lying"))
    done = call("inspect", "ada/foreign")
    assert done.status == 1 and done.out.splitlines()[0] == "ada/foreign: olmo, cannot be converted" and done.err == ""
    assert set(sent) == {"config.json", "model.safetensors"} and sent["model.safetensors"] <= 4 * 100_001
    assert list(tmp_path.iterdir()) == []


def test_inspect_and_dry_run_fetch_headers_only(
    call: Callable[..., Done],
    server: HubServer,
    sent: dict[str, int],
    tmp_path: Path,
    tiny_model: Callable[[str], Path],
) -> None:
    whole = len(server.repos["ada/tiny"].head.files["model.safetensors"].data)
    assert whole > 300_000  # three times what the client asks for at first
    local = json.loads(call("inspect", tiny_model("llama"), "--json").out)
    done = call("inspect", "ada/tiny", "--json")
    found = json.loads(done.out)
    assert done.status == 0 and found["convertible"]
    for inspected in (local, found):
        estimate = inspected["estimate"]
        assert all(seconds > 0 for seconds in estimate["seconds"].values())
        estimate |= {"seconds": {}, "notes": [], "download_bytes": 0}  # times are measured and never twice the same
    assert found | {"model": "", "download_bytes": 0} == local | {"model": ""}
    needed = {name: len(blob.data) for name, blob in server.repos["ada/tiny"].head.files.items() if name not in FOREIGN}
    assert found["download_bytes"] == sum(needed.values())
    assert "download " in call("inspect", "ada/tiny").out
    dry = json.loads(call("convert", "ada/tiny", "--dry-run", "--json").out)
    assert (
        dry["output"] == "tiny-sparse"
        and dry["disk_bytes"] == local["estimate"]["disk_bytes"] + found["download_bytes"]
    )
    assert (
        set(sent) == {"config.json", "model.safetensors"} and 0 < sent["model.safetensors"] <= 3 * 100_001 < 3 * whole
    )
    assert list(tmp_path.iterdir()) == []


# a checkpoint from the Hub


def test_generate_verify_and_bench_take_a_hub_id(
    pushed: Push, call: Callable[..., Done], server: HubServer, home: Path
) -> None:
    done = call("generate", "lab/tiny-sparse", "import os", "--raw", "--max-new-tokens", "6")
    assert (
        done.status == 0
        and done.out == "import os" + "".join(runtime.generate(pushed.folder, "import os", 6, chat=False)) + "\n"
    )
    place = home / "sparsegate" / "sparse" / "lab--tiny-sparse"
    assert contents(place) == contents(pushed.folder)
    server.log.clear()
    Path("text.txt").write_text("not the text that the manifest means by this name, and far too short")
    done = call("verify", "lab/tiny-sparse", "--source", "ada/tiny")
    assert done.status == 0, done.out
    assert "ok     dense weights" in done.out and "ok     files: 0" in done.out and done.out.endswith("verified\n")
    assert fetched(server.log, "lab/tiny-sparse") == {"manifest.json"} and "model.safetensors" in fetched(
        server.log, "ada/tiny"
    )
    assert sorted(path.name for path in (home / "sparsegate").iterdir()) == ["dense", "sparse"]
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["home", "text.txt"]
    words = ["--prompt-tokens", "8", "--new-tokens", "8", "--pairs", "1", "--json"]
    done = call("bench", "lab/tiny-sparse", pushed.folder, *words)
    assert done.status == 0 and json.loads(done.out)["baseline"]["path"] == str(place / "onnx")


def test_a_linked_folder_is_not_pushed(
    pushed: Push, call: Callable[..., Done], server: HubServer, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(pushed.folder, folder)
    assert call("link", folder).status == 0
    assert "sparsegate unlink" in one_line(call("push", folder, "lab/linked"))
    recipe = pushed.folder.with_name("recipe.yaml")
    assert "sparsegate unlink" in one_line(call("convert", "--recipe", recipe, "-o", folder, "--push", "lab/linked"))
    assert "lab/linked" not in server.repos
    assert call("unlink", folder).status == 0
    done = call("push", folder, "linked", "--public")
    assert done.status == 0 and done.out == f"{server.url}/ada/linked\n" and not server.repos["ada/linked"].private


def test_a_fresh_download_runs_in_onnxruntime_and_torch(pushed: Push, home: Path, tmp_path: Path) -> None:
    """The card's own way to fetch it, then logits of plain ONNX Runtime (without the library) and of torch; the dense
    model is the control.
    """
    folder = Path(huggingface_hub.snapshot_download("lab/tiny-sparse", local_dir=tmp_path / "fresh"))
    assert contents(folder) | {".gitattributes": b""} == contents(pushed.folder) | {".gitattributes": b""}
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    tokens = np.arange(20, 40, dtype=np.int64)[None]
    feeds: dict[str, Any] = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    logits = torch.from_numpy(np.asarray(session.run(["logits"], feeds)[0]))
    with torch.no_grad():
        sparse, dense = (
            model(input_ids=torch.from_numpy(tokens)).logits for model in (load(folder), load_dense(folder))
        )
    bound = 1e-4 * max(1.0, float(sparse.square().mean().sqrt()))
    assert float((logits - sparse).abs().max()) <= bound
    assert float((logits - dense).abs().max()) > 100 * bound


# a checkpoint of a stranger


@pytest.fixture
def hostile(pushed: Push, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts eve/model on the server: the pushed checkpoint with other files, all as its manifest says. Returns the file
    that their library would leave.
    """
    monkeypatch.setenv("HOSTILE_MARK", str(tmp_path / "loaded"))

    def add(**files: bytes) -> Path:
        whole = contents(pushed.folder) | {name.replace("__", "/"): data for name, data in files.items()}
        manifest = json.loads(whole.pop("manifest.json"))
        manifest["files"] = {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in whole.items()
        }
        server.add_repo("eve/model", whole | {"manifest.json": json.dumps(manifest).encode()})
        return tmp_path / "loaded"

    return add


VERBS = (
    ["generate", "eve/model", "a"],
    ["verify", "eve/model"],
    ["eval", "eve/model"],
    ["bench", "eve/model", "eve/model"],
)


def library() -> bytes:
    """A shared library that leaves a file as soon as it is loaded."""
    if not shutil.which("cc"):
        pytest.skip("there is no C compiler")
    code = "void *fopen(const char*, const char*); char *getenv(const char*);"
    code += '__attribute__((constructor)) static void run(void) { fopen(getenv("HOSTILE_MARK"), "w"); }'
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", f"{folder}/x.so"], input=code.encode(), check=True
        )
        return Path(folder, "x.so").read_bytes()


@pytest.mark.parametrize("way", ["a library by its name", "a library under another name", "a pipeline", "a key twice"])
def test_no_verb_runs_what_a_repository_holds(
    way: str, hostile: Callable[..., Path], pushed: Push, call: Callable[..., Done], home: Path
) -> None:
    """Also where the library is called data, so that it could be fetched; a folder that was fetched otherwise is
    treated alike.
    """
    config = json.loads((pushed.folder / "onnx" / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    name = "evil.so" if way == "a library by its name" else "evil.data"
    if way == "a pipeline":
        decoder["pipeline"] = [{"a": {"filename": "model.onnx", "session_options": {"custom_ops_library": name}}}]
    elif way != "a key twice":
        decoder["session_options"]["custom_ops_library"] = name
    text = json.dumps(config)
    if way == "a key twice":
        text = text.replace(
            '"session_options":', f'"session_options": {{"custom_ops_library": "{name}"}}, "session_options":'
        )
    mark = hostile(**{f"onnx__{name}": library(), "onnx__genai_config.json": text.encode()})
    for words in VERBS:
        one_line(call(*words))
    with pytest.raises(ValueError, match="must"):
        sparsegate.converter.load("eve/model")
    if way == "a library by its name":
        assert not (home / "sparsegate" / "sparse").exists(), "nothing was fetched"
    folder = Path(huggingface_hub.snapshot_download("eve/model", local_dir=Path.cwd() / "fetched"))
    for verb in ("generate", "verify", "eval", "link", "unlink", "push"):
        one_line(call(verb, folder, *{"generate": ["a"], "push": ["lab/evil"]}.get(verb, [])))
    assert not mark.exists() and (folder / "onnx" / name).is_file()


def test_a_repository_that_names_other_places_is_refused_by_every_verb(
    hostile: Callable[..., Path], call: Callable[..., Done], tmp_path: Path, home: Path
) -> None:
    (tmp_path / "victim.json").write_text("mine")
    hostile(**{"..__..__..__..__victim.json": b"theirs"})
    for words in VERBS:
        assert "must name files inside its own folder" in one_line(call(*words))
    assert (tmp_path / "victim.json").read_text() == "mine" and not (home / "sparsegate").exists()

"""Every example app, run as a person runs it, against the runtime's own greedy tokens."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import sparsegate.runtime_onnx as runtime

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "runtime_onnx"))

import onnx_folders as folders  # noqa: E402

TOKENS = 12


def greedy(prompt: str) -> list[int]:
    """Greedy continuation by the KV-cache loop of the package, in standard ops."""
    folder = folders.sparse("gate")
    decoder = runtime.Decoder(folder, library=False)
    tokens = [int(decoder(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prompt).ids)[-1].argmax())]
    while len(tokens) < TOKENS:
        tokens.append(int(decoder(tokens[-1:])[-1].argmax()))
    return tokens


def decode(tokens: list[int]) -> str:
    """Text of token ids."""
    return Tokenizer.from_file(str(folders.sparse("gate") / "tokenizer.json")).decode(tokens)


def run(*command: str, stdin: str = "", cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program that must succeed."""
    done = subprocess.run(command, input=stdin, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_ort_decode(tmp_path: Path) -> None:
    """A checkpoint folder with onnx/ inside: the same text with sparsegate's kernel and where sparsegate is not
    installed.
    """
    shutil.copytree(folders.sparse("gate"), tmp_path / "out" / "onnx")
    example = str(ROOT / "examples" / "ort_decode.py")
    arguments = [str(tmp_path / "out"), folders.PROMPT, "--raw", "--tokens", str(TOKENS)]
    expected = folders.PROMPT + decode(greedy(folders.PROMPT))
    done = run(sys.executable, example, *arguments, cwd=tmp_path)
    assert done.stdout == expected + "\n" and "native kernel" in done.stderr
    hidden = (
        f"import runpy, sys; sys.modules['sparsegate'] = None; sys.argv = {[example, *arguments]!r}; "
        f"runpy.run_path({example!r}, run_name='__main__')"
    )
    done = run(sys.executable, "-c", hidden, cwd=tmp_path)
    assert done.stdout == expected + "\n" and "not installed" in done.stderr


def test_ort_decode_chats(tmp_path: Path) -> None:
    """A model with a template answers in it; one without goes on with the text."""
    folder, example = folders.copy(folders.sparse("gate"), tmp_path / "onnx"), str(ROOT / "examples" / "ort_decode.py")
    arguments = [sys.executable, example, str(folder), "hello", "--tokens", str(TOKENS)]
    assert run(*arguments, cwd=tmp_path).stdout == decode(greedy("user: hello\nassistant: ")) + "\n"
    (folder / "chat_template.jinja").unlink()
    assert run(*arguments, cwd=tmp_path).stdout == "hello" + decode(greedy("hello")) + "\n"


def test_ort_decode_downloads_real_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is no folder is a Hub repository; the data in its onnx/ comes into a local folder, not into a cache
    of links.
    """
    import huggingface_hub

    def download(repository: str, local_dir: str, allow_patterns: list[str]) -> str:
        assert repository == "owner/model" and allow_patterns == [
            "onnx/*.onnx",
            "onnx/*.data",
            "onnx/*.json",
            "onnx/*.jinja",
        ]
        shutil.copytree(folders.sparse("gate"), Path(local_dir) / "onnx")
        return local_dir

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(ROOT / "examples" / "ort_decode.py"))["find_folder"]("owner/model")
    assert found == Path("owner--model/onnx") and (found / "model.onnx").is_file()


def test_genai_chat(tmp_path: Path) -> None:
    """One turn goes through the chat template; talking keeps the history; sampling is seeded."""
    folder = str(folders.sparse("gate"))
    command = [sys.executable, str(ROOT / "examples" / "genai_chat.py"), folder, "--tokens", str(TOKENS)]
    first = decode(greedy("user: hello\nassistant: "))
    done = run(*command, "--temperature", "0", "--prompt", "hello", cwd=tmp_path)
    assert done.stdout == first + "\n" and "native kernel" in done.stderr
    second = decode(greedy(f"user: hello\nassistant: {first}\nuser: more\nassistant: "))
    done = run(*command, "--temperature", "0", stdin="hello\nmore\n", cwd=tmp_path)
    assert done.stdout == f"> {first}\n> {second}\n> \n"
    samples = [
        run(*command, "--temperature", "2", "--prompt", "hello", "--seed", seed, cwd=tmp_path).stdout
        for seed in ("1", "1", "2")
    ]
    assert samples[0] == samples[1] != samples[2]


def test_genai_chat_without_template(tmp_path: Path) -> None:
    """A base model has no chat template: the words go in as they are."""
    folder = folders.copy(folders.sparse("gate"), tmp_path / "onnx")
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    arguments = ["--tokens", str(TOKENS), "--temperature", "0", "--prompt", "hello"]
    assert (
        run(sys.executable, str(ROOT / "examples" / "genai_chat.py"), str(folder), *arguments, cwd=tmp_path).stdout
        == decode(greedy("hello")) + "\n"
    )


@pytest.fixture(scope="session")
def node_app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/node with onnxruntime-node from the npm registry; skips where that cannot be had."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("node and npm are not installed")
    app = tmp_path_factory.mktemp("node") / "app"
    shutil.copytree(ROOT / "examples" / "node", app, ignore=shutil.ignore_patterns("node_modules"))
    try:  # no scripts: they would fetch CUDA libraries
        done = subprocess.run(
            ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"],
            cwd=app,
            capture_output=True,
            text=True,
            timeout=180,
        )
    except subprocess.TimeoutExpired:
        pytest.skip("npm did not fetch onnxruntime-node within 3 minutes")
    if done.returncode:
        pytest.skip(f"npm cannot fetch onnxruntime-node here: {done.stderr.strip().splitlines()[-1]}")
    return app


def test_node(node_app: Path) -> None:
    """JavaScript runs the function bodies and gives the same text: in the chat template, and as it is."""
    folder = str(folders.sparse("gate"))
    done = run("node", "main.mjs", folder, folders.PROMPT, str(TOKENS), "--raw", cwd=node_app)
    assert done.stdout == folders.PROMPT + decode(greedy(folders.PROMPT)) + "\n"
    done = run("node", "main.mjs", folder, "hello", str(TOKENS), cwd=node_app)
    assert done.stdout == decode(greedy("user: hello\nassistant: ")) + "\n"


def test_node_refuses_nonsense(node_app: Path) -> None:
    """Wrong arguments end with the usage line and exit code 2."""
    done = subprocess.run(
        ["node", "main.mjs", "folder", "text", "many"], cwd=node_app, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "a number of tokens" in done.stderr

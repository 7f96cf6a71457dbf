"""Model folders of strangers: no code of theirs is run or handed on, no link is followed out of the folder, and every
reader sees the same content.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_hub import make_checkpoint

from sparsegate.converter.checkpoint.source import INDEX, SINGLE, open_source
from sparsegate.converter.checkpoint.writer import write_checkpoint
from sparsegate.converter.pipeline.evaluate import evaluate
from sparsegate.converter.report.card import read_base_card
from sparsegate.converter.report.html import make_report
from sparsegate.converter.sources.named import resolve
from sparsegate.converter.sources.published import normalise
from sparsegate.runtime_onnx.errors import InputError

ROOT = Path(__file__).parents[3]
CODE = "import os\nopen(os.environ['HOSTILE_MARK'], 'w').close()\nclass Thing:\n    pass\n"
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    INDEX,
)


@pytest.fixture
def model(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def shard(folder: Path, file: str) -> None:
    """Keep the weights in a file of another name, which the index gives."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}))


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and ", got" in text, text
    return text


# one content


@pytest.mark.parametrize("name", FILES)
def test_a_key_that_stands_twice_is_refused(model: Path, name: str) -> None:
    if name == INDEX:
        shard(model, "model-00001-of-00001.safetensors")
    text = (model / name).read_text() if (model / name).is_file() else '{"a": 1}'
    first = json.dumps(next(iter(json.loads(text))))
    (model / name).write_text(text.rstrip()[:-1] + f", {first}: {{}}}}")
    with pytest.raises(InputError, match=f"the key {first[1:-1]!r} twice in one object") as error:
        open_source(model).tokenizer()
    assert name in one_line(error)


def test_values_too_deep_are_one_line(model: Path) -> None:
    (model / "config.json").write_text('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}")
    with pytest.raises(InputError, match="too deep") as error:
        open_source(model)
    one_line(error)


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "/tmp/other.safetensors",
        "..",
        ".",
        "",
        "a/b.safetensors",
        "C:x.safetensors",
        "a\\b.safetensors",
    ],
)
def test_an_index_names_files_beside_it(model: Path, name: str) -> None:
    shutil.copyfile(model / SINGLE, model.parent / "other.safetensors")
    shard(model, name)
    with pytest.raises(InputError, match="must") as error:
        open_source(model)
    assert INDEX in one_line(error)


# links


@pytest.mark.parametrize(
    "name", ["LICENSE", "NOTICE", "tokenizer_config.json", "generation_config.json", "config.json"]
)
def test_what_a_link_leads_to_is_not_copied(model: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    shutil.move(model / name, secret) if (model / name).exists() else secret.write_text("private")
    (model / name).symlink_to(secret)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="must be a regular file to be copied, got a link to") as error:
        write_checkpoint(open_source(model), {}, tmp_path / "out")
    assert str(model / name) in one_line(error) and not (tmp_path / "out" / name).exists()
    if name.isupper():
        with pytest.raises(InputError, match="must be a regular file"):
            read_base_card(model)


def test_a_linked_card_is_not_read(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("---\nlicense: private\n---\n")
    (model / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="must be a regular file"):
        read_base_card(model)


def test_the_hubs_cache_is_a_model_folder(model: Path, tmp_path: Path) -> None:
    """A snapshot there is links into its blobs, and they are what a person means; so are weights that lie on another
    disk.
    """
    (model / "LICENSE").write_text("terms")
    shard(model, "model-00001-of-00001.safetensors")
    place = tmp_path / "models--ada--tiny"
    snapshot = place / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (place / "blobs").mkdir()
    for path in model.iterdir():
        blob = place / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(open_source(snapshot), {}, out)
    assert (out / "LICENSE").read_text() == "terms" and read_base_card(snapshot).files
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    assert open_source(out, sparse=True).tensors.keys() == open_source(model).tensors.keys()


def test_a_published_folder_passes_no_link_on(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (model / "added_tokens.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="must be a regular file"):
        normalise(model, tmp_path / "out", "drelu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", [make_report, evaluate])
def test_results_are_written_through_no_link(tmp_path: Path, write: Callable[[Path], object]) -> None:
    folder = make_checkpoint(tmp_path / "out")
    (tmp_path / "mine").mkdir()
    shutil.rmtree(folder / "report")
    (folder / "report").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match=r"must hold regular files and folders alone, got report, a link") as error:
        write(folder)
    one_line(error)
    assert list((tmp_path / "mine").iterdir()) == []


# code


@pytest.mark.parametrize("place", ["code.Thing", "eve/other--code.Thing"])
def test_code_of_the_model_is_neither_run_nor_handed_on(
    model: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOSTILE_MARK", str(tmp_path / "ran"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks where it may
    (model / "code.py").write_text(CODE)
    change(
        model / "config.json",
        auto_map={"AutoConfig": place, "AutoModelForCausalLM": place, "AutoTokenizer": [place, place]},
    )
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [place, place]})
    with caplog.at_level(logging.WARNING, logger="sparsegate"):
        source = resolve(str(model), tmp_path / "work" / "source")
    said = "names code of the model's own (auto_map): it is not run, and left out of what is written."
    assert [record.message for record in caplog.records] == [
        f"{name} of model {said}" for name in ("config.json", "tokenizer_config.json")
    ]
    assert len(source.tokenizer().encode("def")) > 0
    (tmp_path / "out").mkdir()
    write_checkpoint(source, {}, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))
    for path in (tmp_path / "out").glob("*.json"):
        assert "auto_map" not in path.read_text(), path
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_needs_its_code_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is asked whether to run it."""
    monkeypatch.setenv("HOSTILE_MARK", str(tmp_path / "ran"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (model / "code.py").write_text(CODE)
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Thing", None]}, tokenizer_class="Thing")
    (model / "tokenizer.json").rename(model / "vocab.txt")
    with pytest.raises(InputError, match="The tokenizer must load") as error:
        open_source(model).tokenizer()
    one_line(error)
    assert not (tmp_path / "ran").exists()


def test_kernels_of_a_repository_are_refused(model: Path) -> None:
    change(model / "config.json", attn_implementation="eve/kernel")
    with pytest.raises(InputError, match="must be one of transformers' own, got 'eve/kernel'") as error:
        open_source(model)
    one_line(error)


def test_transformers_is_never_asked_to_trust_a_model() -> None:
    """Every call that could run code of a repository says that it must not."""
    calls = 0
    for path in [
        *(ROOT / "converter").rglob("*.py"),
        *(ROOT / "runtime_onnx").rglob("*.py"),
        *(ROOT / "examples").rglob("*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                not isinstance(node, ast.Call)
                or not isinstance(node.func, ast.Attribute)
                or node.func.attr not in ("from_pretrained", "from_config")
            ):
                continue
            if not ast.unparse(node.func.value).startswith("Auto"):
                continue
            calls += 1
            trusts = [ast.unparse(word.value) for word in node.keywords if word.arg == "trust_remote_code"]
            assert trusts == ["False"], f"{path.relative_to(ROOT)}:{node.lineno}"
    assert calls >= 6
    assert '"hf_remote=false"' in (ROOT / "converter" / "onnx_export" / "base_graph.py").read_text(encoding="utf-8")

"""The command line: status and streams of every verb."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import make_model
from small_recipe import Done, one_line, small_recipe

import sparsegate.runtime_onnx as runtime
from sparsegate.converter.checkpoint.stage import CheckError
from sparsegate.converter.cli import main
from sparsegate.converter.pipeline import convert as conversion
from sparsegate.converter.pipeline import opening

TINY = 16  # of bench: tokens of the prompt and new ones fit the tiny models


def test_dry_run(
    call: Callable[..., Done], tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    done = call("convert", model, "--dry-run")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[0] == "would write llama-sparse; nothing was written"
    assert "peak memory" in done.out and "disk needed" in done.out and "method trained_gate" in done.out
    done = call("convert", model, "-o", "x", "--method", "gate", "--sparsity", "0.25", "--dry-run", "--json")
    assert (done.status, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["output"] == "x" and found["dry_run"] is True and set(found["expected_cost"]) == {"gate"}
    assert found["expected_cost"]["gate"] == pytest.approx(
        (1 + 2 * 0.75) / 3
    )  # every gate row, the kept up and down rows
    done = call("convert", model, "--method", "chess+teal", "--dry-run")
    assert "method chess+teal" in done.out and "method chess\n" not in done.out
    for words in (["--max-kl", "0.1"], ["--method", "imported"]):
        done = call("convert", model, *words, "--dry-run")
        assert done.status == 0 and "expected cost" not in done.out and "disk needed" in done.out, (
            "what a budget or files decide is not known before"
        )
    assert "expected cost" in call("convert", model, "--max-kl", "0.1", "--sparsity", "0.5", "--dry-run").out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_the_bundled_model_needs_no_hub(
    call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opening, "remote_inspect", refuse)
    done = call("convert", "--dry-run")
    assert done.status == 0 and done.out.startswith("would write sparsegate-small-sparse;")
    with pytest.raises(AssertionError, match="the Hub was asked"):
        main(["convert", "ada/model", "--dry-run"])


def test_convert_json_is_all_that_stands_on_stdout(conversion_run: tuple[Path, Any]) -> None:
    folder, done = conversion_run
    found = json.loads(done.stdout)
    assert found["output"] == str(folder) and found["up_to_date"] is False and found["url"] is None
    assert [row["method"] for row in found["report"]["rows"]] == ["dense", "gate"] and found["verdict"][
        "sentence"
    ].endswith("speed was not measured.")
    assert found["report"] == json.loads((folder / "report" / "report.json").read_text())
    assert "Traceback" not in done.stderr


def test_convert_again_is_up_to_date(converted: Path, call: Callable[..., Done]) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in converted.rglob("*")}
    recipe = converted.parent / "recipe.yaml"
    done = call("convert", "--recipe", recipe, "-o", converted)
    assert done.status == 0 and done.out.splitlines()[0] == f"{converted} is up to date"
    assert "gate" in done.out and "layers.1.ffn" in done.out and done.out.splitlines()[-1].startswith("Reads 0.")
    assert json.loads(call("convert", "--recipe", recipe, "-o", converted, "--json").out)["up_to_date"] is True
    assert {path: path.stat().st_mtime_ns for path in converted.rglob("*")} == stamps


def test_inspect(call: Callable[..., Done], tiny_model: Callable[[str], Path]) -> None:
    model = tiny_model("llama")
    done = call("inspect", model)
    assert (done.status, done.err) == (0, "")
    assert (
        "llama, can be converted" in done.out
        and "2 feed-forward networks of 176 neurons, width 64, activation silu" in done.out
    )
    found = json.loads(call("inspect", model, "--json").out)
    assert found["convertible"] and (found["sites"], found["units"], found["hidden"]) == (2, 176, 64)
    assert found["estimate"]["source_bytes"] > 0.9 * (model / "model.safetensors").stat().st_size


# the checkpoint


def test_inspect_says_that_a_checkpoint_is_sparse_already(converted: Path, call: Callable[..., Done]) -> None:
    done = call("inspect", converted)
    assert done.status == 1 and "sparse already" in done.out and done.err == ""


def test_link_and_unlink(converted: Path, call: Callable[..., Done], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(converted, folder)
    before = (folder / "onnx" / "genai_config.json").read_bytes()
    done = call("link", folder)
    library = folder / "onnx" / runtime.library_path().name
    assert done.status == 0 and str(library) in done.out and library.is_file()
    assert call("generate", folder, "import os", "--max-new-tokens", "4").status == 0
    assert "must not be linked" in one_line(call("push", folder, "ada/name"))
    assert call("unlink", folder).out == f"unlinked {folder}\n"
    assert not library.exists() and (folder / "onnx" / "genai_config.json").read_bytes() == before
    assert call("unlink", folder).out == f"{folder} was not linked\n"


def test_verify_and_its_status(converted: Path, call: Callable[..., Done], tmp_path: Path) -> None:
    done = call("verify", converted, "--source", converted)
    assert done.status == 2 and "sparse already" in done.err  # a checkpoint is no dense model to compare with
    done = call("verify", converted)
    assert done.status == 0 and done.out.splitlines()[-1] == "verified"
    assert "FAILED" not in done.out and "ok     files" in done.out and "layers.0.ffn" in done.out
    folder = tmp_path / "out"
    shutil.copytree(converted, folder)
    with open(folder / "report" / "report.json", "a") as file:
        file.write("\n")
    done = call("verify", folder, "--json")
    assert done.status == 1
    assert [check["name"] for check in json.loads(done.out)["checks"] if not check["passed"]] == ["files"]
    (folder / "manifest.json").unlink()
    assert "manifest.json" in one_line(call("verify", folder))


def test_bench(converted: Path, call: Callable[..., Done], tmp_path: Path) -> None:
    dense = converted.with_name("out.work") / "base"
    words = ["bench", dense, converted, "--prompt-tokens", TINY, "--new-tokens", TINY, "--pairs", "2", "--threads", "1"]
    found = json.loads(call(*map(str, words), "--json", "-o", tmp_path / "bench.json").out)
    assert found == json.loads((tmp_path / "bench.json").read_text())
    assert (
        found["settings"]
        | {"prompt_tokens": TINY, "new_tokens": TINY, "pairs": 2, "threads": 1, "runtime": "onnxruntime"}
        == found["settings"]
    )
    assert "dense" in found["baseline"]["executor"] and found["candidate"]["path"] == str(converted / "onnx")
    done = call(*map(str, words))
    assert done.status == 0 and "times the baseline's speed" in done.out and "prefill" in done.out
    built = json.loads(call("bench", converted, *map(str, words[3:]), "--json").out)
    assert (
        built["candidate"]["path"] == str(converted / "onnx")
        and built["baseline"]["precision"] == found["baseline"]["precision"]
    )


def test_a_check_that_fails_has_another_status_than_a_mistake(
    call: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise CheckError("A checkpoint must hold its budget, got one that does not. Loosen it.")

    monkeypatch.setattr(conversion, "choose", fails)
    done = call(
        "convert",
        "--recipe",
        small_recipe(make_model("llama", tmp_path / "model"), tmp_path),
        "-o",
        tmp_path / "out",
        "--quiet",
    )
    assert (
        done.status == 1
        and done.err == "sparsegate: A checkpoint must hold its budget, got one that does not. Loosen it.\n"
    )
    assert not (tmp_path / "out").exists() and (tmp_path / "out.work" / "plan").is_dir()

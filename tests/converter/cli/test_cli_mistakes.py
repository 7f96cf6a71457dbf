"""The command line: every user's mistake in one line, and a defect with its traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from models import make_model
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph
from safetensors import SafetensorError
from small_recipe import Done, one_line, run_cli

from sparsegate.converter.cli import main
from sparsegate.converter.pipeline import doctor as diagnosis
from sparsegate.runtime_onnx.errors import InputError


@pytest.mark.parametrize(
    "words, said",
    [
        (["convert", "./nothing"], "MODEL must be a model folder or a Hub id"),
        (["convert", "TMP"], "config.json"),
        (["convert", "MODEL", "--sparsity", "1.5"], "sparsity must lie strictly between 0 and 1, got 1.5"),
        (["convert", "MODEL", "--sparsity", "nan"], "sparsity must lie strictly between 0 and 1"),
        (
            ["convert", "MODEL", "--max-ppl-increase", "little"],
            "--max-ppl-increase must be a share like 1% or 0.01, got 'little'",
        ),
        (["convert", "MODEL", "--max-ppl-increase", "%"], "--max-ppl-increase must be a share"),
        (["convert", "MODEL", "--max-ppl-increase", "-1%"], "max_ppl_increase must be valid, got -0.01"),
        (["convert", "MODEL", "--max-ppl-increase", "nan"], "max_ppl_increase must be valid"),
        (["convert", "MODEL", "--max-kl", "-1"], "max_kl must be valid"),
        (["convert", "--recipe", "TMP/nothing.yaml"], "The recipe must be a YAML file, got nothing at"),
        (["convert", "--recipe", "TMP"], "The recipe must be a YAML file"),
        (["convert", "--recipe", "TMP/broken.yaml"], "The recipe must be a YAML file"),
        (["convert", "--recipe", "TMP/list.yaml"], "The recipe must be a mapping"),
        (["convert", "--recipe", "TMP/odd.yaml"], "surprise must be valid"),
        (
            ["convert", "MODEL", "--recipe", "TMP/odd.yaml"],
            "MODEL must stand without a recipe that names its model, got",
        ),
        (["convert", "--recipe", "TMP/odd.yaml", "--sparsity", "0.5", "--seed", "0"], "got sparsity, seed as well"),
        (["convert", "MODEL", "--method", "magic"], "magic"),
        (["convert", "MODEL", "--method", "gate+chess"], "A joined method must be one of gate, chess"),
        (["convert", "MODEL", "--method", "teal+magic"], "got 'teal+magic'"),
        (
            ["convert", "MODEL", "--method", "predictor+teal", "--max-kl", "1"],
            "trained end to end alone, got predictor+teal",
        ),
        (
            ["convert", "MODEL", "--method", "imported", "--sparsity", "0.5"],
            "sparsity must stand without method imported",
        ),
        (
            ["convert", "MODEL", "--precision", "int2"],
            "precision must be one of fp32, fp16, bf16, int8, int4, got 'int2'",
        ),
        (["convert", "MODEL", "--target", "npu"], "target must be one of cpu, cuda, got 'npu'"),
        (["convert", "MODEL", "--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["convert", "MODEL", "--seed", "-1"], "seed must be valid"),
        (["convert", "MODEL", "--seed", "9223372036854775808"], "seed must be valid"),
        (["tune", "MODEL", "--seed", "9223372036854775808"], "seed must be from 0 to 4294967295"),
        (["convert", "MODEL", "--calibration", "/dev/zero"], "must be a regular UTF-8 file"),
        (["convert", "MODEL", "-o", "TMP"], "OUT must be a new folder"),
        (["convert", "MODEL", "--calibration", "TMP/nothing.txt"], "TMP/nothing.txt"),
        (["convert", "MODEL", "--push", "no spaces, please"], "owner/name"),
        (["inspect", "./nothing"], "MODEL must be a model folder"),
        (["generate", "./nothing", "x"], "The model must be an ONNX folder"),
        (["generate", "TMP", "x"], "The model must be an ONNX folder"),
        (["verify", "./nothing"], "DIR must be a sparse checkpoint"),
        (["verify", "MODEL"], "manifest.json"),
        (["eval", "./nothing"], "DIR must be a sparse checkpoint"),
        (["eval", "TMP"], "manifest.json"),
        (["eval", "TMP", "--windows", "0"], "windows must be at least 1, got 0"),
        (["report", "./nothing"], "DIR must be a sparse checkpoint"),
        (["report", "MODEL"], "manifest.json"),
        (["bench", "./nothing", "TMP"], "The model must be an ONNX folder"),
        (["bench", "TMP", "TMP", "--pairs", "0"], "pairs must be at least 1"),
        (["bench"], "bench must get DENSE and DIR, one DIR, --shape or --op"),
        (["bench", "--shape", "llama-2b"], "--shape must be one of llama-1b"),
        (["push", "TMP", "a/b"], "manifest.json"),
        (["link", "TMP"], "The model must be an ONNX folder"),
        (["unlink", "./nothing"], "The model must be an ONNX folder"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    said: str,
    call: Callable[..., Done],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in {"broken.yaml": "a: [", "list.yaml": "- 1", "odd.yaml": "model: x\nsurprise: 1\n"}.items():
        (folder / name).write_text(text)
    fill = {"TMP": str(folder), "MODEL": str(tiny_model("llama"))}
    filled = [word.replace("TMP", fill["TMP"]) if "TMP" in word else fill.get(word, word) for word in words]
    assert said.replace("TMP", fill["TMP"]) in one_line(call(*filled))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert len(list(folder.iterdir())) == 3


def test_a_gpu_that_is_not_there(
    call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "Use --device cpu" in one_line(call("convert", tiny_model("llama"), "--device", "cuda"))


def test_an_unknown_architecture_is_one_line_and_inspect_reports_it(call: Callable[..., Done], tmp_path: Path) -> None:
    model = make_model("olmo", tmp_path / "model")
    line = one_line(call("convert", model, "-o", tmp_path / "out"))
    assert "olmo" in line and "llama" in line and "qwen2" in line
    assert not (tmp_path / "out.work").exists()
    done = call("inspect", model)
    assert (done.status, done.err) == (1, "")
    assert done.out.splitlines() == [
        f"{model}: olmo, cannot be converted",
        line.removeprefix("sparsegate: ").rstrip("\n"),
    ]
    done = call("inspect", model, "--json")
    assert done.status == 1
    assert json.loads(done.out)["convertible"] is False and json.loads(done.out)["model_type"] == "olmo"


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = run_cli("link", tmp_path / "nothing")
    one_line(Done(done.returncode, done.stdout, done.stderr))


def broken(kind: str) -> None:
    if kind == "a user's mistake":
        raise InputError("x must be 1,\n  got 2. Do so.")
    if kind == "ours":
        raise ValueError("a defect")
    if kind == "theirs":
        json.loads("{")
    int("a defect")


def test_a_defect_keeps_its_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no InputError is no user's mistake, wherever it happened."""
    monkeypatch.setitem(broken.__globals__, "__name__", "sparsegate.test")
    monkeypatch.setattr(diagnosis, "diagnose", lambda: broken("a user's mistake"))
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert capsys.readouterr().err == "sparsegate: x must be 1, got 2. Do so.\n"
    for kind, error in (("ours", ValueError), ("theirs", json.JSONDecodeError), ("int", ValueError)):
        monkeypatch.setattr(diagnosis, "diagnose", lambda kind=kind: broken(kind))
        with pytest.raises(error):
            main(["doctor"])


def test_errors_of_the_system_are_one_line(call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    def denied() -> None:
        raise PermissionError(13, "Permission denied", "/x")

    monkeypatch.setattr(diagnosis, "diagnose", denied)
    done = call("doctor")
    assert (
        (done.status, done.out) == (2, "")
        and done.err.count("\n") == 1
        and "Permission denied" in done.err
        and "/x" in done.err
    )

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(diagnosis, "diagnose", interrupted)
    done = call("doctor")
    assert done.status == 130 and "Interrupted" in done.err and "Traceback" not in done.err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 1 TiB"), "The work must fit into memory, got: Unable to allocate 1 TiB"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
            "The work must fit into memory",
        ),
        (RecursionError("maximum recursion depth exceeded"), "Values must not lie so deep"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), "Names and texts must be UTF-8"),
        (RuntimeError("Symlink loop from 'x'"), "A path must lead to a file or folder, got a link to itself"),
        (InvalidGraph("Node (a) is\nbroken"), "ONNX Runtime must be able to read the files, got: Node (a) is broken"),
        (SafetensorError("header too large"), "safetensors must be able to read the files, got: header too large"),
    ],
)
def test_what_no_reader_refused_is_one_line(
    error: Exception, said: str, call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(diagnosis, "diagnose", fail)
    done = call("doctor")
    assert (
        (done.status, done.out) == (2, "") and done.err.startswith(f"sparsegate: {said}") and done.err.count("\n") == 1
    ), done


def test_no_terminal_takes_commands_from_a_file(call: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x\x1b[31m\ny"}))
    for done in (call("inspect", tmp_path), call("convert", tmp_path, "-o", tmp_path / "out")):
        assert done.status and "\\x1b[31m" in done.out + done.err
        assert all(line.isprintable() for line in (done.out + done.err).splitlines()), done

"""The command line: flags against functions, what help imports, status and streams of every verb, and every user's
mistake in one line.
"""

from __future__ import annotations

import inspect as signatures
import json
import shutil
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from models import make_model
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph
from safetensors import SafetensorError
from small_recipe import WITHOUT_SPEED, Done, call_cli, run_cli, small_recipe

import sparsegate.runtime_onnx as runtime
from sparsegate.converter import report as reporting
from sparsegate.converter.checkpoint.stage import CheckError
from sparsegate.converter.cli import VERBS, main
from sparsegate.converter.methods import METHODS
from sparsegate.converter.pipeline import convert as conversion
from sparsegate.converter.pipeline import doctor as diagnosis
from sparsegate.converter.pipeline import evaluate as evaluation
from sparsegate.converter.pipeline import push as push_module
from sparsegate.converter.pipeline import verify as verify_module

TINY = 16  # of bench: tokens of the prompt and new ones fit the tiny models


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the command line in this process."""
    return partial(call_cli, capsys)


def one_line(done: Done) -> str:
    """The single line on stderr of a user's mistake; nothing stands on stdout."""
    assert done.status == 2 and done.out == "", done
    assert done.err.startswith("sparsegate: ") and done.err.count("\n") == 1 and done.err.endswith("\n"), done.err
    assert "must" in done.err and "got" in done.err, done.err
    return done.err


@pytest.fixture(scope="module")
def conversion_run(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """`convert --json` of a tiny Llama in a process of its own: the folder that it wrote, and the process."""
    folder = tmp_path_factory.mktemp("cli")
    recipe = small_recipe(tiny_model("llama"), folder)
    done = run_cli(
        "convert", "--recipe", recipe, "-o", folder / "out", "--keep-stages", "--json", preamble=WITHOUT_SPEED
    )
    assert done.returncode == 0, done.stderr
    return folder / "out", done


@pytest.fixture(scope="module")
def converted(conversion_run: tuple[Path, Any]) -> Path:
    """A sparse checkpoint; copy it before changing anything in it. The dense graph lies in out.work/base, the recipe
    beside it.
    """
    return conversion_run[0]


# flags and functions

FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, str], set[str]]] = {
    "convert": (conversion.convert, {"push": "push_to"}, {"json"}),
    "tune": (import_module("sparsegate.converter.pipeline.tune").tune, {}, {"json"}),
    "inspect": (import_module("sparsegate.converter.pipeline.inspect").inspect, {}, {"json"}),
    "generate": (runtime.generate, {"model": "path", "body": "library"}, set()),
    "verify": (verify_module.verify, {}, {"json"}),
    "eval": (evaluation.evaluate, {}, {"json"}),
    "bench": (import_module("sparsegate.converter.evaluation.speed.run").bench, {}, {"json"}),
    "report": (reporting.make_report, {}, set()),
    "push": (push_module.push, {"repository": "repo_id", "public": "private"}, set()),
    **{name: (getattr(runtime, name), {}, set()) for name in ("link", "unlink")},
    "doctor": (diagnosis.diagnose, {}, {"json"}),
}
INVERTED = {("generate", "body"): (False, None), ("push", "public"): (False, True)}
"""Flags whose function has the opposite: default of the flag, default of the function."""


def parameters(function: Callable[..., Any]) -> dict[str, signatures.Parameter]:
    return dict(signatures.signature(function).parameters)


@pytest.mark.parametrize("verb", VERBS)
def test_flags_are_the_parameters_of_the_function(verb: str) -> None:
    function, renamed, shown = FUNCTIONS[verb]
    theirs = parameters(function)
    flags = parameters(getattr(import_module(f"sparsegate.converter.cli.{verb}"), verb))
    for name, flag in flags.items():
        if name in shown or name in ("quiet", "verbose"):
            assert flag.default in (False, None)
            continue
        other = theirs[renamed.get(name, name)]
        assert (flag.default, other.default) == INVERTED.get((verb, name), (other.default, other.default)), name
    needed = {name for name, parameter in theirs.items() if parameter.default is parameter.empty}
    assert needed <= {renamed.get(name, name) for name in flags}


def recorded(monkeypatch: pytest.MonkeyPatch, target: str, result: Any) -> list[dict[str, Any]]:
    """Put a function that returns `result` in the place of `target` and keep the arguments of its calls, by the
    parameters' names.
    """
    module, name = target.rsplit(".", 1)
    real, calls = signatures.signature(getattr(import_module(module), name)), []

    def fake(*args: Any, **kwargs: Any) -> Any:
        calls.append(dict(real.bind(*args, **kwargs).arguments))
        return result

    monkeypatch.setattr(import_module(module), name, fake)
    return calls


def test_every_flag_of_convert_arrives(
    call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]
) -> None:
    names, found = set(parameters(conversion.convert)), conversion.convert(str(tiny_model("llama")), dry_run=True)
    calls = recorded(monkeypatch, "sparsegate.converter.pipeline.convert.convert", found)
    assert (
        call(
            "convert",
            "m",
            "-o",
            "o",
            "--method",
            "gate",
            "--sparsity",
            "0.25",
            "--max-ppl-increase",
            "2%",
            "--max-kl",
            "0.5",
            "--recipe",
            "r",
            "--calibration",
            "c",
            "--precision",
            "p",
            "--target",
            "t",
            "--seed",
            "7",
            "--device",
            "d",
            "--push",
            "a/b",
            "--public",
            "--dry-run",
            "--keep-stages",
            "--time-budget",
            "20m",
        ).status
        == 0
    )
    assert calls[0].pop("command").startswith("sparsegate convert m -o o --method gate ")
    assert calls == [
        {
            "model": "m",
            "output": Path("o"),
            "method": "gate",
            "sparsity": 0.25,
            "max_ppl_increase": 0.02,
            "max_kl": 0.5,
            "recipe": Path("r"),
            "calibration": Path("c"),
            "precision": "p",
            "target": "t",
            "seed": 7,
            "device": "d",
            "push_to": "a/b",
            "public": True,
            "dry_run": True,
            "keep_stages": True,
            "time_budget": "20m",
        }
    ]
    assert {*calls[0], "command"} == names
    call("convert", "--max-ppl-increase", "0.03")
    assert calls[1]["max_ppl_increase"] == 0.03


def test_every_flag_of_generate_push_and_verify_arrives(
    call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = recorded(monkeypatch, "sparsegate.runtime_onnx.generate", iter(["b", "c"]))
    done = call(
        "generate",
        tmp_path,
        "a",
        "--max-new-tokens",
        "3",
        "--temperature",
        "0.5",
        "--top-k",
        "4",
        "--top-p",
        "0.75",
        "--seed",
        "6",
        "--body",
        "--raw",
    )
    assert done == Done(0, "abc\n", "")
    assert calls == [
        {
            "path": tmp_path,
            "prompt": "a",
            "max_new_tokens": 3,
            "temperature": 0.5,
            "top_k": 4,
            "top_p": 0.75,
            "seed": 6,
            "library": False,
            "chat": False,
        },
    ]
    calls = recorded(monkeypatch, "sparsegate.converter.pipeline.push.push", "the url")
    assert call("push", "d", "a/b") == call("push", "d", "a/b", "--public") == Done(0, "the url\n", "")
    assert calls == [{"folder": Path("d"), "repo_id": "a/b", "private": private} for private in (True, False)]
    calls = recorded(
        monkeypatch,
        "sparsegate.converter.pipeline.verify.verify",
        verify_module.Verification.model_construct(quality=None, checks=[]),
    )
    assert json.loads(call("verify", "d", "--source", "s", "--calibration", "c", "--json").out)["checks"] == []
    assert calls == [{"model": "d", "source": "s", "calibration": Path("c")}]


def test_the_published_command_has_no_folders_of_this_machine() -> None:
    from sparsegate.converter.cli.output import command

    words = [
        "convert",
        "/home/ada/model",
        "-o/home/ada/out",
        "--calibration=/home/ada/a b.txt",
        "--recipe",
        "../r.yaml",
        "--push",
        "ada/x",
        "--max-kl",
        "1",
    ]
    assert (
        command(words)
        == "sparsegate convert model -oout '--calibration=a b.txt' --recipe ../r.yaml --push ada/x --max-kl 1"
    )


# help and usage


def test_help_is_quick() -> None:
    """One process asks for every help text; the last command shows that the list of modules would tell."""
    code = """
import sys
from sparsegate.converter.cli import VERBS, main
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "onnxruntime_genai"}
HEAVY |= {"huggingface_hub", "matplotlib", "numpy"}
for words in [[], *([verb] for verb in VERBS), ["inspect", "nothing/at/all"]]:
    print("HEAVY", *sorted(HEAVY & set(sys.modules)))
    try:
        main(words if words[1:] else [*words, "--help"])
    except SystemExit as stop:
        print("STATUS", stop.code)
heavy = {"torch"} & set(sys.modules)
print("AT LAST", *heavy)
"""
    done = run_cli(preamble=code + "sys.exit()")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("HEAVY") == len(VERBS) + 2 and not [line for line in lines if line.startswith("HEAVY ")]
    assert [line for line in lines if line.startswith("STATUS")] == ["STATUS 0"] * (len(VERBS) + 1) + ["STATUS 2"]
    assert lines[-1] == "AT LAST torch"
    for verb in VERBS:
        assert f"Usage: sparsegate {verb} " in done.stdout


def test_help_names_every_verb_and_flag(call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = call("--help").out
    assert all(f" {verb} " in text for verb in VERBS)
    text = call("convert", "--help").out
    for flag in (
        "--output",
        "-o",
        *(
            f"--{name.replace('_', '-')}"
            for name in parameters(conversion.convert)
            if name not in ("model", "command", "push_to")
        ),
    ):
        assert flag in text, flag
    assert all(name in text for name in (*METHODS, "imported", "auto", "chess+teal"))


@pytest.mark.parametrize(
    "words",
    [
        ["transmogrify"],
        ["convert", "--frobnicate"],
        ["--frobnicate"],
        ["convert", "--sparsity", "half"],
        ["generate", "folder"],
        ["link"],
        ["doctor", "x"],
        [],
    ],
)
def test_wrong_usage_is_status_2(words: list[str], call: Callable[..., Done]) -> None:
    done = call(*words)
    assert done.status == 2 and "Traceback" not in done.err
    assert "Usage" in done.err + done.out
    if words:
        assert done.out == ""


# mistakes


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
    if kind == "ours":
        raise ValueError("x must be 1,\n  got 2. Do so.")
    if kind == "theirs":
        json.loads("{")
    int("a defect")


def test_a_defect_keeps_its_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What no `raise` of the package raised is no user's mistake, wherever it happened."""
    monkeypatch.setitem(broken.__globals__, "__name__", "sparsegate.test")
    monkeypatch.setattr(diagnosis, "diagnose", lambda: broken("ours"))
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert capsys.readouterr().err == "sparsegate: x must be 1, got 2. Do so.\n"
    for kind, error in (("theirs", json.JSONDecodeError), ("int", ValueError)):
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


# convert and inspect


def test_dry_run(
    call: Callable[..., Done], tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    done = call("convert", model, "--dry-run")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[0] == "would write llama-sparse; nothing was written"
    assert "peak memory" in done.out and "disk needed" in done.out and "method predictor" in done.out
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
    monkeypatch.setattr(conversion, "remote_inspect", refuse)
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

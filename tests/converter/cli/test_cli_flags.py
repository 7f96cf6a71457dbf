"""The command line: flags against functions, what help imports, wrong usage."""

from __future__ import annotations

import dataclasses
import inspect as signatures
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from small_recipe import Done, run_cli

import sparsegate.runtime_onnx as runtime
from sparsegate.converter import report as reporting
from sparsegate.converter.cli import VERBS
from sparsegate.converter.evaluation.speed.run import BenchRequest
from sparsegate.converter.methods import METHODS
from sparsegate.converter.pipeline import convert as conversion
from sparsegate.converter.pipeline import doctor as diagnosis
from sparsegate.converter.pipeline import evaluate as evaluation
from sparsegate.converter.pipeline import push as push_module
from sparsegate.converter.pipeline import verify as verify_module

FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, str], set[str]]] = {
    "convert": (conversion.convert, {"push": "push_to"}, {"json"}),
    "tune": (import_module("sparsegate.converter.pipeline.tune").tune, {}, {"json"}),
    "inspect": (import_module("sparsegate.converter.pipeline.inspect").inspect, {}, {"json"}),
    "generate": (runtime.generate, {"model": "path", "body": "library"}, set()),
    "verify": (verify_module.verify, {}, {"json"}),
    "eval": (evaluation.evaluate, {}, {"json"}),
    "bench": (import_module("sparsegate.converter.evaluation.speed.run").bench, {}, {"json"}),
    "report": (reporting.make_report, {}, set()),
    "export": (import_module("sparsegate.converter.pipeline.export").export, {}, {"json"}),
    "push": (push_module.push, {"repository": "repo_id", "public": "private"}, set()),
    **{name: (getattr(runtime, name), {}, set()) for name in ("link", "unlink")},
    "doctor": (diagnosis.diagnose, {}, {"json"}),
}
INVERTED = {("generate", "body"): (False, None), ("push", "public"): (False, True)}
"""Flags whose function has the opposite: default of the flag, default of the function."""


def parameters(function: Callable[..., Any]) -> dict[str, signatures.Parameter]:
    """The parameters of a function by name; one that is a dataclass counts as its fields."""
    hints, named = get_type_hints(function), {}
    for name, parameter in signatures.signature(function).parameters.items():
        groups = [kind for kind in (hints.get(name), *get_args(hints.get(name))) if dataclasses.is_dataclass(kind)]
        named |= parameters(groups[0]) if groups else {name: parameter}
    return named


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
            "--max-kl-long",
            "0.25",
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
            "--rotate",
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
            "max_kl_long": 0.25,
            "recipe": Path("r"),
            "calibration": Path("c"),
            "precision": "p",
            "target": "t",
            "seed": 7,
            "rotate": True,
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
            "sampling": runtime.Sampling(0.5, top_k=4, top_p=0.75, seed=6),
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


def test_every_flag_of_bench_arrives(call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch, "sparsegate.converter.evaluation.speed.run.bench", {"kind": "model"})
    words = {
        "shape": "s",
        "op": "o",
        "precision": "p",
        "density": "d",
        "tokens": "t",
        "layers": 1,
        "prompt_tokens": 2,
        "new_tokens": 3,
        "pairs": 4,
        "runtime": "r",
        "activation": "a",
        "threads": 5,
        "work": Path("w"),
    }
    flags = [word for name, value in words.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert call("bench", "x", "y", *flags, "--no-peers", "--json").status == 0
    (arrived,) = calls
    assert arrived["request"] == BenchRequest(models=["x", "y"], peers=False, **words) and arrived["output"] is None
    assert set(words) | {"models", "peers"} == {field.name for field in dataclasses.fields(BenchRequest)}


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

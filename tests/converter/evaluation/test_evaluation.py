"""The verb `eval`: what it measures again, records and refuses, and its flags."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from small_recipe import call_cli
from stored_results import EVALUATION

from sparsegate.converter.checkpoint.manifest import check_files, read_manifest
from sparsegate.converter.evaluation.records import Evaluation
from sparsegate.converter.pipeline import evaluate as evaluation
from sparsegate.converter.pipeline.evaluate import evaluate
from sparsegate.converter.report import html
from sparsegate.converter.report.evaluation import executor_cells
from sparsegate.runtime_onnx.errors import InputError


def test_evaluate_measures_what_convert_measured_and_records_it(converted: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", converted.parent / "text.txt"
    shutil.copytree(converted, out)
    before = read_manifest(out)
    found = evaluate(out, text=text, max_new_tokens=6, command="sparsegate eval out", long=100)
    rows = {row.executor: row for row in found.executors}
    assert set(rows) == {"torch", "ONNX body", "ONNX kernel"}
    for name in ("nll", "nll_dense", "nll_error", "kl", "agreement"):
        assert getattr(rows["torch"], name) == pytest.approx(
            before.measured[name], abs=1e-6
        )  # its own text: the same held-out part
    assert (found.nll_dense, found.density, found.cost) == pytest.approx(
        tuple(before.measured[name] for name in ("nll_dense", "density", "cost")), abs=1e-6
    )
    for name in ("ONNX body", "ONNX kernel"):
        assert rows[name].nll == pytest.approx(rows[name].nll_torch, abs=1e-3) and rows[name].tokens > 0
        assert rows[name].nll_dense and rows[name].nll_error
    assert found.text.name == "text.txt, held out" and found.model == before.recipe["model"]
    assert found.sparsity.windows == pytest.approx(1 - found.density)
    assert Evaluation.load(out / "report" / "eval.json") == found
    assert found.long is not None and found.long.length == 64 and found.long.far.kl > 1e-3
    assert [(row.kind, row.distance) for row in found.long.repetitions] == [("random", 32), ("text", 32)]
    after = read_manifest(out)
    assert check_files(out, after) == [] and set(after.files) == {*before.files, "report/eval.json"}
    assert {name: after.files[name] for name in before.files} == before.files


def test_the_table_has_the_change_and_its_error() -> None:
    torch_row, body = (
        {"nll_dense": dense, "nll_error": error} for dense, error in ((2.0078125, 0.0031), (2.01, 0.0052))
    )
    first, second, third = EVALUATION["executors"]
    found = Evaluation.model_validate(EVALUATION | {"executors": [first | torch_row, second | body, third]})
    header, rows = executor_cells(found)
    place = [header.index(name) for name in ("change", "± of its change")]
    assert [[row[k] for k in place] for row in rows] == [
        ["-", "-"],
        ["0.1022", "0.0031"],
        ["0.1130", "0.0052"],
        ["-", "-"],
    ]
    header, _ = executor_cells(Evaluation.model_validate(EVALUATION))
    assert "change" not in header and "± of its change" not in header, "an older evaluation has none"


def test_one_window_has_no_error(converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(converted, out)
    found = evaluate(out, text=converted.parent / "text.txt", windows=1, max_new_tokens=2)
    assert [row.nll_error for row in found.executors] == [None, None, None]


def test_evaluate_takes_other_texts_and_prompts(
    converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    shutil.copytree(converted, out)
    shutil.rmtree(out / "onnx")
    prompts.write_text("import os\n\nvalue_1 = \ndef f(x):\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING, "sparsegate"):
        found = evaluate(out, windows=2, prompts=prompts, max_new_tokens=4)
    assert "--text" in caplog.text
    assert found.text.name == "Python standard library modules, held out" and found.text.tokens == 2 * 47
    assert (found.answers.prompts + found.answers.empty, found.answers.name, found.answers.max_new_tokens) == (
        3,
        "prompts.txt",
        4,
    )
    assert [row.executor for row in found.executors] == ["torch", "ONNX"] and "not run" in found.executors[1].note
    other = tmp_path / "other.txt"
    other.write_text((converted.parent / "text.txt").read_text(encoding="utf-8") + "x = 1\n", encoding="utf-8")
    assert (
        evaluate(out, text=other, windows=1000, max_new_tokens=2).text.tokens > 5 * 47
    )  # no text of its own: the whole of it


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"windows": 0}, "windows must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 10_000}, "Lower --max-new-tokens"),
        ({"text": "nothing.txt"}, "nothing.txt"),
        ({"prompts": "nothing.txt"}, "nothing.txt"),
        ({"limit": -1}, "limit must be at least 1"),
        ({"long": 63}, "long must be at least 64 tokens, got 63"),
    ],
)
def test_mistakes_are_said_before_anything_is_measured(
    arguments: dict[str, Any], said: str, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsegate.converter.pipeline.evaluate.measure_quality", lambda *_: pytest.fail("measured"))
    with pytest.raises(InputError, match=said):
        evaluate(converted, **arguments)
    assert not (converted / "report" / "eval.json").exists()


def test_extras_that_are_not_installed_are_named(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r'lm-eval 0.4.13 or later, got none. Run pip install "sparsegate\[eval\]"'):
        evaluate(converted, lm_eval="hellaswag")
    for name in ("lm_eval", "lm_eval.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(InputError, match="got one without its onnxruntime-genai backend"):
        evaluate(converted, lm_eval="hellaswag")
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(InputError, match=r"sacrebleu must be installed .*sparsegate\[eval\]"):
        evaluate(converted)


# the command line


def test_every_flag_of_eval_and_report_arrives(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, calls, real = Evaluation.model_validate(EVALUATION), [], inspect.signature(evaluation.evaluate)

    def fake(*arguments: Any, **named: Any) -> Evaluation:
        calls.append(dict(real.bind(*arguments, **named).arguments))
        return found

    monkeypatch.setattr(evaluation, "evaluate", fake)
    words = [
        "d",
        "--text",
        "t",
        "--windows",
        "3",
        "--prompts",
        "p",
        "--max-new-tokens",
        "5",
        "--lm-eval",
        "a,b",
        "--limit",
        "7",
        "--source",
        "s",
        "--long",
        "128",
    ]
    assert json.loads(call_cli(capsys, "eval", *words, "--json").out) == found.model_dump(mode="json")
    assert set(calls[0]) == set(real.parameters) and calls[0].pop("command").startswith("sparsegate eval d --text t ")
    wanted = {
        "model": "d",
        "text": Path("t"),
        "windows": 3,
        "prompts": Path("p"),
        "max_new_tokens": 5,
        "lm_eval": "a,b",
        "limit": 7,
        "source": "s",
        "long": 128,
    }
    assert calls == [wanted]
    text = call_cli(capsys, "eval", "d").out
    assert all(
        part in text
        for part in ("ONNX kernel", "not run: no library", "53.73", "34.0 %", "layers.1.linear.q_proj", "hellaswag")
    )
    monkeypatch.setattr(html, "make_report", lambda folder: folder / "page")
    assert call_cli(capsys, "report", "d").out == f"wrote {Path('d/page')}\n"


def test_eval_report_and_verify_of_a_checkpoint(
    converted: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(converted, out)
    done = call_cli(capsys, "eval", out, "--text", converted.parent / "text.txt", "--max-new-tokens", "4")
    assert done.status == 0 and "ONNX kernel" in done.out and "BLEU against dense" in done.out
    page = out / "report" / "index.html"
    assert "Greedy answers" not in page.read_text(encoding="utf-8")  # convert's page
    assert call_cli(capsys, "report", out) == (0, f"wrote {page}\n", "")
    assert "Greedy answers" in page.read_text(encoding="utf-8")
    assert "ok     files" in call_cli(capsys, "verify", out).out

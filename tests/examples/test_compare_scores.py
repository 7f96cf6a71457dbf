"""The comparison of scores as a person runs it: its table, its JSON and its picture, and what the numbers must obey."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from models import make_model, make_tokenizer

from sparsegate.runtime_onnx.errors import InputError

EXAMPLE = Path(__file__).parents[2] / "examples" / "compare_scores.py"


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    runpy.run_path(str(EXAMPLE))["main"]([*arguments, "--out", str(tmp_path / "out")])
    return json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))


def test_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All kinds on one window; the rows that see a label are marked and no other is."""
    record = run(tmp_path, "--windows", "1", "--length", "64", "--sparsity", "0", "0.5", "--steps", "1")
    text = capsys.readouterr().out
    rows = {(r["kinds"], r["score"], r["sparsity_target"]): r for r in record["rows"]}
    assert len(rows) == 2 * (10 + 7 + 7) and record["tokens"] == 63 and len(record["text_sha256"]) == 64
    for (kinds, _, sparsity), row in rows.items():
        # heads: 3 of 6 stay, which use one key-value group or both
        if sparsity == 0:
            assert row["kl"] < 1e-6 and row["agreement"] == 1 and row["sparsity"] == 0
        else:
            assert (
                row["kl"] > 1e-4 and 0.25 < row["sparsity"] <= 0.51 and all(v == 0.5 for v in row["density"].values())
            )
        assert set(row["density"]) == {"mlp": {"ffn"}, "attention": {"attn"}, "both": {"ffn", "attn"}}[kinds]
    half = {score: rows["mlp", score, 0.5] for score in ("gate", "abs_z", "corrected_gxo", "gxo", "snip", "fisher")}
    assert half["abs_z"]["kl"] < half["gate"]["kl"] and half["corrected_gxo"]["kl"] < half["gxo"]["kl"]
    assert half["snip"]["kl"] == pytest.approx(half["fisher"]["kl"], rel=1e-3)
    assert (
        text.count("Corrected GxO (oracle)") == 3
        and "gate " in text
        and "gate (" not in text
        and "magnitude |x| (post)" in text
    )
    assert "oracle" in text.splitlines()[-2] and (tmp_path / "out" / "scores.png").read_bytes()[:4] == b"\x89PNG"


def test_another_model_folder(tmp_path: Path) -> None:
    folder = make_model("phi", tmp_path / "model")
    record = run(
        tmp_path,
        str(folder),
        "--windows",
        "1",
        "--length",
        "40",
        "--kinds",
        "mlp",
        "attention",
        "--sparsity",
        "0.5",
        "--steps",
        "1",
    )
    assert [row["kinds"] for row in record["rows"]] == ["mlp"] * 10 + ["attention"] * 7 and record["model"] == "model"
    assert all(row["sparsity"] == pytest.approx(0.5) for row in record["rows"])


def test_questions_go_into_the_chat_template_or_the_papers_form() -> None:
    prompts = runpy.run_path(str(EXAMPLE))["question_prompts"]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    plain = tokenizer.decode(prompts(tokenizer, ["Why?"])[0])
    assert plain == tokenizer.decode(tokenizer("Instruct: Why?\nOutput:")["input_ids"])
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ add_generation_prompt }}"
    )
    chat = tokenizer.decode(prompts(tokenizer, ["Why?"])[0])
    expected = tokenizer("<user>Why?True", add_special_tokens=False)["input_ids"]
    assert chat == tokenizer.decode(expected) and chat != plain


def test_accuracy_leaves_the_first_token_out() -> None:
    equal = runpy.run_path(str(EXAMPLE))["equal_share"]
    assert equal([1, 2, 3, 4], [9, 2, 3, 5]) == pytest.approx(2 / 3)
    assert equal([1, 2], [1, 2, 7]) == pytest.approx(1 / 2) and equal([1], [1]) == 1


@pytest.mark.slow
def test_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """BLEU against the dense model's own answers: 100 where nothing is dropped."""
    pytest.importorskip("sacrebleu")
    record = run(
        tmp_path,
        "--windows",
        "1",
        "--length",
        "72",
        "--kinds",
        "attention",
        "--sparsity",
        "0",
        "0.5",
        "--answers",
        "1",
        "--steps",
        "1",
    )
    scores = {(row["score"], row["sparsity_target"]): row["bleu"] for row in record["rows"]}
    assert all(bleu == pytest.approx(100) for (_, sparsity), bleu in scores.items() if sparsity == 0)
    assert min(scores.values()) < 50 and "BLEU / accuracy" in capsys.readouterr().out
    assert all(row["accuracy"] == 1 for row in record["rows"] if row["sparsity_target"] == 0)


@pytest.mark.slow
def test_chosen_scores_answer_questions(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    questions = EXAMPLE.parent / "questions.txt"
    words = ["--windows", "2", "--length", "40", "--kinds", "mlp", "--sparsity", "0.5", "--scores", "gate", "abs_z"]
    record = run(tmp_path, *words, "--answers", "3", "--questions", str(questions))
    assert [row["score"] for row in record["rows"]] == ["gate", "abs_z"] and record["questions"] == "questions.txt"
    assert all(0 <= row["accuracy"] <= 1 and row["bleu_error"] >= 0 and row["kl_error"] > 0 for row in record["rows"])


def test_mistakes_end_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="error: MODEL must be"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    with pytest.raises(InputError, match="sparsity must be"):
        run(tmp_path, "--windows", "1", "--length", "64", "--sparsity", "1.5")
    with pytest.raises(InputError, match="length must be at least"):
        run(tmp_path, "--windows", "1", "--length", "64", "--answers", "1")

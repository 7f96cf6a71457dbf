"""A conversion whose end tokens, pad token and tokenizer are unusual: it passes, and card, `verify` and folder say what
reads its text.
"""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest
from models import make_model
from odd_tokenizers import prefix_space
from small_recipe import small_recipe

import sparsegate.runtime_onnx as runtime
from sparsegate.converter.checkpoint.source import end_tokens
from sparsegate.converter.pipeline import candidates
from sparsegate.converter.pipeline import convert as conversion
from sparsegate.converter.pipeline import verify as verify_module

ENDS = {1, 75}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ends [1, 75] where the configuration has 1 and the tokenizer another; 0 is unknown and pad; a tokenizer that
    genai reads otherwise.
    """
    root = tmp_path_factory.mktemp("text")
    model = make_model("llama", root / "model", vocab_size=384, pad_token_id=0)
    tokenizer = prefix_space()
    assert tokenizer.eos_token_id not in ENDS
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<unk>{% endfor %}"
    tokenizer.save_pretrained(model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(ENDS), "pad_token_id": 0}))
    with patch.object(candidates, "_speed", lambda base, onnx, texts: {}):
        conversion.convert(recipe=small_recipe(model, root), output=root / "out")
    return root / "out"


def test_the_folder_has_the_ends_of_transformers_and_no_pad(converted: Path) -> None:
    config = json.loads((converted / "onnx" / "genai_config.json").read_text())["model"]
    assert config["eos_token_id"] == sorted(ENDS) and config["pad_token_id"] == -1
    assert runtime.end_tokens(converted) == end_tokens(converted) == ENDS


def test_report_card_and_verify_say_that_genai_reads_it_otherwise(converted: Path) -> None:
    row = next(
        check
        for check in json.loads((converted / "report" / "report.json").read_text())["checks"]
        if check["name"] == "genai's own tokenizer"
    )
    assert row["passed"] and 20 < row["value"] <= row["bound"]
    assert (
        f"reads {row['value']:.0f} of {row['bound']:.0f} probe texts otherwise: use sparsegate generate or the "
        "tokenizers library" in row["note"]
    )
    assert row["note"] in (converted / "README.md").read_text()
    found = verify_module.verify(converted)
    assert found.passed and row["note"] in [check.note for check in found.checks]


def test_generate_answers_a_chat_that_ends_in_a_pad(converted: Path) -> None:
    tokenizer = runtime.Tokenizer(converted)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "def add(first"}])
    assert prompt[-1] == 0
    decoder = runtime.Decoder(converted)
    tokens = [int(decoder(prompt)[-1].argmax())]
    while len(tokens) < 6 and tokens[-1] not in ENDS:
        tokens.append(int(decoder(tokens[-1:])[-1].argmax()))
    answer = tokenizer.decode([t for t in tokens if t not in ENDS], skip_special_tokens=True)
    assert answer and "".join(runtime.generate(converted, "def add(first", 6)) == answer

"""Faults first seen in public reports about neighbouring tools, remade with tiny models. Which test covers which:

| # | case | test | |---|---|---|
| 1 | the model lies in OUT.work; unrelated folders of such names |
test_work_folder.py::test_a_model_that_lies_where_the_stages_would_is_refused and others |
| 2 | prompts that end in the pad token | test_export_text.py::test_prompts_that_end_in_pads, test_text_conversion.py |
| 3 | several end tokens; a tokenizer's own | test_export_text.py::test_every_end_token_ends_a_text,
test_text_conversion.py |
| 4 | tokenizers that genai reads otherwise | test_export_text.py::test_tokenizers_that_genai_reads_otherwise,
runtime_onnx/test_text.py |
| 5 | a head beside a tied embedding | here |
| 6 | modes of files | test_stage_damage.py::test_every_file_has_the_mode_that_the_umask_says |
| 7 | JSON lines, byte order marks, CRLF | here, test_bounds.py::test_byte_order_marks_and_line_ends_are_no_text |
| 8 | YaRN without its optional fields | here |
| 9 | heads and positions that ONNX Runtime does not take |
test_bounds.py::test_a_model_whose_graph_could_not_run_is_refused_by_inspect |
| 10 | terminals and arguments of other encodings | test_cli_generate.py::test_generate_on_a_terminal_with_other_letters
|
| 11 | weights beyond half precision | here |
| 12 | tensors that the class does not have | test_output.py |
| 13 | a sentencepiece model alone | test_source.py::test_a_sentencepiece_model_alone_names_sentencepiece |
| 14 | names of wrapped and headless models, an integer buffer | here |
| 15 | another head than a language model's | here |
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import make_model
from pyarrow import table
from pyarrow.parquet import write_table
from safetensors.torch import load_file, save_file
from small_recipe import small_recipe

from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.modeling.gated import load, load_dense
from sparsegate.converter.onnx_export.base_graph import BOUND, build_base, compare_base
from sparsegate.converter.pipeline import candidates, graphs
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.inspect import inspect
from sparsegate.converter.pipeline.recipe import Flags, compile_recipe
from sparsegate.converter.pipeline.texts import make_texts, texts_hash
from sparsegate.converter.text import documents
from sparsegate.converter.text.documents import read_whole
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.session import Decoder

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FULL = {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.3}


@pytest.fixture(autouse=True)
def _no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_speed", lambda base, onnx, texts: {})


@pytest.fixture
def model(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **config: Any) -> Path:
    """Other tensors and other fields of config.json in a model folder."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | config))
    return folder


def refused(folder: Path, *parts: str) -> None:
    """`inspect` says why, and the reader of weights says the same."""
    found = inspect(folder)
    assert not found.convertible and all(part in found.reason for part in parts), found.reason
    with pytest.raises(InputError) as error:
        open_source(folder)
    assert str(error.value) == found.reason


def test_a_head_beside_a_tied_embedding_is_converted(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers takes the head of the file although config.json ties it; the builder does not."""
    rewrite(model, lambda tensors: tensors, tie_word_embeddings=True)
    with caplog.at_level(logging.WARNING, logger="sparsegate"):
        out = convert(recipe=small_recipe(model, tmp_path), output=tmp_path / "out").folder
    assert sum("the weights hold another head: that one is converted" in line for line in caplog.messages) == 1
    head = load_file(model / "model.safetensors")["lm_head.weight"]
    sparse = load(out)
    assert torch.equal(sparse.lm_head.weight, head)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert np.abs(Decoder(out, library=False)(tokens[0].numpy()) - sparse(tokens).logits[0].numpy()).max() < 1e-3


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("qwen2", {}),
        *[
            pytest.param(kind, fields, marks=pytest.mark.slow)
            for kind in ("qwen2", "qwen3", "mistral")
            for fields in ({}, FULL)
        ][1:],
    ],
)
def test_yarn_gives_the_logits_of_transformers(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(kind, tmp_path / "model", rope_scaling=YARN | fields)
    assert inspect(folder).convertible
    build_base(folder, tmp_path / "onnx")
    tokens = np.arange(200).reshape(2, 100) % 290  # beyond the positions that it was trained on
    assert compare_base(tmp_path / "onnx", load_dense(folder), tokens) <= BOUND
    plain = make_model(kind, tmp_path / "plain")
    assert compare_base(tmp_path / "onnx", load_dense(plain), tokens) > 100 * BOUND


def test_a_graph_that_is_not_the_model_ends_it_before_calibration(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any) -> None:
        raise InputError("The graph must be the model, got another one.")

    monkeypatch.setattr(graphs, "make_base", wrong)
    with pytest.raises(InputError, match="The graph must be the model"):
        convert(recipe=small_recipe(model, tmp_path), output=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work" / "stats").exists()


@pytest.mark.parametrize(
    ("precision", "value", "holds"), [("fp16", 7e4, False), ("fp16", 6e4, True), ("int4", 6e5, False)]
)
def test_weights_beyond_half_precision(precision: str, value: float, holds: bool, model: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def put(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name][0, 0] = value
        tensors["model.layers.0.mlp.down_proj.weight"][:, 0] = 0  # the neuron itself adds nothing
        return tensors

    recipe = small_recipe(rewrite(model, put), tmp_path, export={"precision": precision})
    if holds:
        convert(recipe=recipe, output=tmp_path / "out")
        return
    with pytest.raises(
        InputError, match="must hold finite values up to 65504 in half precision.*Take the precision fp32, bf16 or int8"
    ) as error:
        convert(recipe=recipe, output=tmp_path / "out")
    assert "model.layers.0.mlp.up_proj" in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("prefix", "remedy"),
    [("_orig_mod.", "model._orig_mod.save_pretrained"), ("module.", "model.module.save_pretrained")],
)
def test_weights_of_a_wrapped_model_say_what_saves_them(prefix: str, remedy: str, model: Path) -> None:
    refused(rewrite(model, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}), prefix, remedy)


def test_a_model_without_its_head_says_so(model: Path) -> None:
    bare = rewrite(
        model,
        lambda tensors: {
            name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"
        },
    )
    refused(bare, "a model without the head of a language model", "AutoModelForCausalLM")


def test_a_buffer_of_integers_is_no_weight(model: Path) -> None:
    rewrite(model, lambda tensors: tensors | {"model.embeddings.position_ids": torch.arange(8)})
    assert inspect(model).convertible


@pytest.mark.parametrize("named", [["LlamaForSequenceClassification"], ["LlamaModel"], "LlamaForCausalLM", [1]])
def test_another_head_than_a_language_models_is_refused_by_inspect(named: Any, model: Path) -> None:
    refused(
        rewrite(model, lambda tensors: tensors, architectures=named),
        "causal language model" if named[0] != "L" and named != [1] else "a list of names",
    )


# texts


def write_out(conversations: list[Any]) -> list[str]:
    return ["|".join(f"{message['role']}: {message['content']}" for message in messages) for messages in conversations]


def test_json_lines_are_documents(tmp_path: Path) -> None:
    rows = [
        {"text": "a\r"},
        {"content": "b", "id": 1},
        {"messages": [{"role": "user", "content": "c"}]},
        {"text": None, "content": "d"},
    ]
    file = tmp_path / "t.jsonl"
    file.write_text("\ufeff" + "\r\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    text, said = read_whole(file, write_out)
    assert text == "a\r\n\nb\n\nuser: c\n\nd"
    assert said == "t.jsonl: 4 documents, 1 of the field text, 2 of the field content, 1 of the field messages."
    plain = tmp_path / "t.txt"
    plain.write_text('{"text": "a"}')
    assert read_whole(plain, write_out) == ('{"text": "a"}', "")


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("a.jsonl", "{", "Line 2 of .* must be JSON"),
        ("a.jsonl", "[]", "must have one of the fields text, content, messages, got list"),
        ("a.jsonl", '{"body": "x"}', "must have one of the fields text, content, messages, got 'body'"),
        ("a.jsonl", '{"text": 1}', "text in line 2 of .* must be a text, got 1"),
        ("a.jsonl", '{"messages": "x"}', "messages in line 2 of .* must be a list of objects with role and content"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "must be a list of objects with role and content"),
        ("a.ndjson", '{"text": "\\ud800"}', "half of a surrogate pair"),
        ("a.parquet", "", "must be a .parquet file, got one that pyarrow refuses"),
        ("a.json", "", "got a .json file"),
    ],
)
def test_lines_that_are_no_documents(name: str, line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(f'{{"text": "x"}}\n{line}\n')
    with pytest.raises(InputError, match=said) as error:
        read_whole(tmp_path / name, write_out)
    assert "\n" not in str(error.value)


def test_rows_of_parquet_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = [{"role": "user", "content": "c"}]
    rows = {
        "id": [1, 2, 3],
        "text": ["a", None, None],
        "content": [None, "b", "lost"],
        "messages": [None, None, conversation],
    }
    file = tmp_path / "t.parquet"
    write_table(table(rows), file)
    assert read_whole(file, write_out) == (
        "a\n\nb\n\nlost",
        "t.parquet: 3 documents, 1 of the field text, 2 of the field content.",
    )
    write_table(table({"messages": [conversation] * 2}), file)
    assert read_whole(file, write_out) == ("user: c\n\nuser: c", "t.parquet: 2 documents, 2 of the field messages.")
    write_table(table({"text": ["a", None]}), file)
    with pytest.raises(InputError, match="Row 2 of .* must have one of the fields text, content, messages, got 'text'"):
        read_whole(file, write_out)
    write_table(table({"body": ["a"]}), file)
    with pytest.raises(InputError, match="must have a column text, content, messages, got .*body"):
        read_whole(file, write_out)
    write_table(table({"text": ["a" * 1000] * 5000}), file)  # a few bytes on the disk
    monkeypatch.setattr(documents, "LARGEST_TEXT", 1 << 20)
    assert file.stat().st_size < 1 << 16
    with pytest.raises(InputError, match="must be at most 1 MiB, got more"):
        read_whole(file, write_out)
    os.mkfifo(tmp_path / "f.parquet")
    with pytest.raises(InputError, match="must be a regular file"):
        read_whole(tmp_path / "f.parquet", write_out)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="must have pyarrow to be read, got none. Run pip install pyarrow"):
        read_whole(file, write_out)


def test_a_conversation_is_written_out_by_the_chat_template(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "t.jsonl"
    row = {
        "messages": [
            {"role": "user", "content": "def add(first, second):"},
            {"role": "assistant", "content": "return first + second"},
        ]
    }
    file.write_text((json.dumps(row) + "\n") * 300)
    recipe = compile_recipe(Flags(str(model), "gate", 0.5, calibration=file))
    source = open_source(model)
    with caplog.at_level(logging.WARNING, logger="sparsegate"):
        texts = make_texts(source, recipe)
    assert caplog.messages == ["t.jsonl: 300 documents, 300 of the field messages."]
    tokenizer = source.tokenizer()
    rendered = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert rendered.strip() in tokenizer.decode(texts.calibration.tokens.flatten()) and "messages" not in rendered
    before = texts_hash(recipe)
    file.write_text(file.read_text() + "\n")
    assert texts_hash(recipe) != before
    (model / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="Messages must be of a model with a chat template"):
        make_texts(open_source(model), recipe)

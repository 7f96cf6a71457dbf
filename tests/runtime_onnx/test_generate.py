"""Generation over onnxruntime-genai: the kernel and the body give plain onnxruntime's tokens and logits, nothing is
copied, and mistakes get one line.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import onnx_folders as folders
import onnxruntime_genai as og
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import sparsegate.runtime_onnx as runtime
from sparsegate.runtime_onnx import Sampling
from sparsegate.runtime_onnx.errors import InputError

generation = sys.modules["sparsegate.runtime_onnx.generate"]  # the package's attribute of that name is the function
TOKENS = 24


def raw(*arguments: object, **options: object) -> str:
    """A continuation, the folders' chat template left aside."""
    return "".join(runtime.generate(*arguments, **{"chat": False, **options}))  # type: ignore[arg-type]


def greedy(folder: Path, library: bool) -> list[int]:
    """The plain onnxruntime loop's greedy continuation of PROMPT."""
    decoder = runtime.Decoder(folder, library=library)
    tokens = [int(decoder(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(folders.PROMPT).ids)[-1].argmax())]
    while len(tokens) < TOKENS:
        tokens.append(int(decoder(tokens[-1:])[-1].argmax()))
    return tokens


@pytest.mark.parametrize("score", ["gate", "predictor"])
def test_four_ways_agree(score: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Library on and off, in genai and in plain onnxruntime: one text, logits within 1e-4; genai runs from a foreign
    folder and changes no file.
    """
    folder = folders.sparse(score)
    expected = greedy(folder, library=False)
    assert greedy(folder, library=True) == expected != greedy(folders.dense(), library=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.chdir(tmp_path)
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(expected)
    logits = {}
    for library in (True, False):
        pieces = list(runtime.generate(folder, folders.PROMPT, TOKENS, chat=False, library=library))
        assert len(pieces) > TOKENS // 3 and "".join(pieces) == text
        model = runtime.load(folder, library)
        generator = og.Generator(model, og.GeneratorParams(model))
        generator.append_tokens(og.Tokenizer(model).encode(folders.PROMPT))
        logits[library] = generator.get_logits()[0, -1]
    plain = runtime.Decoder(folder, library=False)(
        Tokenizer.from_file(str(folder / "tokenizer.json")).encode(folders.PROMPT).ids
    )[-1]
    for found in logits.values():
        assert np.abs(found - plain).max() < 1e-4
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("library", [True, False])
def test_genai_runs_what_the_line_says(library: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a body that gives zeros, the text tells who ran: it changes without the library and stays with it."""
    import onnx

    folder = folders.copy(folders.sparse("gate"), tmp_path / "onnx")
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    for node in model.functions[0].node:
        if node.output[0] == "y":
            node.output[0] = "unused"
    model.functions[0].node.extend([onnx.helper.make_node("Sub", ["x", "x"], ["y"])])
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with caplog.at_level(logging.INFO, logger="sparsegate"):
        same = list(runtime.generate(folder, folders.PROMPT, 8, library=library)) == list(
            runtime.generate(folders.sparse("gate"), folders.PROMPT, 8, library=library)
        )
    assert same == library
    assert ("native kernel" if library else "standard ONNX ops") in caplog.records[0].message


def test_sampling_is_seeded() -> None:
    """One seed gives one text, another seed another; top_k = 1 is greedy at any temperature."""
    folder = folders.sparse("gate")
    texts = [raw(folder, folders.PROMPT, 16, Sampling(2.0, top_k=0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert raw(folder, folders.PROMPT, 16, Sampling(2.0, top_k=1, seed=7)) == raw(folder, folders.PROMPT, 16)


@pytest.mark.parametrize("begin", [True, False])
def test_prompt_is_tokenised_as_in_transformers(begin: bool, tmp_path: Path) -> None:
    """A tokenizer whose template adds the begin-of-text token gets it, another one does not."""
    folder = folders.copy(folders.sparse("gate"), tmp_path / "onnx")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if begin:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
        tokenizer.save(str(folder / "tokenizer.json"))
    assert (tokenizer.encode(folders.PROMPT).ids[0] == 0) == begin
    assert (greedy(folder, library=False) == greedy(folders.sparse("gate"), library=False)) != begin
    assert raw(folder, folders.PROMPT, TOKENS) == tokenizer.decode(greedy(folder, library=False))


def test_ends_at_end_of_text(tmp_path: Path) -> None:
    """The end-of-text token stops the text and is not part of it."""
    folder = folders.copy(folders.sparse("gate"), tmp_path / "onnx")
    tokens = greedy(folder, library=False)
    end = next(token for position, token in enumerate(tokens) if position > 3 and token not in tokens[:position])
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = end
    (folder / "genai_config.json").write_text(json.dumps(config))
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens[: tokens.index(end)])
    assert raw(folder, folders.PROMPT, TOKENS) == text


def test_context_is_the_limit() -> None:
    """The context ends the text quietly; a prompt that fills it is refused with both numbers."""
    folder = folders.sparse("gate")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = "a " * 400
    while len(tokenizer.encode(words).ids) > folders.CONTEXT - 3:
        words = words[:-2]
    room = folders.CONTEXT - len(tokenizer.encode(words).ids)
    assert 1 <= len(list(runtime.generate(folder, words, 100, chat=False))) <= room < 10
    with pytest.raises(
        ValueError,
        match=f"prompt must be shorter than the model's context of {folders.CONTEXT} tokens, got "
        f"{len(tokenizer.encode(words * 3).ids)}",
    ):
        runtime.generate(folder, words * 3, chat=False)


def test_bad_arguments(tmp_path: Path) -> None:
    """Refused at the call, before anything is generated."""
    folder = folders.sparse("gate")
    wrong = [
        ("prompt", {"prompt": ""}),
        ("max_new_tokens", {"max_new_tokens": 0}),
        ("temperature", {"sampling": Sampling(-1.0)}),
        ("top_k", {"sampling": Sampling(top_k=-1)}),
        ("top_p", {"sampling": Sampling(top_p=0)}),
    ]
    for name, arguments in wrong:
        with pytest.raises(ValueError, match=f"{name} must"):
            runtime.generate(folder, **{"prompt": "x", **arguments})
    with pytest.raises(ValueError, match="must be an ONNX folder"):
        runtime.generate(tmp_path, "x")


def test_missing_genai(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the extras."""
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(ValueError, match=r"onnxruntime-genai must be installed.*sparsegate\[cpu\].*sparsegate\[gpu\]"):
        runtime.generate(folders.sparse("gate"), "x")


def test_refused_library_falls_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """If genai does not take the library by its bare name, a warning says so and the body gives the text; demanded, the
    error holds genai's text.
    """
    monkeypatch.setattr(generation, "LIBRARY", "libsparsegate_renamed.so")
    expected = raw(folders.sparse("gate"), folders.PROMPT, 8, library=False)
    caplog.clear()
    assert raw(folders.sparse("gate"), folders.PROMPT, 8) == expected
    assert [record.levelno for record in caplog.records] == [
        logging.WARNING
    ] and "did not take the library" in caplog.text
    with pytest.raises(InputError, match="libsparsegate_renamed"):
        runtime.load(folders.sparse("gate"), library=True)


def test_other_library_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """genai would open a file of that name in the model's or the current folder first: one that is not ours is never
    loaded.
    """
    (tmp_path / "libsparsegate_onnx.so").write_bytes(b"another library")
    monkeypatch.chdir(tmp_path)
    assert list(runtime.generate(folders.sparse("gate"), folders.PROMPT, 2))
    assert "another library of the same name" in caplog.text and "standard ONNX ops" in caplog.text
    with pytest.raises(ValueError, match="must not lie in the way"):
        runtime.load(folders.sparse("gate"), library=True)


def test_unknown_variant_runs_the_body(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Version skew in genai: the body runs, one warning names the variant."""
    expected = raw(folders.sparse("predictor"), folders.PROMPT, 8, library=False)
    folder = folders.copy(folders.sparse("predictor"), tmp_path / "onnx")
    folders.rename_variant(folder, "GatedMLP.7/silu")
    caplog.clear()
    assert raw(folder, folders.PROMPT, 8) == expected
    assert [record.levelno for record in caplog.records] == [logging.WARNING] and "GatedMLP.7/silu" in caplog.text

"""The same text in torch and in an exported folder: prompts that end in pads, several end tokens, tokenizers that genai
reads otherwise.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer
from odd_tokenizers import TOKENIZERS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsegate.runtime_onnx as runtime
from sparsegate.converter.evaluation.checks import check_text
from sparsegate.converter.onnx_export import tokenizer_check
from sparsegate.converter.onnx_export.base_graph import GENAI_CONFIG, build_base
from sparsegate.converter.onnx_export.tokenizer_check import check_tokenizer

NEW = 12


def edit_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def torch_tokens(folder: Path, ids: list[int], new: int = NEW) -> list[int]:
    """transformers' own `generate`, greedy, without the prompt."""
    model, row = AutoModelForCausalLM.from_pretrained(folder), torch.tensor([ids])
    return model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=new, do_sample=False)[
        0, len(ids) :
    ].tolist()


def genai_tokens(folder: Path, ids: list[int], new: int = NEW) -> list[int]:
    import onnxruntime_genai as og

    model = runtime.load(folder)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + new, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(ids) :]


def builders_own(folder: Path, pad: int, ends: Any) -> None:
    """Make the configuration what the builder wrote before sparsegate changed it."""
    file = folder / GENAI_CONFIG
    config = json.loads(file.read_text())
    config["model"] |= {"pad_token_id": pad, "eos_token_id": ends}
    file.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose token 0 is unknown and pad, with ends [1, 75] where its configuration has 1; onnx/ is its
    dense graph.
    """
    folder = make_model("llama", tmp_path_factory.mktemp("padded") / "out", bos_token_id=5, pad_token_id=0)
    edit_json(folder / "generation_config.json", eos_token_id=[1, 75], pad_token_id=0)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"unk_token": "<s>", "pad_token": "<s>", "eos_token": "<|endoftext|>"})
    )
    build_base(folder, folder / "onnx")
    return folder


PROMPTS = [[7, 8, 9, 30], [7, 8, 9, 0], [7, 0, 9, 0, 0], [0, 7, 0], [0], [0, 0, 0], [40, 1], [40, 75, 0], [40, 2, 2]]


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_prompts_that_end_in_pads(padded: Path, prompt: list[int]) -> None:
    assert genai_tokens(padded / "onnx", prompt) == torch_tokens(padded, prompt)


def test_a_folder_of_the_builder_strips_pads_and_load_does_not(padded: Path, tmp_path: Path) -> None:
    """Exported before pads were laid over: genai alone gives another text, `load` the right one, with the checkpoint's
    end tokens.
    """
    import onnxruntime_genai as og

    folder = shutil.copytree(padded, tmp_path / "out")
    builders_own(folder / "onnx", pad=0, ends=[2, 1])
    prompt, model = [7, 8, 9, 0], og.Model(str(folder / "onnx"))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + NEW, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    expected = torch_tokens(padded, prompt)
    assert [int(t) for t in generator.get_sequence(0)][len(prompt) :] != expected
    assert genai_tokens(folder / "onnx", prompt) == expected == genai_tokens(folder, prompt)
    assert runtime.end_tokens(folder) == runtime.end_tokens(folder / "onnx") == {1, 75}
    moved = shutil.copytree(folder / "onnx", tmp_path / "alone")
    assert runtime.end_tokens(moved) == {1, 2}, "nothing but its own configuration"
    assert genai_tokens(moved, prompt)[:3] == expected[:3]


def test_every_end_token_ends_a_text(padded: Path, tmp_path: Path) -> None:
    """Torch and genai stop at the same token, whichever of the ends it is; the tokenizer's end token is
    none of them.
    """
    assert json.loads((padded / "onnx" / GENAI_CONFIG).read_text())["model"]["eos_token_id"] == [1, 75]
    prompt = [7, 8, 9, 30]
    free = torch_tokens(padded, prompt, 40)
    first, second = free[3], next(token for token in free[4:] if token not in free[:4])
    assert first not in free[:3]
    for ends in ([first, 1], [1, second], [second], second):
        folder = shutil.copytree(padded, tmp_path / str(ends), ignore=shutil.ignore_patterns("onnx"))
        edit_json(folder / "generation_config.json", eos_token_id=ends)
        build_base(folder, folder / "onnx")
        expected = torch_tokens(folder, prompt, 40)
        wanted = free[
            : free.index(first) if first in ([ends] if isinstance(ends, int) else ends) else free.index(second)
        ]
        assert expected[: len(wanted)] == wanted and len(expected) == len(wanted) + 1
        tokens = genai_tokens(folder / "onnx", prompt, 40)
        assert tokens in (wanted, expected)
        assert runtime.end_tokens(folder) == set(ends if isinstance(ends, list) else [ends])


def test_no_end_token_at_all(tmp_path: Path) -> None:
    """transformers' `generate` then goes on to the limit; genai must have one, the tokenizer's."""
    folder = make_model("llama", tmp_path / "m", eos_token_id=None)
    build_base(folder, folder / "onnx")
    assert runtime.end_tokens(folder) == {AutoTokenizer.from_pretrained(folder).eos_token_id}
    assert genai_tokens(folder / "onnx", [7, 8, 2]) == torch_tokens(folder, [7, 8, 2])


@pytest.mark.parametrize("library", [True, False])
def test_text_that_ends_in_a_pad(padded: Path, library: bool) -> None:
    """Through text, as a person asks: prompt and continuation as in torch, special tokens shown."""
    prompt = "def add(first<s>"
    tokenizer = AutoTokenizer.from_pretrained(padded)
    ids = tokenizer(prompt)["input_ids"]
    assert ids[-1] == tokenizer.pad_token_id == 0
    text = tokenizer.decode(ids + torch_tokens(padded, ids))
    assert (
        prompt + "".join(runtime.generate(padded, prompt, NEW, chat=False, library=None if library else False)) == text
    )


def test_a_padded_batch_still_runs(padded: Path) -> None:
    """genai pads a batch with an id that no token has, and the lookup of the embeddings takes it."""
    import numpy as np
    import onnxruntime_genai as og

    model = runtime.load(padded)
    rows = [[7, 8, 9, 30], [7, 8, -1, -1]]  # on the right, as its tokenizer pads
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=4 + NEW, do_sample=False, batch_size=2)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(rows, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    for row, prompt in enumerate(([7, 8, 9, 30], [7, 8])):
        expected = torch_tokens(padded, prompt)
        assert [int(t) for t in generator.get_sequence(row)][4 : 4 + len(expected)] == expected


@pytest.mark.parametrize(
    "name", ["prefix_space", "own_split", "added_tokens", "unigram", "unigram_bytes", "llama_class", "words"]
)
def test_tokenizers_that_genai_reads_otherwise(name: str, tmp_path: Path) -> None:
    """The text is torch's, and the row says that genai's own tokenizer may not be used."""
    folder = make_model("llama", tmp_path / "m", vocab_size=384)
    TOKENIZERS[name]().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}user: {{ messages[0].content }}\nanswer:")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][[token for text, token in tokenizer.get_vocab().items() if text.startswith("<0x")]] = (
        0  # whole characters alone are said
    )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    build_base(folder, folder / "onnx")
    for prompt in ("def add(first, second):", "something the more 123 \u00e9"):
        ids = tokenizer(prompt)["input_ids"]
        new = torch_tokens(folder, ids)
        before, whole = tokenizer.decode(ids), tokenizer.decode(ids + new)
        assert whole.startswith(before)
        assert "".join(runtime.generate(folder, prompt, NEW, chat=False)) == whole[len(before) :].removesuffix("</s>")
        chat = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)[
            "input_ids"
        ]
        answer = tokenizer.decode(torch_tokens(folder, chat), skip_special_tokens=True)
        assert "".join(runtime.generate(folder, prompt, NEW)) == answer
    check = check_text(folder / "onnx")
    assert check.passed and check.value > 0 and "use sparsegate generate or the tokenizers library" in check.note


def test_a_tokenizer_that_genai_reads_alike(padded: Path) -> None:
    check = check_text(padded / "onnx")
    assert check.passed and check.value == 0 and check.bound > 28 and "may be used" in check.note


def test_what_genai_does_with_a_tokenizer_is_a_note(
    padded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file, no configuration, a process that ends or never does: nothing of it ends a conversion."""
    found = check_tokenizer(tmp_path)
    assert not found.agrees and "cannot be used (there is no tokenizer.json)" in found.note
    make_tokenizer().save_pretrained(tmp_path)
    found = check_tokenizer(tmp_path)
    assert found.texts > 28 and "cannot be used" in found.note and "\n" not in found.note, (
        "there is no genai_config.json"
    )
    monkeypatch.setattr(tokenizer_check, "_PROGRAM", "import os; os.abort()")
    assert "its process ended" in check_tokenizer(padded / "onnx").note
    monkeypatch.setattr(tokenizer_check, "_PROGRAM", "print('hello')")
    assert "its process gave no answer" in check_tokenizer(padded / "onnx").note
    monkeypatch.setattr(tokenizer_check, "_PROGRAM", "import time; time.sleep(60)")
    monkeypatch.setattr(tokenizer_check, "SECONDS", 0.2)
    assert "takes more than 0.2 seconds" in check_tokenizer(padded / "onnx").note

"""PowerInfer's files as MODEL: the folder that one becomes, and what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from models import TEXT, VOCAB, make_model, put_predictors

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Predictor
from sparsegate.converter.checkpoint.source import Source, open_source
from sparsegate.converter.pipeline.inspect import inspect
from sparsegate.converter.sources import powerinfer
from sparsegate.converter.sources.named import resolve
from sparsegate.converter.sources.powerinfer import import_powerinfer, is_powerinfer, write_powerinfer
from sparsegate.converter.sources.predictors import predictors_beside
from sparsegate.runtime_onnx.errors import InputError

LAYERS = 2


@pytest.fixture(scope="module")
def relu(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A llama with relu, a tied head and predictors beside its weights."""
    folder = tmp_path_factory.mktemp("relu") / "m"
    return open_source(put_predictors(make_model("llama", folder, hidden_act="relu", tie_word_embeddings=True)))


@pytest.fixture(scope="module")
def file(relu: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its file in half precision; nobody changes it."""
    return write_powerinfer(relu, predictors_beside(relu), tmp_path_factory.mktemp("file") / "m.gguf")


def rewritten(file: Path, out: Path, fields: dict[str, Any] | None = None, **tensors: np.ndarray | None) -> Path:
    """A copy of a model file by the gguf package, with other fields (None: without) and tensors (quantised: as bytes of
    Q8_0).
    """
    plain = out.with_suffix(".plain")
    plain.write_bytes(b"GGUF" + file.read_bytes()[4:])
    reader = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(out, "llama")
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for name, value in (values | (fields or {})).items():
        if name != "general.architecture" and value is not None:
            kinds[type(value)](name, value)
    for tensor in reader.tensors:
        data = tensors.get(tensor.name.replace(".", "_"), tensor.data)
        if data is not None:
            kind = gguf.GGMLQuantizationType.Q8_0 if data.dtype == np.uint8 else None
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain.unlink()
    out.write_bytes(b"PWRI" + out.read_bytes()[4:])
    return out


def test_the_folder_is_an_ordinary_one(relu: Source, file: Path, tmp_path: Path) -> None:
    """Values and sizes come back, the tied head is tied again, and the tokenizer reads as before."""
    back = open_source(import_powerinfer(file, tmp_path / "m"))
    assert back.tensors.keys() == relu.tensors.keys() and back.config.tie_word_embeddings
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    for name in (*sizes, "max_position_embeddings", "hidden_act", "bos_token_id", "eos_token_id", "model_type"):
        assert getattr(back.config, name) == getattr(relu.config, name), name
    assert back.config.rope_parameters["rope_theta"] == relu.config.rope_parameters["rope_theta"]
    weights, theirs = back.read(back.tensors), relu.read(relu.tensors)
    for name, info in back.tensors.items():
        assert info.dtype == ("F32" if theirs[name].ndim == 1 else "F16")
        if "predictor" not in name:
            assert torch.equal(
                weights[name], theirs[name].to(torch.float16 if theirs[name].ndim == 2 else None).float()
            )
    ids, tokenizer = back.tokenizer()(TEXT)["input_ids"], back.tokenizer()
    assert ids == relu.tokenizer()(TEXT)["input_ids"] and tokenizer.decode(ids) == TEXT
    assert tokenizer.all_special_ids == [0, 1] and len(tokenizer) == VOCAB
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


@torch.no_grad()
def test_the_folder_computes_what_the_model_did(relu: Source, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    file = write_powerinfer(relu, predictors_beside(relu), tmp_path / "m.gguf", precision="fp32")
    import_powerinfer(file, tmp_path / "m")
    tokens = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        for folder in (relu.folder, tmp_path / "m")
    ]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)  # the file's epsilon is a float32


@pytest.mark.parametrize(("threshold", "kept"), [(0.0, True), (None, False)])
def test_equal_logits_decide_as_in_the_file(threshold: float | None, kept: bool, relu: Source, tmp_path: Path) -> None:
    """PowerInfer runs a neuron unless its logit is below the threshold."""
    file = write_powerinfer(relu, predictors_beside(relu), tmp_path / "m.gguf", threshold)
    plan = predictors_beside(resolve(str(file), tmp_path / "source"))
    for layer in range(LAYERS):
        entry = plan[Site(layer)].gating
        assert isinstance(entry, Predictor) and bool((torch.tensor(0.0) > entry.tau).all()) == kept


def test_quantised_matrices_come_as_their_values(file: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((176, 64)).astype(np.float32)
    blocks = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    copy = rewritten(file, tmp_path / "q.gguf", blk_0_ffn_up_weight=blocks, blk_1_ffn_down_t_weight=blocks)
    back = open_source(import_powerinfer(copy, tmp_path / "m"))
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    stored = torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
    weights = back.read([up, down])
    assert torch.equal(weights[up], stored) and torch.equal(weights[down], stored.T)
    assert back.tensors[up].dtype == "F32" and (stored - torch.from_numpy(values)).abs().max() < 0.03


def test_a_byte_fallback_vocabulary_reads_as_before(tmp_path: Path) -> None:
    """llama's own kind: transformers makes the merges again from the scores."""
    folder = put_predictors(make_model("llama", tmp_path / "m", hidden_act="relu"))
    letters = sorted({*TEXT.replace(" ", "\u2581"), "\u2581"} - {"\n"})
    pairs = [("\u2581", letter) for letter in letters if letter.isalpha()][:12]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(180)), *letters, *map("".join, pairs)]
    names = list(dict.fromkeys(names))[:VOCAB]
    special = [
        {"id": k, "content": names[k], "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for k in range(3)
    ]
    model = {"type": "BPE", "vocab": {name: k for k, name in enumerate(names)}, "merges": [list(p) for p in pairs]}
    model |= {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
    metaspace = {"replacement": "\u2581", "prepend_scheme": "first", "split": False}
    tokenizer = {"version": "1.0", "added_tokens": special, "model": model}
    tokenizer |= {"pre_tokenizer": {"type": "Metaspace", **metaspace}, "decoder": {"type": "Metaspace", **metaspace}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "</s>"}))
    source = open_source(folder)
    file = write_powerinfer(source, predictors_beside(source), tmp_path / "m.gguf")
    back = open_source(import_powerinfer(file, tmp_path / "back")).tokenizer()
    for text in ("a b", TEXT[:60].replace("\n", " ")):
        ids = source.tokenizer()(text, add_special_tokens=False)["input_ids"]
        assert back(text, add_special_tokens=False)["input_ids"] == ids and len(ids) > 1


def test_what_is_there_and_whole_is_left(file: Path, tmp_path: Path) -> None:
    out = import_powerinfer(file, tmp_path / "m")
    weights = next(out.glob("*.safetensors"))
    before = weights.stat().st_ino
    assert import_powerinfer(file, out) == out and weights.stat().st_ino == before
    weights.write_bytes(weights.read_bytes()[:-1])
    import_powerinfer(file, out)
    assert weights.stat().st_ino != before
    open_source(out)
    assert [path.name for path in tmp_path.iterdir()] == ["m"], "no leftover"


def test_inspect_reads_headers_alone(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relu: Source) -> None:
    monkeypatch.setattr(powerinfer.PowerInferModel, "read", lambda *_: pytest.fail("no tensor is read"))
    result = inspect(file)
    assert result.convertible and (result.sites, result.units, result.activation) == (LAYERS, 176, "relu")
    assert result.model_type == "llama" and result.estimate is not None


def test_other_files_are_none(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3))
    assert not is_powerinfer(str(tmp_path / "m.gguf")) and not is_powerinfer(str(tmp_path))
    assert not is_powerinfer("owner/name")


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"llama.rope.dimension_count": 8}, {}, "must be the default one here, got 8 of 16 channels"),
        ({"llama.rope.scaling.type": "linear"}, {}, "must be the default one here, got llama.rope.scaling.type"),
        ({"llama.attention.head_count": 6}, {}, "head_count must share out the 64 channels, got 6"),
        ({"llama.embedding_length": None}, {}, "llama.embedding_length must be a whole number from 1 to"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, {}, "layer_norm_rms_epsilon must be a finite float"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, {}, f"must name each of the {VOCAB} tokens .* got 2 of them"),
        ({"tokenizer.ggml.tokens": ["a" * 2000] * VOCAB}, {}, "got a longer one, or one that is no text"),
        ({"tokenizer.ggml.model": "other"}, {}, "The vocabulary of .* must run, got"),
        ({"llama.feed_forward_length": 175}, {}, "must have shape|175"),
        ({}, {"blk_0_ffn_up_weight": None}, "got none of blk.0.ffn_up.weight"),
        ({}, {"blk_1_fc2_weight": None}, "got none of blk.1.fc2.weight"),
        ({}, {"blk_0_fc1_weight": np.zeros((3, 60), np.float32)}, "fc1 must have shape"),
        ({}, {"token_embd_weight": np.zeros(64, np.float32)}, "must"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    fields: dict[str, Any], tensors: dict[str, Any], message: str, file: Path, tmp_path: Path
) -> None:
    copy = rewritten(file, tmp_path / "x.gguf", fields, **tensors)
    with pytest.raises(InputError, match=message) as error:
        predictors_beside(open_source(import_powerinfer(copy, tmp_path / "out")))
    assert "\n" not in str(error.value) and "got" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) in (["x.gguf"], ["out", "x.gguf"])


def test_an_interruption_leaves_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(powerinfer, "write_tokenizer", stopped)
    with pytest.raises(KeyboardInterrupt):
        import_powerinfer(file, tmp_path / "m")
    assert not any(tmp_path.iterdir())


def test_the_disk_is_checked_first(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    monkeypatch.setattr(powerinfer, "check_disk", lambda _, count: checked.append(count))
    out = import_powerinfer(file, tmp_path / "m")
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert 0.9 * written < checked[0] <= written

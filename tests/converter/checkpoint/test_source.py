"""Opening a model folder: what is read, and one line for everything that is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODEL_TYPES, OTHER_TYPES, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import SitePlan, Threshold, uniform_tau
from sparsegate.converter.checkpoint.source import end_tokens, open_source
from sparsegate.converter.checkpoint.sparsity import write_sparsity
from sparsegate.converter.checkpoint.writer import write_checkpoint
from sparsegate.converter.modeling.empty import empty_model
from sparsegate.runtime_onnx.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same model in two shards with an index; the first holds the names of even rank."""
    tensors = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{k % 2 + 1}-of-00002.safetensors" for k, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, model / file)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return model


def refused(folder: Path | str, *words: str, then: Callable[[Any], Any] | None = None) -> str:
    """The one line that opening `folder`, and `then` on the source, ends with."""
    with pytest.raises(InputError) as error:
        source = open_source(folder)
        if then:
            then(source)
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and " must " in text and ", got" in text, text
    for word in words:
        assert word in text, (word, text)
    return text


def edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


# Reading


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_reads_what_safetensors_hold(model_type: str, tiny_model: Callable[[str], Path]) -> None:
    source = open_source(tiny_model(model_type))
    stored = load_file(tiny_model(model_type) / SINGLE)
    assert set(source.tensors) == set(stored) and source.arch.model_type == model_type
    found = source.read(stored)
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    assert sum(info.bytes for info in source.tensors.values()) == sum(t.nbytes for t in stored.values())
    at = torch.tensor([0, 7, 8, 289])
    assert torch.equal(source.rows(source.arch.embedding, at), stored[source.arch.embedding][at])
    assert source.tokenizer()("def add")["input_ids"] and source.name == source.folder.name


def test_sharded_equals_single(model: Path, tiny_model: Callable[[str], Path], sharded: Path) -> None:
    single, source = open_source(tiny_model("llama")), open_source(sharded)
    assert {name: info.shape for name, info in source.tensors.items()} == {
        name: info.shape for name, info in single.tensors.items()
    }
    assert all(
        torch.equal(a, b)
        for a, b in zip(source.read(single.tensors).values(), single.read(single.tensors).values(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_read_as_fp32(model: Path, dtype: torch.dtype) -> None:
    tensors = {name: t.to(dtype) for name, t in load_file(model / SINGLE).items()}
    save_file(tensors, model / SINGLE)
    source = open_source(model)
    found = source.read([DOWN])[DOWN]
    assert found.dtype == torch.float32 and torch.equal(found, tensors[DOWN].float())
    assert source.tensors[DOWN].bytes == tensors[DOWN].nbytes


def test_a_single_file_wins_over_an_index_as_in_transformers(model: Path) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": {"x": "absent.safetensors"}}))
    out = model.with_name("out")
    out.mkdir()
    write_checkpoint(open_source(model), {}, out)
    assert (out / SINGLE).is_file() and not (out / INDEX).exists()


def test_fingerprint_covers_every_byte_that_matters(model: Path) -> None:
    first = open_source(model).fingerprint
    assert (
        open_source(model).fingerprint
        == first
        == open_source(shutil.copytree(model, model.with_name("copy"))).fingerprint
    )
    (model / "README.md").write_text("new")
    assert open_source(model).fingerprint == first
    for name in ("config.json", "tokenizer.json", "generation_config.json", SINGLE):
        data = bytearray((model / name).read_bytes())
        data[-3 if name == SINGLE else data.index(b"0")] ^= 1
        before = (model / name).read_bytes()
        (model / name).write_bytes(data)
        assert open_source(model).fingerprint != first, name
        (model / name).write_bytes(before)
    assert open_source(model).fingerprint == first
    for name in ("LICENSE", "NOTICE", "chat_template.jinja"):
        (model / name).write_text("terms")
        assert open_source(model).fingerprint != first, name
        (model / name).unlink()


def test_fingerprint_covers_what_is_copied(sharded: Path, tmp_path: Path) -> None:
    """Every file of a checkpoint that stands in the source, the index of shards included."""
    (tmp_path / "out").mkdir()
    first = open_source(sharded).fingerprint
    write_checkpoint(open_source(sharded), {}, tmp_path / "out")
    copied = [path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"]
    assert {"config.json", INDEX, "generation_config.json"} <= set(copied)
    for name in copied:
        before = (sharded / name).read_text()
        (sharded / name).write_text(before + "\n")
        assert open_source(sharded).fingerprint != first, name
        (sharded / name).write_text(before)
    assert open_source(sharded).fingerprint == first


def test_checkpoint_copies_every_shard_and_nothing_foreign(sharded: Path) -> None:
    for name in ("modeling_evil.py", "pytorch_model.bin", "README.md"):
        (sharded / name).write_text("x")
    (sharded / "LICENSE").write_text("terms")
    out = sharded.with_name("out")
    out.mkdir()
    write_checkpoint(open_source(sharded), {Site(0): SitePlan(gate=Threshold("gate", uniform_tau(0.1, 176), 0.5))}, out)
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "tokenizer.json", INDEX, "LICENSE", "sparsity"} <= names and not names & {
        "modeling_evil.py",
        "pytorch_model.bin",
        "README.md",
    }
    for path in sharded.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert set(open_source(out, sparse=True).tensors) == set(open_source(sharded).tensors)


# Folders and configurations


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "absent", "Check the spelling")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "file")


def test_no_config(tmp_path: Path, model: Path) -> None:
    refused(tmp_path, "config.json")
    (model / "config.json").unlink()
    refused(model, "config.json", "save_pretrained")


@pytest.mark.parametrize(
    ("data", "word"),
    [(b"", "JSON"), (b"{", "JSON"), (b"[1]", "list"), (b"\xff\xfe\x00", "JSON"), (b"<html>\nnot found</html>", "JSON")],
)
def test_config_that_is_no_json(model: Path, data: bytes, word: str) -> None:
    (model / "config.json").write_bytes(data)
    refused(model, "config.json", word)


@pytest.mark.parametrize("model_type", OTHER_TYPES)
def test_unknown_architecture(model_type: str, tmp_path: Path) -> None:
    text = refused(make_model(model_type, tmp_path / "m"), repr(model_type), f"converter/arch/{model_type}.json")
    assert all(name in text for name in MODEL_TYPES)


def test_no_architecture(model: Path) -> None:
    raw = json.loads((model / "config.json").read_text())
    del raw["model_type"]
    (model / "config.json").write_text(json.dumps(raw))
    refused(model, "model_type", "None", "llama")


@pytest.mark.parametrize("value", [{"quant_method": "gptq", "bits": 4}, "gptq"])
def test_quantised(model: Path, value: Any) -> None:
    edit_config(model, quantization_config=value)
    refused(model, "gptq", "unquantised")


def test_quantised_tensors(model: Path) -> None:
    tensors = load_file(model / SINGLE)
    save_file(tensors | {DOWN: tensors[DOWN].to(torch.int8)}, model / SINGLE)
    refused(model, DOWN, "I8", "unquantised")


def test_already_sparse(model: Path) -> None:
    write_sparsity(model, {Site(0): SitePlan(gate=Threshold("gate", uniform_tau(0.1, 176), 0.5))}, "silu")
    refused(model, "sparse already")
    assert open_source(model, sparse=True).arch.model_type == "llama"


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", "wide"), ("num_hidden_layers", None), ("intermediate_size", [1])]
)
def test_config_with_impossible_values(model: Path, key: str, value: Any) -> None:
    edit_config(model, **{key: value})
    refused(model, "config.json")


def test_unsupported_activation(model: Path) -> None:
    edit_config(model, hidden_act="quick_gelu")
    refused(model, "hidden_act", "quick_gelu", "silu", then=lambda source: source.arch.activation(source.config))


# Weights


def test_missing_weights(model: Path) -> None:
    (model / SINGLE).unlink()
    refused(model, SINGLE, "neither")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt"])
def test_pickle_only(model: Path, name: str) -> None:
    (model / SINGLE).unlink()
    (model / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    refused(model, name, "pickle", "save_pretrained")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -5000])
def test_truncated(model: Path, keep: int) -> None:
    data = (model / SINGLE).read_bytes()
    (model / SINGLE).write_bytes(data[:keep])
    refused(model, SINGLE, "damaged", "again")


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h[DOWN].update(data_offsets=[10**12, 10**12 + 4 * 64 * 176]),
        lambda h: h[DOWN].update(data_offsets=[0, 16]),
        lambda h: h[DOWN].update(shape=[64, 10**9]),
        lambda h: h[DOWN].update(dtype="F16"),
        lambda h: h[DOWN].update(dtype="PICKLE"),
        lambda h: h.update(extra={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}),
    ],
)
def test_lying_header(model: Path, change: Callable[[Any], Any]) -> None:
    rewrite_header(model / SINGLE, change)
    refused(model, SINGLE, "damaged")


def test_header_longer_than_the_file(model: Path) -> None:
    data = bytearray((model / SINGLE).read_bytes())
    data[:8] = (10**15).to_bytes(8, "little")
    (model / SINGLE).write_bytes(data)
    refused(model, SINGLE, "damaged")


def test_shape_that_config_denies(model: Path) -> None:
    rewrite_header(model / SINGLE, lambda h: h[DOWN].update(shape=h[DOWN]["shape"][::-1]))
    refused(model, DOWN, "[64, 176]", "[176, 64]")


def test_config_of_another_size(model: Path) -> None:
    edit_config(model, intermediate_size=180)
    refused(model, "gate_proj", "[180, 64]", "[176, 64]")


def test_more_layers_than_weights(model: Path) -> None:
    edit_config(model, num_hidden_layers=3)
    refused(model, "model.layers.2.mlp.gate_proj.weight", "no such tensor")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.k_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.input_layernorm.weight",
    ],
)
@pytest.mark.parametrize("how", ["absent", "shape"])
def test_weights_outside_the_network_are_checked_too(model: Path, name: str, how: str) -> None:
    tensors = load_file(model / SINGLE)
    save_file(
        {k: t for k, t in tensors.items() if k != name}
        if how == "absent"
        else tensors | {name: tensors[name][:-1].contiguous()},
        model / SINGLE,
    )
    refused(model, name, "no such tensor" if how == "absent" else "[", then=empty_model)


def test_no_embedding(model: Path) -> None:
    tensors = load_file(model / SINGLE)
    save_file({k: t for k, t in tensors.items() if "embed_tokens" not in k}, model / SINGLE)
    refused(model, "model.embed_tokens.weight")


def test_tied_models_need_no_head(tiny_model: Callable[[str], Path]) -> None:
    source = open_source(tiny_model("qwen2"))
    assert "lm_head.weight" not in source.tensors
    empty_model(source)


def test_config_that_no_class_can_build(model: Path) -> None:
    edit_config(model, num_attention_heads=0)
    refused(model, "config.json", then=empty_model)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        (
            lambda m: m | {DOWN: "model-00009-of-00002.safetensors"},
            ("model-00009-of-00002.safetensors", "no such file"),
        ),
        (lambda m: m | {"ghost.weight": "model-00001-of-00002.safetensors"}, ("ghost.weight",)),
        (lambda m: m | {DOWN: "../../etc/passwd"}, (INDEX, "beside")),
        (lambda m: m | {DOWN: 3}, (INDEX,)),
        (lambda m: [1], (INDEX,)),
        (lambda m: {}, (INDEX,)),
    ],
)
def test_lying_index(sharded: Path, weight_map: Callable[[Any], Any], words: tuple[str, ...]) -> None:
    raw = json.loads((sharded / INDEX).read_text())
    (sharded / INDEX).write_text(json.dumps(raw | {"weight_map": weight_map(raw["weight_map"])}))
    refused(sharded, *words)


def test_absent_and_truncated_shard(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    refused(sharded, shard.name, "damaged")
    shard.unlink()
    refused(sharded, shard.name, "no such file")


def test_file_that_changes_after_opening(model: Path) -> None:
    source = open_source(model)
    data = (model / SINGLE).read_bytes()
    (model / SINGLE).write_bytes(data[: len(data) // 2])
    for read in (lambda: source.read([DOWN]), lambda: source.rows(source.arch.embedding, torch.tensor([0]))):
        with pytest.raises(InputError, match="damaged"):
            read()


def test_no_tokenizer(model: Path) -> None:
    for path in model.glob("*token*"):
        path.unlink()
    refused(model, "tokenizer", "tokenizer.json", then=lambda source: source.tokenizer())
    (model / "tokenizer.json").write_text("{")
    refused(model, "tokenizer", then=lambda source: source.tokenizer())


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [(1, [1, 75], {1, 75}), (1, 5, {5}), ([1, 3], None, {1, 3}), (1, {}, {1}), (None, None, set())],
)
def test_end_tokens_are_those_of_transformers(tmp_path: Path, config: Any, generation: Any, ends: set[int]) -> None:
    folder = make_model("llama", tmp_path / "m", eos_token_id=config)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        fields = generation if isinstance(generation, dict) else {"eos_token_id": generation}
        (folder / "generation_config.json").write_text(json.dumps(fields))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert end_tokens(folder) == end_tokens(model) == ends
    used = model.generation_config.eos_token_id
    assert generation == {} or ends == set(used if isinstance(used, list) else [used] if used is not None else [])


def test_end_tokens_that_are_none(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(InputError, match="eos_token_id must be a token id or a list of them"):
        end_tokens(folder)


def test_no_vocabulary(model: Path) -> None:
    """transformers makes an empty tokenizer of such a folder."""
    (model / "tokenizer.json").unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "LlamaTokenizer"}))
    assert "tokenizer.json" in refused(
        model, "must lie in", "got none of its files", then=lambda source: source.tokenizer()
    )


def test_a_sentencepiece_model_alone_names_sentencepiece(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    monkeypatch.setattr("sparsegate.converter.checkpoint.source.find_spec", lambda name: None)
    line = refused(model, "sentencepiece", "pip install sentencepiece protobuf", then=lambda source: source.tokenizer())
    assert "tiktoken" not in line


def test_a_damaged_sentencepiece_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package there, or for a file of another kind, the reason is the reader's."""
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"nonsense")
    refused(model, "The tokenizer must load from", then=lambda source: source.tokenizer())

"""PowerInfer's files (f 10): round trips bit for bit, and the feed-forward networks computed from the file as
PowerInfer computes them.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from models import PREDICTOR_RANKS, VOCAB, make_model, put_predictors
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Plan, Predictor, SitePlan, Swap, Threshold, uniform_tau
from sparsegate.converter.checkpoint.source import Source, open_source
from sparsegate.converter.sources.gpu_split import place, write_gpu_split
from sparsegate.converter.sources.powerinfer import import_powerinfer, read_powerinfer, write_powerinfer
from sparsegate.converter.sources.predictor_folder import folder_form
from sparsegate.converter.sources.predictors import predictors_beside
from sparsegate.converter.sources.published import normalise
from sparsegate.runtime_onnx.errors import InputError

D, N, LAYERS, HEADS, KV = 64, 176, 2, 4, 2


@pytest.fixture(scope="module")
def relu(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A llama with relu and predictors beside its weights."""
    return open_source(put_predictors(make_model("llama", tmp_path_factory.mktemp("relu") / "m", hidden_act="relu")))


@pytest.fixture(scope="module")
def drelu(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A mistral with dReLU and predictors, as published folders of type bamboo become."""
    folder = tmp_path_factory.mktemp("drelu")
    return open_source(
        normalise(put_predictors(make_model("mistral", folder / "m", head_dim=16)), folder / "out", activation="drelu")
    )


def raw(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and tensors by the gguf package's own reader, under llama.cpp's magic."""
    plain = path.with_suffix(".plain")
    plain.write_bytes(b"GGUF" + path.read_bytes()[4:])
    reader = gguf.GGUFReader(plain)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    plain.unlink()
    return fields, tensors


def imported(path: Path) -> Source:
    """The model folder that a model file becomes, beside it."""
    return open_source(import_powerinfer(path, path.with_name(f"{path.stem}-imported")))


def predictor(layer: int, role: str) -> str:
    return f"model.layers.{layer}.mlp.predictor.{role}.weight"


@pytest.mark.parametrize("kind", ["relu", "drelu"])
def test_f10_round_trip_bit_for_bit(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source: Source = request.getfixturevalue(kind)
    plan = predictors_beside(source)
    path = write_powerinfer(source, plan, tmp_path / "m.powerinfer.gguf", precision="fp32")
    assert path.read_bytes()[:8] == b"PWRI" + struct.pack("<I", 3)
    fields, tensors = raw(path)
    arch = {"relu": "llama", "drelu": "bamboo"}[kind]
    assert fields["general.architecture"] == arch and fields["powerinfer.sparse_threshold"] == np.nextafter(
        np.float32(0), np.float32(1)
    )
    sizes = {
        "block_count": LAYERS,
        "embedding_length": D,
        "feed_forward_length": N,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV,
    }
    assert {key: fields[f"{arch}.{key}"] for key in sizes} == sizes and fields[
        f"{arch}.rope.dimension_count"
    ] == D // HEADS
    weights = {name: t for name, t in source.read(source.tensors).items() if "predictor" not in name}
    for layer, rank in enumerate(PREDICTOR_RANKS):
        assert tensors[f"blk.{layer}.fc1.weight"].shape == (rank, D) and tensors[f"blk.{layer}.fc2.weight"].shape == (
            N,
            rank,
        )
        down = weights[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert (
            np.array_equal(tensors[f"blk.{layer}.ffn_down_t.weight"], down.T.numpy())
            and f"blk.{layer}.ffn_down.weight" not in tensors
        )

    model = read_powerinfer(path)
    predictors = {predictor(layer, role) for layer in range(LAYERS) for role in ("fc1", "fc2")}
    assert model.architecture == arch and model.tensors.keys() == weights.keys() | predictors
    assert all(torch.equal(model.read(name), weights[name]) for name in weights)
    wrote, _ = folder_form(plan, "residual", source)
    again = read_powerinfer(
        write_powerinfer(source, predictors_beside(imported(path)), tmp_path / "again.gguf", precision="fp32")
    )
    for layer in range(LAYERS):
        fc1, fc2 = predictor(layer, "fc1"), predictor(layer, "fc2")
        assert torch.equal(model.read(fc1), wrote[layer]["fc1.weight"])
        assert torch.equal(model.read(fc2), wrote[layer]["fc2.weight"])
        torch.testing.assert_close(model.read(fc1), source.read([fc1])[fc1], rtol=3e-7, atol=0)
        torch.testing.assert_close(again.read(fc1), model.read(fc1), rtol=3e-7, atol=0)
        assert torch.equal(again.read(fc2), model.read(fc2))
    assert again.threshold == model.threshold


def test_f10_the_plan_that_comes_back_is_the_plan(drelu: Source, tmp_path: Path) -> None:
    plan = predictors_beside(drelu)
    back = predictors_beside(imported(write_powerinfer(drelu, plan, tmp_path / "m.gguf", precision="fp32")))
    assert back.keys() == plan.keys()
    for site, found in back.items():
        entry, theirs = found.gate, plan[site].gate
        assert found.edits == (Swap("drelu"),) and isinstance(entry, Predictor) and isinstance(theirs, Predictor)
        assert torch.equal(entry.tau, theirs.tau) and torch.equal(entry.fc2, theirs.fc2)
        torch.testing.assert_close(entry.fc1, theirs.fc1, rtol=5e-7, atol=0)


def by_powerinfer(
    tensors: dict[str, np.ndarray], layer: int, h: np.ndarray, x: np.ndarray, threshold: float, both: bool
) -> tuple[np.ndarray, np.ndarray]:
    """A layer's network as PowerInfer computes it: rows of gate, up and the transposed down of the neurons that run;
    and who runs [T, n].
    """
    w = {name: tensors[f"blk.{layer}.{name}.weight"] for name in ("fc1", "fc2", "ffn_gate", "ffn_up", "ffn_down_t")}
    logits = np.maximum(h @ w["fc1"].T, 0) @ w["fc2"].T
    out, runs = np.zeros_like(x), ~(logits < np.float32(threshold))
    for token in range(len(x)):
        for neuron in np.flatnonzero(runs[token]):
            gate, up = max(w["ffn_gate"][neuron] @ x[token], 0), w["ffn_up"][neuron] @ x[token]
            out[token] += gate * (max(up, 0) if both else up) * w["ffn_down_t"][neuron]
    return out, runs


@torch.no_grad()
@pytest.mark.parametrize("kind", ["relu", "drelu"])
def test_f10_sparse_output_from_the_file(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """All logits at or above the threshold: dense. At the plan's own threshold: the plan's mask. A higher one, and the
    other activation, differ.
    """
    source: Source = request.getfixturevalue(kind)
    plan = predictors_beside(source)
    _, tensors = raw(path := write_powerinfer(source, plan, tmp_path / "m.gguf", precision="fp32"))
    threshold = read_powerinfer(path).threshold
    generator = torch.Generator().manual_seed(7)
    h = torch.randn(6, D, generator=generator)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        w = {
            name.removeprefix(prefix): t
            for name, t in source.read([name for name in source.tensors if name.startswith(prefix)]).items()
        }
        x = w["post_attention_layernorm.weight"] * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
        up = x @ w["mlp.up_proj.weight"].T
        z = F.relu(x @ w["mlp.gate_proj.weight"].T) * (F.relu(up) if kind == "drelu" else up)
        dense = z @ w["mlp.down_proj.weight"].T
        everything, runs = by_powerinfer(tensors, layer, h.numpy(), x.numpy(), -1e30, kind == "drelu")
        assert runs.all() and np.abs(everything - dense.numpy()).max() < 1e-5 * np.abs(dense.numpy()).max()

        entry = plan[Site(layer)].gate
        assert isinstance(entry, Predictor)
        kept = F.relu(x @ entry.fc1.T) @ entry.fc2.T > entry.tau
        sparse, runs = by_powerinfer(tensors, layer, h.numpy(), x.numpy(), threshold, kind == "drelu")
        assert np.array_equal(runs, kept.numpy()) and 0.2 < runs.mean() < 0.8
        expected = (z * kept) @ w["mlp.down_proj.weight"].T
        assert np.abs(sparse - expected.numpy()).max() < 1e-5 * np.abs(dense.numpy()).max()
        other, fewer = by_powerinfer(tensors, layer, h.numpy(), x.numpy(), 1.0, kind == "drelu")
        assert fewer.mean() < runs.mean() and np.abs(other - sparse).max() > 1e-2 * np.abs(dense.numpy()).max()
        assert (
            np.abs(by_powerinfer(tensors, layer, h.numpy(), x.numpy(), -1e30, kind != "drelu")[0] - dense.numpy()).max()
            > 1e-2
        )


def test_query_and_key_rows_are_in_pairs_as_llama_cpp_takes_them(relu: Source, tmp_path: Path) -> None:
    _, tensors = raw(write_powerinfer(relu, predictors_beside(relu), tmp_path / "m.gguf", precision="fp32"))
    weights = relu.read(
        [
            "model.layers.1.self_attn.q_proj.weight",
            "model.layers.1.self_attn.k_proj.weight",
            "model.layers.1.self_attn.v_proj.weight",
        ]
    )
    for name, heads in (("q", HEADS), ("k", KV)):
        rows, half = weights[f"model.layers.1.self_attn.{name}_proj.weight"], D // HEADS // 2
        expected = [
            rows[head * 2 * half + part * half + k] for head in range(heads) for k in range(half) for part in range(2)
        ]
        assert np.array_equal(tensors[f"blk.1.attn_{name}.weight"], torch.stack(expected).numpy())
    assert np.array_equal(tensors["blk.1.attn_v.weight"], weights["model.layers.1.self_attn.v_proj.weight"].numpy())


def test_half_precision_threshold_and_tied_output(tmp_path: Path) -> None:
    source = open_source(
        put_predictors(make_model("llama", tmp_path / "m", hidden_act="relu", tie_word_embeddings=True))
    )
    path = write_powerinfer(source, predictors_beside(source), tmp_path / "m.gguf", threshold=0.125)
    fields, tensors = raw(path)
    assert fields["powerinfer.sparse_threshold"] == 0.125 == read_powerinfer(path).threshold
    assert {str(t.dtype) for name, t in tensors.items() if t.ndim == 2} == {"float16"} and tensors[
        "blk.0.ffn_norm.weight"
    ].dtype == np.float32
    assert np.array_equal(tensors["output.weight"], tensors["token_embd.weight"]) and tensors[
        "output.weight"
    ].shape == (VOCAB, D)
    weight = source.read(["model.layers.0.mlp.up_proj.weight"])["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(read_powerinfer(path).read("model.layers.0.mlp.up_proj.weight"), weight.half().float())
    with pytest.raises(InputError, match=r"must have threshold 0 and no bias, got threshold 0\.125"):
        predictors_beside(imported(path))


def test_the_vocabulary_is_llama_cpps(relu: Source, tmp_path: Path) -> None:
    fields, _ = raw(write_powerinfer(relu, predictors_beside(relu), tmp_path / "m.gguf"))
    tokenizer = relu.tokenizer()
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.tokens"] == [
        tokenizer.convert_ids_to_tokens(k) for k in range(VOCAB)
    ]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]] == [tuple(merge) for merge in merges]
    control = [k for k, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == gguf.TokenType.CONTROL]
    assert (
        control == sorted(tokenizer.all_special_ids) and fields["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    )


def test_a_vocabulary_with_byte_fallback(tmp_path: Path) -> None:
    """llama's own kind: the score of a token is its merge's rank, so the best merge of two is the first one."""
    folder = put_predictors(make_model("llama", tmp_path / "m", hidden_act="relu"))
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "\u2581": 4, "a": 5, "b": 6, "ab": 7, "\u2581a": 8, "aab": 9}
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": [["\u2581", "a"], ["a", "b"], ["a", "ab"]],
        "unk_token": "<unk>",
        "byte_fallback": True,
        "fuse_unk": True,
    }
    added = [
        {
            "id": k,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for name, k in list(vocab.items())[:3]
    ]
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model}))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    source = open_source(folder)
    fields, _ = raw(write_powerinfer(source, predictors_beside(source), tmp_path / "m.gguf"))
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.tokens"][:11] == [*vocab, "[PAD10]"]
    assert fields["tokenizer.ggml.scores"][:10] == [0, 0, 0, 0, 0, 0, 0, -1, 0, -2]
    kinds = gguf.TokenType
    expected = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.BYTE, *[kinds.NORMAL] * 6, kinds.UNUSED]
    assert fields["tokenizer.ggml.token_type"][:11] == expected and "tokenizer.ggml.merges" not in fields


def firing_counts(layers: int = LAYERS, n: int = 700) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {layer: (torch.rand(n, generator=generator) ** (layer + 2) * 1000).long() for layer in range(layers)}


@pytest.mark.parametrize("room", [0, 255, 256, 600, 1300, 10_000])
def test_f10_gpu_split(room: int, tmp_path: Path) -> None:
    counts = firing_counts()
    split = place(counts, room)
    assert sum(int(index.sum()) for index in split.values()) <= room
    side = write_gpu_split(tmp_path / "m.gguf", split, 123_456_789_012)
    assert side == tmp_path / "m.gguf.generated.gpuidx" and side.read_bytes()[:8] == b"PWRI" + struct.pack("<I", 3)
    fields, tensors = raw(side)
    assert fields["split.vram_capacity"] == 123_456_789_012 and fields["generic.gpu_index.block_count"] == LAYERS
    for layer in range(LAYERS):
        index, bucket = tensors[f"blk.{layer}.gpu_idx"], tensors[f"blk.{layer}.gpu_bucket"]
        assert index.dtype == bucket.dtype == np.int32 and index.shape == (700,)
        assert np.array_equal(bucket, np.sort(np.flatnonzero(index == 1))) and set(index.tolist()) <= {0, 1}
        assert np.array_equal(index, split[layer].numpy())


def test_placement_takes_the_groups_that_fire_most() -> None:
    """Against every choice of whole groups; a layer's own groups are its 256 most firing neurons, the next 256, and the
    rest.
    """
    counts = firing_counts()
    groups = [
        (k, chunk) for k, values in counts.items() for chunk in values.argsort(descending=True, stable=True).split(256)
    ]
    room = 2 * 256
    best = max(
        sum(int(counts[k][chunk].sum()) for bit, (k, chunk) in enumerate(groups) if choice >> bit & 1)
        for choice in range(2 ** len(groups))
        if sum(len(chunk) for bit, (_, chunk) in enumerate(groups) if choice >> bit & 1) <= room
    )
    split = place(counts, room)
    assert sum(int(counts[k][index == 1].sum()) for k, index in split.items()) == best
    first = split[0] == 1
    assert int(counts[0][first].min()) >= int(counts[0][~first].max())
    reversed_counts = {k: values.max() - values for k, values in counts.items()}
    assert any(not torch.equal(place(reversed_counts, room)[k], split[k]) for k in split)


def test_the_side_file_of_a_model_is_written_with_it(relu: Source, tmp_path: Path) -> None:
    counts = {layer: torch.arange(N) for layer in range(LAYERS)}
    path = write_powerinfer(relu, predictors_beside(relu), tmp_path / "m.gguf", counts=counts, vram_bytes=N * 3 * D * 2)
    side = path.with_name(f"{path.name}.generated.gpuidx")
    _, tensors = raw(side)
    assert [int(tensors[f"blk.{k}.gpu_idx"].sum()) for k in range(LAYERS)] == [N, 0], "room for one layer's in fp16"
    with pytest.raises(InputError, match="counts and vram_bytes must be given together"):
        write_powerinfer(relu, predictors_beside(relu), tmp_path / "n.gguf", counts=counts)
    path.unlink()
    with pytest.raises(InputError, match=r"path must be a new file, got .*gpuidx, which exists"):
        write_powerinfer(relu, predictors_beside(relu), path, counts=counts, vram_bytes=1)
    assert not path.exists() and side.exists()


@pytest.mark.parametrize("values", [torch.full((4,), 2), torch.zeros(2, 2), torch.tensor([0.5])])
def test_a_split_that_is_no_choice_is_refused(values: Tensor, tmp_path: Path) -> None:
    """The engine copies the rows that a bucket names without a look at them."""
    with pytest.raises(InputError, match=r"blk\.0\.gpu_idx must be a vector of 0 and 1"):
        write_gpu_split(tmp_path / "m.gguf", {0: values}, 1)
    assert not any(tmp_path.iterdir())


def test_a_split_of_other_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must hold layers 0, 1, 2 and so on, got 1"):
        write_gpu_split(tmp_path / "m.gguf", {1: torch.zeros(4, dtype=torch.int32)}, 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b"GGUF" + b[4:], "must start with PWRI and version 3, got llama.cpp's own GGUF"),
        (lambda b: b"abcdefgh", "must start with PWRI and version 3, got b'abcdefgh'"),
        (lambda b: b[: len(b) // 2], "must be a complete PowerInfer file, got a damaged one"),
        (lambda b: b[:40], "must be a complete PowerInfer file, got a damaged one"),
        (
            lambda b: b.replace(b"blk.1.fc2.weight", b"blk.1.fc3.weight"),
            "must hold known tensors only, got blk.1.fc3.weight",
        ),
        (
            lambda b: b.replace(b"blk.1.fc2.weight", b"blk.7.fc2.weight"),
            "must hold known tensors only, got blk.7.fc2.weight",
        ),
        (lambda b: b.replace(b"llama", b"gemma"), "must be of architecture llama or bamboo, got gemma"),
    ],
)
def test_bad_model_files_are_refused(
    spoil: Callable[[bytes], bytes], message: str, relu: Source, tmp_path: Path
) -> None:
    path = write_powerinfer(relu, predictors_beside(relu), tmp_path / "m.gguf")
    path.write_bytes(spoil(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_powerinfer(path)
    assert "\n" not in str(error.value) and path.read_bytes() == before
    with pytest.raises(InputError, match="must be a file, got nothing"):
        read_powerinfer(tmp_path / "none.gguf")


def test_what_powerinfer_does_not_have_is_refused(
    relu: Source, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    def plan(rank: int = 3) -> Plan:
        return {
            Site(k): SitePlan(gate=Predictor(torch.zeros(rank, D), torch.zeros(N, rank), uniform_tau(0, N), 1.0))
            for k in range(LAYERS)
        }

    uneven: Plan = {
        **plan(),
        Site(1): SitePlan(gate=Predictor(torch.zeros(1, D), torch.zeros(N, 1), uniform_tau(0.5, N), 1.0)),
    }
    cases: list[tuple[Source, Plan, dict[str, Any], str]] = [
        (open_source(tiny_model("llama")), plan(), {}, "activation must be relu or drelu in every layer, got silu"),
        (open_source(tiny_model("qwen2")), plan(), {}, "must be of type llama or mistral, got qwen2"),
        (
            relu,
            {Site(0): replace(plan()[Site(0)], edits=(Swap("drelu"),)), Site(1): plan()[Site(1)]},
            {},
            "in every layer, got drelu, relu",
        ),
        (
            relu,
            {Site(k): SitePlan(gate=Threshold("gate", uniform_tau(0, N), 0.5)) for k in range(LAYERS)},
            {},
            "holds one predictor a layer, got threshold",
        ),
        (relu, uneven, {}, "got 0.5 after"),
        (relu, plan(), {"threshold": float("nan")}, "threshold must be a finite float, got nan"),
    ]
    for source, wished, options, message in cases:
        with pytest.raises(InputError, match=re.escape(message)):
            write_powerinfer(source, wished, tmp_path / "m.gguf", **options)
    wide = open_source(make_model("mistral", tmp_path / "wide", hidden_act="relu"))
    with pytest.raises(InputError, match="heads must share out the hidden size, got 4 of 32"):
        write_powerinfer(wide, plan(), tmp_path / "m.gguf")
    turned = shutil.copytree(relu.folder, tmp_path / "turned")
    raw_config = json.loads((turned / "config.json").read_text())
    (turned / "config.json").write_text(
        json.dumps(raw_config | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}})
    )
    with pytest.raises(InputError, match="rotary embedding must be the default one here, got linear"):
        write_powerinfer(open_source(turned), plan(), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
    (tmp_path / "m.gguf").write_text("there")
    with pytest.raises(InputError, match="path must be a new file"):
        write_powerinfer(relu, plan(), tmp_path / "m.gguf")


def test_weights_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    folder = put_predictors(make_model("llama", tmp_path / "m", hidden_act="relu"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_source(folder)
    with pytest.raises(
        InputError, match="Weights must be finite in float16, got a larger one. Write the file with precision fp32"
    ):
        write_powerinfer(source, predictors_beside(source), tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_without_the_package(relu: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    for call in (
        lambda: write_powerinfer(relu, {}, tmp_path / "m.gguf"),
        lambda: read_powerinfer(tmp_path),
        lambda: import_powerinfer(tmp_path, tmp_path / "out"),
    ):
        with pytest.raises(InputError, match=r"Install sparsegate\[bench\]"):
            call()

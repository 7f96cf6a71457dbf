"""Published folders against replicas of their modelling files, written by hand."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import PREDICTOR_RANKS, TEXT, VOCAB, make_model, put_predictors
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import sparsegate.converter
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Exact, Predictor, SitePlan, Swap
from sparsegate.converter.checkpoint.source import Source, open_source
from sparsegate.converter.modeling.gated import apply_plan, dense
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.sources.predictors import predictors_beside
from sparsegate.converter.sources.published import PUBLISHED, REFUSED, is_published, normal_config, normalise
from sparsegate.runtime_onnx.errors import InputError

D, N, LAYERS, HEADS, KV, WINDOW, THETA = 64, 176, 2, 4, 2, 24, 5000.0
TOKENS = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
BAMBOO = {
    "_name_or_path": "/somewhere/else",
    "architectures": ["BambooForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_bamboo.BambooConfig",
        "AutoModelForCausalLM": "modeling_bamboo.BambooForCausalLM",
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "relu",
    "hidden_size": D,
    "initializer_range": 0.02,
    "intermediate_size": N,
    "max_position_embeddings": 256,
    "model_type": "bamboo",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV,
    "rms_norm_eps": 1e-05,
    "rope_theta": THETA,
    "sliding_window": WINDOW,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.41.0",
    "use_cache": False,
    "vocab_size": VOCAB,
    "an_unknown_key": 7,
}
PROSPARSE = {
    **{
        key: value
        for key, value in BAMBOO.items()
        if key not in ("sliding_window", "attention_dropout", "an_unknown_key")
    },
    "architectures": ["SparseLlamaForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_sparsellama.SparseLlamaForCausalLM"},
    "hidden_act": "fatrelu",
    "hidden_act_param": 0.01,
    "model_type": "sparsellama",
    "pretraining_tp": 1,
    "rope_scaling": None,
    "max_length": 4096,
}


def make_published(folder: Path, raw: dict[str, Any], predictors: bool = False) -> Path:
    """A folder as published: weights and tokenizer of a tiny model of the base type, the given config.json, and code
    that must never run.
    """
    make_model(
        "mistral" if raw["model_type"] == "bamboo" else "llama",
        folder,
        **({"head_dim": D // HEADS} if raw["model_type"] == "bamboo" else {}),
    )
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "modeling_bamboo.py").write_text("raise SystemExit('remote code ran')")
    if predictors:
        put_predictors(folder)
    return folder


def norm(h: Tensor, weight: Tensor) -> Tensor:
    return weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5))


def attention(x: Tensor, w: dict[str, Tensor], prefix: str, window: int | None) -> Tensor:
    length, width = x.shape[1], D // HEADS
    frequencies = 1.0 / THETA ** (torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)

    def turned(v: Tensor) -> Tensor:
        low, high = v.chunk(2, dim=-1)
        return v * angles.cos() + torch.cat([-high, low], dim=-1) * angles.sin()

    def heads(name: str, count: int) -> Tensor:
        return (x @ w[f"{prefix}.{name}.weight"].T).unflatten(-1, (count, width)).transpose(1, 2)

    q, k, v = turned(heads("q_proj", HEADS)), turned(heads("k_proj", KV)), heads("v_proj", KV)
    k, v = (t.repeat_interleave(HEADS // KV, dim=1) for t in (k, v))
    back = torch.arange(length)[:, None] - torch.arange(length)[None]
    hidden = (back < 0) if window is None else (back < 0) | (back >= window)
    scores = (q @ k.transpose(-1, -2) / width**0.5).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ w[f"{prefix}.o_proj.weight"].T


def replica(
    w: dict[str, Tensor], tokens: Tensor, mlp: Callable[[str, Tensor, Tensor], Tensor], window: int | None
) -> Tensor:
    """The published modelling file's forward; `mlp` gets its prefix, the normed x and the residual before the norm."""
    h = w["model.embed_tokens.weight"][tokens]
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        h = h + attention(norm(h, w[f"{block}.input_layernorm.weight"]), w, f"{block}.self_attn", window)
        h = h + mlp(f"{block}.mlp", norm(h, w[f"{block}.post_attention_layernorm.weight"]), h)
    return norm(h, w["model.norm.weight"]) @ w["lm_head.weight"].T


def load_swapped(source: Source) -> Any:
    sparsegate.converter.register()
    return AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_bamboo_with_predictors_end_to_end(tmp_path: Path) -> None:
    """f 8, f 9: the masks of our plan behind the norm are those of the published model before it, and so are the
    logits; without the fold neither is.
    """
    folder = make_published(tmp_path / "p", BAMBOO, predictors=True)
    w = load_file(folder / "model.safetensors")
    source = open_source(normalise(folder, tmp_path / "out"))
    assert (
        source.arch.model_type == "mistral"
        and source.config.rope_parameters["rope_theta"] == THETA
        and source.config.sliding_window == WINDOW
    )
    assert source.swaps == {Site(k): SitePlan((Swap("drelu"),), Exact()) for k in range(LAYERS)}
    plan = predictors_beside(source)
    assert len(plan) == LAYERS and all(e.edits and isinstance(e.gate, Predictor) for e in plan.values())

    masks: dict[str, Tensor] = {}
    logits: dict[str, Tensor] = {}

    def bamboo(prefix: str, x: Tensor, before: Tensor) -> Tensor:
        logits[prefix] = F.relu(before @ w[f"{prefix}.predictor.fc1.weight"].T) @ w[f"{prefix}.predictor.fc2.weight"].T
        masks[prefix] = torch.round(torch.sigmoid(logits[prefix]))
        products = F.relu(x @ w[f"{prefix}.gate_proj.weight"].T) * F.relu(x @ w[f"{prefix}.up_proj.weight"].T)
        return (masks[prefix] * products) @ w[f"{prefix}.down_proj.weight"].T

    expected = replica(w, TOKENS, bamboo, WINDOW)
    model = load_swapped(source)
    entered: dict[str, Tensor] = {}
    for layer, block in enumerate(model.get_decoder().layers):
        block.mlp.register_forward_pre_hook(
            lambda _, given, k=layer: entered.update({f"model.layers.{k}.mlp": given[0]})
        )
    apply_plan(model, plan, source.arch, source.arch.activation(source.config))
    ours = model(input_ids=TOKENS).logits
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    for layer in range(LAYERS):
        prefix, predictor = f"model.layers.{layer}.mlp", plan[Site(layer)].gating
        assert isinstance(predictor, Predictor) and predictor.rank == PREDICTOR_RANKS[layer]
        kept = F.relu(entered[prefix] @ predictor.fc1.T) @ predictor.fc2.T > predictor.tau
        ties = logits[prefix] == 0  # tokens that no hidden unit answers to
        near = (logits[prefix].abs() < 1e-5 * logits[prefix].square().mean().sqrt()) & ~ties
        assert torch.equal(kept | near, (masks[prefix] == 1) | near) and float(near.float().mean()) < 1e-3
        assert not bool((masks[prefix][ties] == 1).any()) and bool(ties.any()) == (layer == 1)
        assert 0.2 < float(masks[prefix].mean()) < 0.8
        unfolded = F.relu(entered[prefix] @ w[f"{prefix}.predictor.fc1.weight"].T) @ predictor.fc2.T > 0
        assert float((unfolded != kept).float().mean()) > 0.02
    with dense(model):
        unmasked = model(input_ids=TOKENS).logits
    assert (unmasked - expected).abs().max() > 0.05 * expected.abs().max(), "the predictors must matter"


@torch.no_grad()
def test_bamboo_without_predictors_is_the_dense_drelu_model(tmp_path: Path) -> None:
    folder = make_published(tmp_path / "p", BAMBOO)
    w = load_file(folder / "model.safetensors")
    model = load_swapped(open_source(normalise(folder, tmp_path / "out")))

    def mlp(both: bool, prefix: str, x: Tensor, _: Tensor) -> Tensor:
        up = x @ w[f"{prefix}.up_proj.weight"].T
        return (F.relu(x @ w[f"{prefix}.gate_proj.weight"].T) * (F.relu(up) if both else up)) @ w[
            f"{prefix}.down_proj.weight"
        ].T

    ours = model(input_ids=TOKENS).logits
    for both in (True, False):
        expected = replica(w, TOKENS, lambda *given, both=both: mlp(both, *given), WINDOW)
        assert bool((ours - expected).abs().max() < 1e-5 * expected.abs().max()) == both


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "act"),
    [
        ({}, lambda v: torch.where(v >= 0.01, v, 0.0)),
        ({"hidden_act_param": 0.25}, lambda v: torch.where(v >= 0.25, v, 0.0)),
        ({"hidden_act": "shiftrelu", "hidden_act_param": 0.1}, lambda v: F.relu(v - 0.1)),
        ({"hidden_act": "relu", "hidden_act_param": None}, F.relu),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0.0}, F.relu),
        ({"hidden_act": "silu"}, F.silu),
    ],
)
def test_prosparse_computes_as_its_modelling_file(
    change: dict[str, Any], act: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    raw = PROSPARSE | change
    folder = make_published(tmp_path / "p", raw)
    w = load_file(folder / "model.safetensors")
    source = open_source(normalise(folder, tmp_path / "out"))
    ours = load_swapped(source)(input_ids=TOKENS).logits

    def mlp(prefix: str, x: Tensor, _: Tensor) -> Tensor:
        return (act(x @ w[f"{prefix}.gate_proj.weight"].T) * (x @ w[f"{prefix}.up_proj.weight"].T)) @ w[
            f"{prefix}.down_proj.weight"
        ].T

    expected = replica(w, TOKENS, mlp, None)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    stock = raw["hidden_act"] in ("relu", "silu") or not raw["hidden_act_param"]
    written = json.loads((source.folder / "config.json").read_text())
    assert (written["model_type"] == "llama") == stock == (source.swaps == {})
    if not stock:  # another activation is far from it
        other = replica(w, TOKENS, lambda prefix, x, h: mlp(prefix, x - 0.3, h), None)
        assert (ours - other).abs().max() > 1e-3


def test_fatrelu_keeps_a_value_equal_to_the_parameter(tmp_path: Path) -> None:
    """Theirs is v >= b, ours v > b: the parameter becomes the float32 below."""
    source = open_source(normalise(make_published(tmp_path / "p", PROSPARSE), tmp_path / "out"))
    spelled = {swap.activation("") for swap in source.swaps.values()}
    below = np.nextafter(np.float32(0.01), np.float32(0))
    (text,) = spelled
    value = np.float32(float(re.fullmatch(r"fatrelu\((.*)\)", text)[1]))  # pyright: ignore[reportOptionalSubscript]
    assert value == below < np.float32(0.01)


def test_what_is_written(tmp_path: Path) -> None:
    folder = make_published(tmp_path / "p", BAMBOO, predictors=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {
        "auto_map": {"AutoTokenizer": ["x.Y", None]}
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    out = normalise(folder, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert out.joinpath("model.safetensors").samefile(folder / "model.safetensors")
    assert not list(out.glob("*.py")) and "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())
    written = json.loads((out / "config.json").read_text())
    assert not {"auto_map", "_name_or_path", "an_unknown_key", "transformers_version"} & set(written)
    assert (written["model_type"], written["architectures"], written["hidden_act"]) == (
        "sparsegate_mistral",
        ["SparsegateMistralForCausalLM"],
        "sparsegate",
    )
    entry = {"score": "exact", "activation": "drelu", "density": 1.0, "opened": 1.0}
    assert written["sparsity"] == {
        "version": 2,
        "base_activation": "silu",
        "sites": {f"layers.{k}.ffn": entry for k in range(LAYERS)},
    }
    assert written["rope_theta"] == THETA and written["intermediate_size"] == N and written == normal_config(BAMBOO)
    first = open_source(out).fingerprint
    assert open_source(normalise(folder, out)).fingerprint == first, "written again, it is the same"
    with pytest.raises((KeyError, ValueError)):
        LlamaForCausalLM.from_pretrained(out)


def test_links_to_shards_and_to_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_published(tmp_path / "p", BAMBOO)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def refuse(*_: Any) -> None:
        raise OSError("another file system")

    monkeypatch.setattr("os.link", refuse)
    source = open_source(normalise(folder, tmp_path / "out"))
    assert set(source.tensors) == set(weights) and (tmp_path / "out" / "a.safetensors").is_symlink()
    assert torch.equal(source.read([names[1]])[names[1]], weights[names[1]])


def test_a_stock_folder_with_an_activation_that_its_configuration_does_not_say(tmp_path: Path) -> None:
    """SparseQwen2: qwen2 with hidden_act relu, and up rectified too."""
    folder = make_model("qwen2", tmp_path / "p", hidden_act="relu")
    assert not is_published(json.loads((folder / "config.json").read_text()))
    with pytest.raises(InputError, match="model_type must be one of bamboo, sparsellama, got 'qwen2'"):
        normalise(folder, tmp_path / "out")
    source = open_source(normalise(folder, tmp_path / "out", activation="drelu"))
    assert {swap.activation("") for swap in source.swaps.values()} == {"drelu"} and source.arch.model_type == "qwen2"
    assert source.arch.activation(source.config) == "relu"


def test_types() -> None:
    assert all(is_published({"model_type": name}) for name in (*PUBLISHED, *REFUSED))
    assert not is_published({"model_type": "llama", "hidden_act": "relu"}) and not is_published({})


def _cut(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(N + 1, D)
    save_file(weights, folder / "model.safetensors")


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


@pytest.mark.parametrize(
    ("raw", "spoil", "message"),
    [
        (
            BAMBOO | {"model_type": "turbosparsemixtral"},
            None,
            "networks of one activation, got turbosparsemixtral: its feed-forward networks are experts",
        ),
        (BAMBOO | {"hidden_act": "silu"}, None, "hidden_act of a bamboo model must be relu (dReLU), got 'silu'"),
        (
            BAMBOO | {"intermediate_size": 99},
            None,
            "model.layers.0.mlp.gate_proj.weight must have shape [99, 64] by config.json, got [176, 64]",
        ),
        (BAMBOO | {"sparsity": {}}, None, "got a checkpoint that is sparse already"),
        (
            BAMBOO | {"quantization_config": {"quant_method": "gptq"}},
            None,
            "must have float weights, got weights quantised by 'gptq'",
        ),
        (BAMBOO | {"num_attention_heads": "four"}, None, "num_attention_heads in config.json must be a whole number"),
        (BAMBOO, _cut, "model.layers.1.mlp.up_proj.weight must have shape [176, 64] by config.json, got [177, 64]"),
        (BAMBOO, _pickled, "Weights must be safetensors, got pytorch_model.bin, a pickle file"),
        (
            BAMBOO,
            lambda folder: (folder / "model.safetensors").unlink(),
            "Weights must be model.safetensors or shards with",
        ),
        (BAMBOO, lambda folder: (folder / "config.json").unlink(), "config.json must be a file, got nothing"),
        (
            PROSPARSE | {"hidden_act": "softplus"},
            None,
            "must be fatrelu, shiftrelu, relu or a stock activation, got 'softplus'",
        ),
        (
            PROSPARSE | {"hidden_act_param": None},
            None,
            "hidden_act_param must be a finite number for fatrelu, got None",
        ),
        (
            PROSPARSE | {"hidden_act_param": 1e39},
            None,
            "hidden_act_param must be a finite number for fatrelu, got 1e+39",
        ),
        (PROSPARSE | {"hidden_act_param": float("inf")}, None, "config.json must be JSON, got"),
        (PROSPARSE | {"hidden_act_param": -0.5}, None, "hidden_act_param must suit fatrelu, got -0.5"),
    ],
)
def test_bad_folders_are_refused(
    raw: dict[str, Any], spoil: Callable[[Path], Any] | None, message: str, tmp_path: Path
) -> None:
    folder = make_published(tmp_path / "p", {**raw})
    if spoil is not None:
        spoil(folder)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        normalise(folder, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_bad_activations_are_refused(tmp_path: Path) -> None:
    plain = make_model("phi", tmp_path / "phi")
    for folder, activation, message in (
        (plain, "drelu", "The activation of a plain network must be one of a single product, got drelu in phi"),
        (plain, "softsign", "activation must be one of"),
    ):
        with pytest.raises(InputError, match=message):
            normalise(folder, tmp_path / "out", activation=activation)
    shutil.rmtree(plain)


@pytest.mark.slow
@pytest.mark.parametrize(("raw", "method", "score"), [(BAMBOO, "imported", "predictor"), (PROSPARSE, "exact", "exact")])
def test_published_folders_convert(raw: dict[str, Any], method: str, score: str, tmp_path: Path) -> None:
    """From the published folder to a checkpoint whose executors (torch, the op's body, its kernel, genai) agree."""
    folder = make_published(tmp_path / "p", raw, predictors=method == "imported")
    (tmp_path / "text.txt").write_text(TEXT * 40)
    result = convert(folder, tmp_path / "out", method=method, calibration=tmp_path / "text.txt")
    assert {check.name.split()[0] for check in result.report.checks} == {
        "torch",
        "body",
        "kernel",
        "genai",
        "genai's",
    } and all(check.passed for check in result.report.checks)
    written = json.loads((result.folder / "config.json").read_text())
    assert written["model_type"] == ("sparsegate_mistral" if raw is BAMBOO else "sparsegate_llama")
    assert {fields["score"] for fields in written["sparsity"]["sites"].values()} == {score}
    assert all(0.2 < fields["density"] < 0.8 for fields in written["sparsity"]["sites"].values())

"""PowerInfer's model file: a model with its predictors as GGUF.

It is of architecture llama (relu(gate) * up) or bamboo (dReLU) with three differences: `blk.N.fc1.weight` [r, d] and
`.fc2.weight` [n, r] stand beside the weights, `ffn_down` [d, n] is `ffn_down_t` [n, d] so that a neuron is a contiguous
row, and the first eight bytes are PWRI and 3. Neuron i of a token runs unless logit_i < `powerinfer.sparse_threshold`
(0 without the key); the predictor reads the residual stream before the feed-forward norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...runtime_onnx.errors import InputError, explained
from ..checkpoint.model_check import Stored
from ..checkpoint.plan import Plan, on_swaps
from ..checkpoint.source import INDEX, Source, open_source
from ..checkpoint.stage import Header, atomic_folder, is_finished, known_hash, write_header, write_json, write_tensors
from ..checkpoint.tensor_files import FLOATS
from .gpu_split import SIDE_FILE, place, write_gpu_split
from .hub import check_disk
from .powerinfer_file import (
    MAGIC,
    Precision,
    Tensors,
    from_file,
    gguf_package,
    open_reader,
    to_file,
    write_file,
)
from .powerinfer_vocabulary import add_vocabulary, write_tokenizer
from .predictor_folder import folder_form
from .predictors import THRESHOLD as BESIDE_THRESHOLD
from .published import normal_config

SOURCE = (
    "PowerInfer, arXiv 2312.12456: its converter's tensor names, key and magic; its exporter's gpu_idx, gpu_bucket and "
    "VRAM key",
    "placement: groups of 256 neurons of a layer by falling count, the groups with the largest sums first (the paper "
    "solves an integer program)",
)
THRESHOLD = "powerinfer.sparse_threshold"
ARCHITECTURES = {"relu": "llama", "drelu": "bamboo"}
"""Activation of every layer -> architecture of the file."""
_MODEL_TYPES = ("llama", "mistral")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_WHOLE = {
    _EMBEDDING: "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    _HEAD: "output.weight",
}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down_t",
}
"""transformers' names below model.layers.N -> PowerInfer's below blk.N."""
_PREDICTOR = {"mlp.predictor.fc1": "fc1", "mlp.predictor.fc2": "fc2"}
_HEADS = 1 << 16  # more than any model has
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
}
_KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of the file that are kept -> torch's; of any other one the values are fp32."""
_NUMBER = 1 << 31  # config.json has closer bounds of its own


@dataclass(frozen=True)
class PowerInferModel:
    """An opened model file: `fields` are its metadata, `tensors` its weights and predictors by transformers' names, as
    the gguf package maps them. `read` brings them into memory.
    """

    path: Path
    architecture: str
    threshold: float
    fields: dict[str, Any]
    heads: int
    kv_heads: int
    layers: int
    tensors: dict[str, Any]

    def read(self, name: str) -> Tensor:
        """A tensor [rows, columns] in fp32 by transformers' name; a quantised one is dequantised. Raises InputError for
        a damaged one.
        """
        tensor = self.tensors[name]
        with explained(f"{tensor.name} of {self.path}", "Fetch the file again, or take one in another format."):
            values = gguf_package().dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        return from_file(tensor.name, torch.from_numpy(values), self.heads, self.kv_heads)

    def kind(self, name: str) -> str:
        """The dtype, by safetensors' name, that holds a tensor's values exactly."""
        kind = str(self.tensors[name].tensor_type.name)
        return kind if kind in _KINDS else "F32"

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape as `read` gives it."""
        extents = tuple(self.tensors[name].shape.tolist())  # columns first
        return extents if "ffn_down_t" in self.tensors[name].name else extents[::-1]


def is_powerinfer(model: str) -> bool:
    """Whether `model` names a file that begins as PowerInfer's do."""
    if not Path(model).is_file():
        return False
    with open(model, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def import_powerinfer(path: str | Path, out: Path) -> Path:
    """Write a model file as the model folder `out`, with the predictors beside the weights and their threshold in
    config.json; returns `out`. One that is there already and whole is left.

    Values stay what they are, in fp32 where they were quantised. The tokenizer is made by transformers from the file's
    vocabulary. Raises InputError for what `read_powerinfer` does, for rotary embeddings that are scaled or cover a part
    of a head, and for sizes and tensors that do not belong together.
    """
    model = read_powerinfer(path)
    config, tensors = powerinfer_headers(model)
    header = Header(format="powerinfer", parents={"file": known_hash(model.path)})
    if is_finished(out, header):
        return out
    check_disk(out, stored_bytes(tensors))
    with atomic_folder(out) as folder:
        _write_weights(model, list(tensors), folder)
        write_tokenizer(model.fields, config["vocab_size"], model.path, folder)
        write_json(folder / "config.json", config)
        open_source(folder)
        write_header(folder, header)
    return out


def powerinfer_headers(model: PowerInferModel) -> tuple[dict[str, Any], Stored]:
    """What config.json says of a model file, and shape and dtype of its tensors by transformers' names. Raises
    InputError for sizes that are none, and for a rotary embedding that is scaled or covers a part of a head.
    """
    names = [name for name in model.tensors if name != _HEAD or not _is_tied(model)]
    return _config(model, names), {name: (model.shape(name), model.kind(name)) for name in names}


def stored_bytes(tensors: Stored) -> int:
    """Bytes of tensors by shape and dtype."""
    return sum(math.prod(shape) * FLOATS[kind] for shape, kind in tensors.values())


def _is_tied(model: PowerInferModel) -> bool:
    head, embedding = (model.tensors[name] for name in (_HEAD, _EMBEDDING))
    return head.tensor_type == embedding.tensor_type and np.array_equal(head.data, embedding.data)


def _config(model: PowerInferModel, names: list[str]) -> dict[str, Any]:
    """What config.json says of a model file: a stock llama, or a mistral with dReLU in sparsegate's form."""
    architecture, fields, path = model.architecture, model.fields, model.path
    sizes = {name: _whole(fields, f"{architecture}.{key}", _NUMBER, path) for name, key in _SIZES.items()}
    width = sizes["hidden_size"] // model.heads
    if sizes["hidden_size"] != width * model.heads:
        raise InputError(
            f"{architecture}.attention.head_count must share out the {sizes['hidden_size']} channels, got "
            f"{model.heads} in {path}. Fetch the file again."
        )
    rotated = fields.get(f"{architecture}.rope.dimension_count", width)
    scaled = {key: value for key, value in fields.items() if key.startswith(f"{architecture}.rope.scal")}
    if rotated != width or any(value not in ("none", 1.0) for value in scaled.values()):
        said = f"{rotated} of {width} channels" if rotated != width else min(scaled)
        raise InputError(
            f"PowerInfer's rotary embedding must be the default one here, got {said:.100} in {path}. Take the model in "
            "another format."
        )
    kinds = {model.kind(name) for name in names if name.endswith("_proj.weight")}
    dtype = _KINDS[kinds.pop()] if len(kinds) == 1 else torch.float32
    config = {
        "model_type": architecture,
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "relu",
        **sizes,
        "vocab_size": model.shape(_EMBEDDING)[0],
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "rms_norm_eps": _finite(fields, f"{architecture}.attention.layer_norm_rms_epsilon", None, path),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": _finite(fields, f"{architecture}.rope.freq_base", 10000.0, path),
        },
        "tie_word_embeddings": _HEAD not in names,
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
    }
    if architecture == ARCHITECTURES["drelu"]:
        config = normal_config(config | {"sliding_window": None})  # PowerInfer attends to the whole context
    return config | {BESIDE_THRESHOLD: model.threshold}


def _write_weights(model: PowerInferModel, names: list[str], folder: Path) -> None:
    """Safetensors and their index: a file for what lies outside the blocks and one for each block, so that one block is
    in memory at a time.
    """
    parts: dict[str, list[str]] = {}
    for name in names:
        words = name.split(".")
        parts.setdefault(words[2] if words[:2] == ["model", "layers"] else "", []).append(name)
    where: dict[str, str] = {}
    for number, part in enumerate(parts.values(), 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {name: model.read(name).to(_KINDS[model.kind(name)]).contiguous() for name in part}
        write_tensors(folder / file, tensors, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def check_powerinfer(source: Source, plan: Plan) -> None:
    """Raise InputError for a model or plan that PowerInfer does not have, as `write_powerinfer` does."""
    gguf_package()
    _architecture(source, plan)
    folder_form(plan, "residual", source)


def write_powerinfer(
    source: Source,
    plan: Plan,
    path: str | Path,
    threshold: float | None = None,
    precision: Precision = "fp16",
    counts: Mapping[int, Tensor] | None = None,
    vram_bytes: int | None = None,
) -> Path:
    """Write `source` with the predictors of `plan` for PowerInfer; returns the path.

    `threshold` None is the plan's own, with which PowerInfer decides as the plan does; another one decides otherwise
    for every token. Matrices have `precision`, vectors fp32. With `counts`, how often each neuron fired, int [n] by
    layer, and `vram_bytes` the side file is written as well. Raises InputError for a model or plan that PowerInfer does
    not have, for a path that exists, and without the package gguf.
    """
    gguf, path = gguf_package(), Path(path)
    architecture = _architecture(source, plan)
    layers, plan_threshold = folder_form(plan, "residual", source)
    threshold = plan_threshold if threshold is None else threshold
    if not math.isfinite(threshold):
        raise InputError(f"threshold must be a finite float, got {threshold}. Leave it out to take the plan's.")
    if (counts is None) != (vram_bytes is None):
        raise InputError("counts and vram_bytes must be given together, got one of them. Give both, or neither.")
    side = Path(f"{path}{SIDE_FILE}")
    for taken in (path, side) if counts is not None else (path,):
        if taken.exists():
            raise InputError(f"path must be a new file, got {taken}, which exists. Choose another, or remove it.")
    writer = gguf.GGUFWriter(None, architecture)
    _add_fields(gguf, writer, source, precision)
    writer.add_float32(THRESHOLD, threshold)
    add_vocabulary(gguf, writer, source)
    try:
        if counts is not None and vram_bytes is not None:
            neuron = 3 * source.arch.size(source.config, "hidden") * {"fp32": 4, "fp16": 2}[precision]
            write_gpu_split(path, place(counts, vram_bytes // neuron), vram_bytes)
        write_file(gguf, writer, path, _tensors(source, layers), precision)
    except BaseException:
        if counts is not None:  # the side file of a model that is not there
            side.unlink(missing_ok=True)
        raise
    return path


def _tensors(source: Source, layers: Mapping[int, Mapping[str, Tensor]]) -> Tensors:
    """Every tensor of the file: the weights of `source`, the head where it is tied, and the predictors of `layers`."""
    heads, kv_heads = _heads(source)

    def weight(name: str, theirs: str) -> Tensor:
        return to_file(theirs, source.read([name])[name], heads, kv_heads)

    for name, theirs in _names(source).items():
        shape = source.tensors[name].shape
        yield theirs, shape[::-1] if "ffn_down_t" in theirs else shape, partial(weight, name, theirs)
    if _HEAD not in source.tensors:
        embedding, theirs = source.arch.embedding, _WHOLE[_HEAD]
        yield theirs, source.tensors[embedding].shape, partial(weight, embedding, theirs)
    for layer, roles in layers.items():
        for role, tensor in roles.items():
            yield f"blk.{layer}.{role}", tuple(tensor.shape), lambda tensor=tensor: tensor


def read_powerinfer(path: str | Path) -> PowerInferModel:
    """Open a model file. Raises InputError for a file of another kind, a damaged one, and tensors that are unknown or
    absent.
    """
    gguf, path = gguf_package(), Path(path)
    reader = open_reader(gguf, path)
    fields = _contents(reader, path)
    architecture = str(fields.get("general.architecture"))
    if architecture not in ARCHITECTURES.values():
        raise InputError(
            f"A PowerInfer model must be of architecture {' or '.join(ARCHITECTURES.values())}, got {architecture} in "
            f"{path}. Take another file."
        )
    heads, kv_heads = _attention_heads(fields, architecture, path)
    layers = _whole(fields, f"{architecture}.block_count", len(reader.tensors), path)
    threshold = _finite(fields, THRESHOLD, 0.0, path)
    names = {theirs: name for name, theirs in _WHOLE.items()}
    names |= {
        f"blk.{layer}.{theirs}.weight": f"model.layers.{layer}.{name}.weight"
        for layer in range(layers)
        for name, theirs in (_BLOCK | _PREDICTOR).items()
    }
    held = {tensor.name: tensor for tensor in reader.tensors}
    unknown, absent = [name for name in held if name not in names], [name for name in names if name not in held]
    if unknown:
        raise InputError(
            f"A PowerInfer model must hold known tensors only, got {unknown[0]:.100} in {path}. Take a file of "
            "PowerInfer's own converter."
        )
    if absent:
        raise InputError(
            f"A PowerInfer model must hold every weight and predictor, got none of {absent[0]} in {path}. Fetch the "
            "file again."
        )
    tensors = {name: held[theirs] for theirs, name in names.items()}
    return PowerInferModel(path, architecture, threshold, fields, heads, kv_heads, layers, tensors)


def _contents(reader: Any, path: Path) -> dict[str, Any]:
    with explained(f"The metadata of {path}", "Fetch the file again."):  # texts that are no UTF-8
        return {name: field.contents() for name, field in reader.fields.items()}


def _attention_heads(fields: Mapping[str, Any], architecture: str, path: Path) -> tuple[int, int]:
    """Heads and key-value heads."""
    heads, kv_heads = (
        _whole(fields, f"{architecture}.attention.{key}", _HEADS, path) for key in ("head_count", "head_count_kv")
    )
    if heads % kv_heads:
        raise InputError(
            f"{architecture}.attention.head_count_kv must divide the {heads} heads, got {kv_heads} in {path}. Fetch "
            "the file again."
        )
    return heads, kv_heads


def _whole(fields: Mapping[str, Any], key: str, most: int, path: Path) -> int:
    """A count in the metadata. Raises InputError for what is no whole number from 1 to `most`."""
    value = fields.get(key)
    if type(value) is not int or not 1 <= value <= most:
        raise InputError(
            f"{key} must be a whole number from 1 to {most}, got {ascii(value):.100} in {path}. Fetch the file again."
        )
    return value


def _finite(fields: Mapping[str, Any], key: str, default: float | None, path: Path) -> float:
    """A number in the metadata, `default` where it stands there not."""
    value = fields.get(key, default)
    if type(value) is not float or not math.isfinite(value):
        raise InputError(f"{key} must be a finite float, got {ascii(value):.100} in {path}. Fetch the file again.")
    return value


def _architecture(source: Source, plan: Plan) -> str:
    """The file's architecture. Raises InputError for a model that PowerInfer's llama and bamboo do not compute."""
    arch, config = source.arch, source.config
    if arch.model_type not in _MODEL_TYPES:
        raise InputError(
            f"PowerInfer's model must be of type {' or '.join(_MODEL_TYPES)}, got {arch.model_type}. Use ONNX Runtime "
            "for this one."
        )
    base = arch.activation(config)
    whole = on_swaps(plan, source.swaps, base)
    used = {whole[site].activation(base) if site in whole else base for site in arch.sites(config)}
    if len(used) != 1 or not used <= set(ARCHITECTURES):
        spelled = ", ".join(sorted(map(str, used)))
        raise InputError(
            f"PowerInfer's activation must be {' or '.join(ARCHITECTURES)} in every layer, got {spelled}. Use ONNX "
            "Runtime for this model."
        )
    heads, _ = _heads(source)
    rope = getattr(config, "rope_parameters", None) or {}
    if arch.head_dim(config) * heads != arch.size(config, "hidden"):
        raise InputError(
            f"PowerInfer's heads must share out the hidden size, got {heads} of {arch.head_dim(config)}. Use ONNX "
            "Runtime for this model."
        )
    if rope.get("rope_type", "default") != "default":
        raise InputError(
            f"PowerInfer's rotary embedding must be the default one here, got {rope['rope_type']}. Use ONNX Runtime "
            "for this model."
        )
    return ARCHITECTURES[str(used.pop())]


def _heads(source: Source) -> tuple[int, int]:
    heads, kv_heads = (source.arch.size(source.config, space) for space in ("heads", "kv_heads"))
    return heads, kv_heads


def _names(source: Source) -> dict[str, str]:
    """The model's tensor names -> PowerInfer's, in the model's order. Raises InputError for a weight that the format
    has no place for.
    """
    theirs: dict[str, str] = {}
    for name in source.tensors:
        if name in _WHOLE:
            theirs[name] = _WHOLE[name]
            continue
        if ".mlp.predictor." in name or name.endswith(".rotary_emb.inv_freq"):
            continue
        words = name.split(".")
        inner, kind = ".".join(words[3:-1]), words[-1]
        if words[:2] != ["model", "layers"] or inner not in _BLOCK or kind != "weight":
            raise InputError(
                f"PowerInfer's model must hold known weights only, got {name}. Use ONNX Runtime for this model."
            )
        theirs[name] = f"blk.{words[2]}.{_BLOCK[inner]}.weight"
    return theirs


def _add_fields(gguf: Any, writer: Any, source: Source, precision: Precision) -> None:
    arch, config = source.arch, source.config
    heads, kv_heads = _heads(source)
    writer.add_name(source.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(arch.size(config, "hidden"))
    writer.add_block_count(arch.size(config, "layers"))
    writer.add_feed_forward_length(arch.size(config, "units"))
    writer.add_rope_dimension_count(arch.head_dim(config))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if precision == "fp32" else gguf.LlamaFileType.MOSTLY_F16)

"""PowerInfer's files: a model with its predictors as GGUF, and the side file that says which neurons live on the GPU.

The model file is a GGUF of architecture llama (relu(gate) * up) or bamboo (dReLU) with three differences:
`blk.N.fc1.weight` [r, d] and `.fc2.weight` [n, r] stand beside the weights, `ffn_down` [d, n] is `ffn_down_t` [n, d] so
that a neuron is a contiguous row, and the first eight bytes are PWRI and 3. Neuron i of a token runs unless logit_i <
`powerinfer.sparse_threshold` (0 without the key); the predictor reads the residual stream before the feed-forward norm.
The side file `<model>.generated.gpuidx` has `blk.N.gpu_idx` int32 [n], 0 or 1, `blk.N.gpu_bucket` int32 [k], where it
is 1, and `split.vram_capacity` in bytes.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...runtime_onnx.errors import InputError, explained
from ..checkpoint.plan import Plan, activation_at, on_swaps
from ..checkpoint.source import Source
from ..checkpoint.stage import disk_full, is_disk_full
from ..checkpoint.tensor_files import first_line
from .predictors import Published, folder_form, predictor_plan

SOURCE = (
    "PowerInfer, arXiv 2312.12456: its converter's tensor names, key and magic; its exporter's gpu_idx, gpu_bucket and "
    "VRAM key",
    "placement: groups of 256 neurons of a layer by falling count, the groups with the largest sums first (the paper "
    "solves an integer program)",
)
MAGIC, VERSION = b"PWRI", 3
THRESHOLD, CAPACITY = "powerinfer.sparse_threshold", "split.vram_capacity"
SIDE_FILE = ".generated.gpuidx"
GROUP = 256  # neurons that are placed together
ARCHITECTURES = {"relu": "llama", "drelu": "bamboo"}
"""Activation of every layer -> architecture of the file."""
_MODEL_TYPES = ("llama", "mistral")
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
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
_HEADS = 1 << 16  # more than any model has
_BYTE = re.compile("<0x[0-9A-F]{2}>")
Precision = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class PowerInferModel:
    """A model file as it was read: `fields` are its metadata, `weights` [rows, columns] fp32 by transformers' names,
    `predictors` by layer.
    """

    path: Path
    architecture: str
    threshold: float
    fields: dict[str, Any]
    weights: dict[str, Tensor]
    predictors: dict[int, Published]


@dataclass(frozen=True)
class GpuSplit:
    """Which neurons live on the GPU: int32 [n] of 0 and 1 by layer, and the bytes they take there."""

    layers: dict[int, Tensor]
    vram_bytes: int


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
    gguf, path = _package(), Path(path)
    architecture = _architecture(source, plan)
    layers, own = folder_form(plan, "residual", source)
    threshold = own if threshold is None else threshold
    if not math.isfinite(threshold):
        raise InputError(f"threshold must be a finite float, got {threshold}. Leave it out to take the plan's.")
    if path.exists():
        raise InputError(f"path must be a new file, got {path}, which exists. Choose another, or remove it.")
    if (counts is None) != (vram_bytes is None):
        raise InputError("counts and vram_bytes must be given together, got one of them. Give both, or neither.")
    heads, kv_heads = _heads(source)
    writer = gguf.GGUFWriter(None, architecture)
    _add_fields(gguf, writer, source, heads, kv_heads, precision)
    writer.add_float32(THRESHOLD, threshold)
    _add_vocabulary(gguf, writer, source)

    def tensors() -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
        for name, ours in _names(source).items():
            shape = source.tensors[name].shape
            yield (
                ours,
                shape[::-1] if "ffn_down_t" in ours else shape,
                lambda name=name, ours=ours: _to_file(ours, source.read([name])[name], heads, kv_heads),
            )
        if "lm_head.weight" not in source.tensors:
            yield (
                _WHOLE["lm_head.weight"],
                source.tensors[source.arch.embedding].shape,
                lambda: source.read([source.arch.embedding])[source.arch.embedding],
            )
        for layer, roles in layers.items():
            for role, tensor in roles.items():
                yield f"blk.{layer}.{role}", tuple(tensor.shape), lambda tensor=tensor: tensor

    _write(gguf, writer, path, tensors(), precision)
    if counts is not None and vram_bytes is not None:
        neuron = 3 * source.arch.size(source.config, "hidden") * {"fp32": 4, "fp16": 2}[precision]
        write_gpu_split(path, place(counts, vram_bytes // neuron), vram_bytes)
    return path


def read_powerinfer(path: str | Path) -> PowerInferModel:
    """Read a model file; quantised matrices come back as fp32. Raises InputError for a file of another kind, a damaged
    one, and tensors that are unknown.
    """
    gguf, path = _package(), Path(path)
    reader = _reader(gguf, path)
    fields = _contents(reader, path)
    architecture = str(fields.get("general.architecture"))
    if architecture not in ARCHITECTURES.values():
        raise InputError(
            f"A PowerInfer model must be of architecture {' or '.join(ARCHITECTURES.values())}, got {architecture} in "
            f"{path}. Take another file."
        )
    (heads, kv_heads, count), threshold = (
        _sizes(fields, architecture, len(reader.tensors), path),
        _threshold(fields, path),
    )
    back = {ours: name for name, ours in _WHOLE.items()}
    back |= {
        f"blk.{k}.{ours}.weight": f"model.layers.{k}.{name}.weight"
        for k in range(count)
        for name, ours in _BLOCK.items()
    }
    weights: dict[str, Tensor] = {}
    roles: dict[int, dict[str, Tensor]] = {}
    for tensor in reader.tensors:
        with explained(f"{tensor.name} of {path}", "Fetch the file again, or take one in another format."):
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        if tensor.name in back:
            weights[back[tensor.name]] = _from_file(tensor.name, values, heads, kv_heads)
            continue
        words = tensor.name.split(".")
        if words[0] != "blk" or words[2:] not in (["fc1", "weight"], ["fc2", "weight"]) or not words[1].isdigit():
            raise InputError(
                f"A PowerInfer model must hold known tensors only, got {tensor.name} in {path}. Take a file of "
                "PowerInfer's own converter."
            )
        roles.setdefault(int(words[1]), {})[words[2]] = values
    absent = sorted(set(back.values()) - set(weights))
    incomplete = [layer for layer in range(count) if set(roles.get(layer, ())) != {"fc1", "fc2"}]
    if absent or incomplete or len(roles) != count:
        what = (
            absent[0]
            if absent
            else f"blk.{incomplete[0]}.fc1 or fc2"
            if incomplete
            else f"no {count} layers but predictors of {len(roles)}"
        )
        raise InputError(
            f"A PowerInfer model must hold every weight and predictor, got none of {what} in {path}. Fetch the file "
            "again."
        )
    predictors = {
        layer: Published(f"blk.{layer}", found["fc1"], found["fc2"]) for layer, found in sorted(roles.items())
    }
    return PowerInferModel(path, architecture, threshold, fields, weights, predictors)


def _contents(reader: Any, path: Path) -> dict[str, Any]:
    with explained(f"The metadata of {path}", "Fetch the file again."):  # texts that are no UTF-8
        return {name: field.contents() for name, field in reader.fields.items()}


def _sizes(fields: Mapping[str, Any], architecture: str, tensors: int, path: Path) -> tuple[int, int, int]:
    """Heads, key-value heads and blocks. Raises InputError for what is no whole number and for more blocks than the
    file's tensors can back.
    """
    found: dict[str, Any] = {
        key: fields.get(f"{architecture}.{key}")
        for key in ("attention.head_count", "attention.head_count_kv", "block_count")
    }
    for key, value in found.items():
        most = tensors if key == "block_count" else _HEADS
        if type(value) is not int or not 1 <= value <= most:
            raise InputError(
                f"{architecture}.{key} must be a whole number from 1 to {most}, got {ascii(value):.100} in {path}. "
                "Fetch the file again."
            )
    heads, kv_heads, count = found.values()
    if heads % kv_heads:
        raise InputError(
            f"{architecture}.attention.head_count_kv must divide the {heads} heads, got {kv_heads} in {path}. Fetch "
            "the file again."
        )
    return heads, kv_heads, count


def _threshold(fields: Mapping[str, Any], path: Path) -> float:
    value = fields.get(THRESHOLD, 0.0)
    if type(value) is not float or not math.isfinite(value):
        raise InputError(
            f"{THRESHOLD} must be a finite float, got {ascii(value):.100} in {path}. Fetch the file again."
        )
    return value


def powerinfer_plan(model: PowerInferModel, source: Source) -> Plan:
    """The plan that the predictors of a PowerInfer file mean for `source`, the same model. Raises InputError as
    `predictors.predictor_plan` does.
    """
    return predictor_plan(source, model.predictors, "mlp2", "residual", model.threshold, keep_equal=True)


def place(counts: Mapping[int, Tensor], neurons: int) -> dict[int, Tensor]:
    """The neurons that a GPU with room for `neurons` of them holds: int32 [n] of 0 and 1 by layer.

    Each layer's neurons fall into groups of 256 by falling `counts` [n]; the groups with the largest sums are taken
    while they fit, the lower layer first where sums are equal.
    """
    order = {layer: values.sort(descending=True, stable=True).indices for layer, values in counts.items()}
    groups = [(float(counts[k][group].sum()), k, group) for k in sorted(order) for group in order[k].split(GROUP)]
    split = {layer: torch.zeros(len(values), dtype=torch.int32) for layer, values in sorted(counts.items())}
    for _, layer, group in sorted(groups, key=lambda item: (-item[0], item[1])):
        if len(group) <= neurons:
            split[layer][group] = 1
            neurons -= len(group)
    return split


def write_gpu_split(path: str | Path, split: Mapping[int, Tensor], vram_bytes: int) -> Path:
    """Write the side file of the model file `path` for `split`, int32 [n] of 0 and 1 by layer; returns the side file's
    path.

    Raises InputError for layers that are not 0, 1, 2 and so on, and for other values.
    """
    gguf, side = _package(), Path(f"{path}{SIDE_FILE}")
    _check_split(side, dict(split))
    writer = gguf.GGUFWriter(None, "generic.gpu_index")
    writer.add_block_count(len(split))
    writer.add_uint64(CAPACITY, vram_bytes)

    def tensors() -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
        for layer, index in sorted(split.items()):
            for name, values in (("gpu_idx", index), ("gpu_bucket", index.nonzero()[:, 0])):
                yield f"blk.{layer}.{name}", tuple(values.shape), lambda values=values: values.int()

    _write(gguf, writer, side, tensors(), "int32")
    return side


def read_gpu_split(path: str | Path) -> GpuSplit:
    """Read the side file of the model file `path`. Raises InputError for a damaged file and for a bucket that is not
    where its index is 1.
    """
    gguf, side = _package(), Path(f"{path}{SIDE_FILE}")
    reader = _reader(gguf, side)
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    capacity = reader.fields.get(CAPACITY)
    layers = range(len(found) // 2)
    names = {f"blk.{layer}.{name}" for layer in layers for name in ("gpu_idx", "gpu_bucket")}
    if capacity is None or set(found) != names or any(tensor.dtype != torch.int32 for tensor in found.values()):
        raise InputError(
            f"{side.name} must hold {CAPACITY} and int32 gpu_idx and gpu_bucket of every layer, got others in {side}. "
            "Make it again."
        )
    split = {layer: found[f"blk.{layer}.gpu_idx"] for layer in layers}
    _check_split(side, split)
    for layer, index in split.items():
        if not torch.equal(found[f"blk.{layer}.gpu_bucket"].long(), index.nonzero()[:, 0]):
            raise InputError(
                f"blk.{layer}.gpu_bucket must list where blk.{layer}.gpu_idx is 1, in order, got others in {side}. "
                "Make it again."
            )
    return GpuSplit(split, _capacity(capacity, side))


def _capacity(field: Any, side: Path) -> int:
    value = field.contents()
    if type(value) is not int:
        raise InputError(
            f"{CAPACITY} must be a whole number of bytes, got {ascii(value):.100} in {side}. Make it again."
        )
    return value


def _check_split(side: Path, split: dict[int, Tensor]) -> None:
    if sorted(split) != list(range(len(split))) or not split:
        raise InputError(
            f"{side.name} must hold layers 0, 1, 2 and so on, got {', '.join(map(str, sorted(split))) or 'none'}. Give "
            "every layer."
        )
    for layer, index in split.items():
        if index.dim() != 1 or not bool(((index == 0) | (index == 1)).all()):
            raise InputError(
                f"blk.{layer}.gpu_idx must be a vector of 0 and 1, got other values for {side}. Make it again."
            )


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError(
            "PowerInfer's files must be written and read with the package gguf, got none. Install sparsegate[bench]."
        ) from None
    return gguf


def _architecture(source: Source, plan: Plan) -> str:
    """The file's architecture. Raises InputError for a model that PowerInfer's llama and bamboo do not compute."""
    arch, config = source.arch, source.config
    if arch.model_type not in _MODEL_TYPES:
        raise InputError(
            f"PowerInfer's model must be of type {' or '.join(_MODEL_TYPES)}, got {arch.model_type}. Use ONNX Runtime "
            "for this one."
        )
    whole = on_swaps(plan, source.swaps)
    base = arch.activation(config)
    used = {activation_at(whole[site], base) if site in whole else base for site in arch.sites(config)}
    if len(used) != 1 or not used <= set(ARCHITECTURES):
        found = ", ".join(sorted(map(str, used)))
        raise InputError(
            f"PowerInfer's activation must be {' or '.join(ARCHITECTURES)} in every layer, got {found}. Use ONNX "
            "Runtime for this model."
        )
    heads, _ = _heads(source)
    rope = getattr(config, "rope_parameters", None) or {}
    if arch.attn.head_dim(config) * heads != arch.size(config, "hidden"):
        raise InputError(
            f"PowerInfer's heads must share out the hidden size, got {heads} of {arch.attn.head_dim(config)}. Use ONNX "
            "Runtime for this model."
        )
    if rope.get("rope_type", "default") != "default":
        raise InputError(
            f"PowerInfer's rotary embedding must be the default one here, got {rope['rope_type']}. Use ONNX Runtime "
            "for this model."
        )
    return ARCHITECTURES[str(used.pop())]


def _heads(source: Source) -> tuple[int, int]:
    heads, kv_heads = (
        int(getattr(source.config, space.config)) for space in (source.arch.attn.heads, source.arch.attn.kv_heads)
    )
    return heads, kv_heads


def _names(source: Source) -> dict[str, str]:
    """The model's tensor names -> PowerInfer's, in the model's order. Raises InputError for a weight that the format
    has no place for.
    """
    found: dict[str, str] = {}
    for name in source.tensors:
        if name in _WHOLE:
            found[name] = _WHOLE[name]
            continue
        if ".mlp.predictor." in name or name.endswith(".rotary_emb.inv_freq"):
            continue
        words = name.split(".")
        inner, kind = ".".join(words[3:-1]), words[-1]
        if words[:2] != ["model", "layers"] or inner not in _BLOCK or kind != "weight":
            raise InputError(
                f"PowerInfer's model must hold known weights only, got {name}. Use ONNX Runtime for this model."
            )
        found[name] = f"blk.{words[2]}.{_BLOCK[inner]}.weight"
    return found


def _add_fields(gguf: Any, writer: Any, source: Source, heads: int, kv_heads: int, precision: Precision) -> None:
    arch, config = source.arch, source.config
    writer.add_name(source.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(arch.size(config, "hidden"))
    writer.add_block_count(arch.size(config, "layers"))
    writer.add_feed_forward_length(arch.size(config, "units"))
    writer.add_rope_dimension_count(arch.attn.head_dim(config))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if precision == "fp32" else gguf.LlamaFileType.MOSTLY_F16)


def _add_vocabulary(gguf: Any, writer: Any, source: Source) -> None:
    """The tokenizer as llama.cpp holds it: gpt2 (byte-level BPE) with merges, or llama (BPE with byte fallback), whose
    scores rank tokens by their merge.

    Raises InputError for any other tokenizer.
    """
    tokenizer = source.tokenizer()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"] if tokenizer.is_fast else {}
    if model.get("type") != "BPE":
        raise InputError(
            f"PowerInfer's tokenizer must be a BPE one, got {model.get('type') or 'one without tokenizer.json'}. Use "
            "ONNX Runtime for this model."
        )
    bytewise = not model.get("byte_fallback")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    rank = {merge.replace(" ", ""): -float(k) for k, merge in reversed(list(enumerate(merges)))}
    types = gguf.TokenType
    tokens, scores, kinds = [], [], []
    text = {token: name for name, token in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    for token in range(source.arch.size(source.config, "vocab")):
        name = text.get(token)
        kind = (
            types.UNUSED
            if name is None
            else types.UNKNOWN
            if name == model.get("unk_token")
            else types.CONTROL
            if token in special
            else types.NORMAL
        )
        if kind == types.NORMAL and not bytewise and _BYTE.fullmatch(str(name)):
            kind = types.BYTE
        tokens.append(f"[PAD{token}]" if name is None else name)
        scores.append(rank.get(str(name), 0.0))
        kinds.append(kind)
    writer.add_tokenizer_model("gpt2" if bytewise else "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if bytewise:
        writer.add_token_merges(merges)
    else:
        writer.add_token_scores(scores)
    for token, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
    ):
        if token is not None:
            add(token)


def _to_file(name: str, values: Tensor, heads: int, kv_heads: int) -> Tensor:
    """A weight as the file holds it: down transposed; the rows of q and k from halves [x, y] of a head to pairs, as its
    rotary embedding takes them.
    """
    if "ffn_down_t" in name:
        return values.T.contiguous()
    count = {"attn_q": heads, "attn_k": kv_heads}.get(name.split(".")[-2])
    return values if count is None else values.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _from_file(name: str, values: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The inverse of `_to_file`."""
    if "ffn_down_t" in name:
        return values.T.contiguous()
    count = {"attn_q": heads, "attn_k": kv_heads}.get(name.split(".")[-2])
    if count is not None and (values.ndim < 1 or not len(values) or len(values) % (2 * count)):
        raise InputError(
            f"{name} must have rows for {count} heads of an even width, got {list(values.shape)}. Fetch the file again."
        )
    return values if count is None else values.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _write(
    gguf: Any,
    writer: Any,
    path: Path,
    tensors: Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]],
    precision: Precision | Literal["int32"],
) -> None:
    """Fill `writer` and store the file under PowerInfer's magic, one tensor in memory at a time."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    kinds = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "int32": np.dtype(np.int32)}
    loads: list[tuple[np.dtype[Any], Callable[[], Tensor]]] = []
    for name, shape, load in tensors:
        dtype = kinds["fp32" if precision != "int32" and len(shape) == 1 else precision]
        writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize)
        loads.append((dtype, load))
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for dtype, load in loads:
            writer.write_tensor_data(_array(load(), dtype))
        writer.close()
        with open(partial, "r+b") as file:
            file.write(MAGIC + struct.pack("<I", VERSION))
        os.replace(partial, path)
    except OSError as error:
        raise disk_full(path) from error if is_disk_full(error) else error
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _array(values: Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        array = values.numpy().astype(dtype)
    if not np.isfinite(array).all():
        raise InputError(
            f"Weights must be finite in {dtype.name}, got a larger one. Write the file with precision fp32."
        )
    return array


def _reader(gguf: Any, path: Path) -> Any:
    """The gguf package's reader of a PowerInfer file. Raises InputError for a file of another kind and for a damaged
    one.
    """
    if not path.is_file():
        raise InputError(f"{path.name} must be a file, got nothing at {path}. Check the path.")
    with open(path, "rb") as file:
        start = file.read(8)
    if start != MAGIC + struct.pack("<I", VERSION):
        what = "llama.cpp's own GGUF" if start[:4] == b"GGUF" else f"{start!r}"
        raise InputError(
            f"{path.name} must start with {MAGIC.decode()} and version {VERSION}, got {what}. Take a file of "
            "PowerInfer."
        )

    class Reader(gguf.GGUFReader):
        """Reads the same layout under the other magic; the memory map is private, so the file stays as it is."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if offset == 0:
                self.data[:4] = np.frombuffer(b"GGUF", np.uint8)
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends too early")  # the package reads on, an array's count times
            return super()._get(offset, dtype, count, override_order)

    try:
        return Reader(path, "c")
    except Exception as error:  # the package indexes without checks
        raise InputError(
            f"{path.name} must be a complete PowerInfer file, got a damaged one ({first_line(error)}). Fetch it again."
        ) from None

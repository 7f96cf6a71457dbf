"""Writes a GGUF file of a model's sizes with random weights, for llama.cpp: equal work, not equal numbers.

Every matrix has the one format that is asked for, the output layer and the embedding included. (llama.cpp's own Q4_0
files keep those in 6 bits, which is more to read: the plain form is the faster one.) Norm weights are ones and stay
fp32, as everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....runtime_onnx.errors import InputError
from .shapes import CONTEXT, Shape

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3"}
"""model_type of transformers -> architecture of llama.cpp."""


@dataclass(frozen=True)
class Format:
    """A format of matrices: values and bytes of a block, and its name in the gguf package's table of types and of file
    types.
    """

    name: str
    values: int
    bytes: int
    file_type: str


FORMATS = {
    "fp32": Format("F32", 1, 4, "ALL_F32"),
    "fp16": Format("F16", 1, 2, "MOSTLY_F16"),
    "bf16": Format("BF16", 1, 2, "MOSTLY_BF16"),
    "int8": Format("Q8_0", 32, 34, "MOSTLY_Q8_0"),
    "int4": Format("Q4_0", 32, 18, "MOSTLY_Q4_0"),
}
"""Our precision -> llama.cpp's format of the same size."""


def tensors(shape: Shape, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, rows first, of a model's tensors in llama.cpp's spelling; a shape of one number is a norm's
    weight or a bias.
    """
    d, n, q, kv = shape.hidden, shape.neurons, shape.heads * shape.head, shape.kv_heads * shape.head
    yield "token_embd.weight", (shape.vocabulary, d)
    for layer in range(layers):
        block = f"blk.{layer}."
        yield f"{block}attn_norm.weight", (d,)
        if shape.model_type == "phi3":
            yield f"{block}attn_qkv.weight", (q + 2 * kv, d)
        else:
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                yield f"{block}attn_{name}.weight", (rows, d)
                if shape.model_type == "qwen2":
                    yield f"{block}attn_{name}.bias", (rows,)
        if shape.model_type == "qwen3":
            yield f"{block}attn_q_norm.weight", (shape.head,)
            yield f"{block}attn_k_norm.weight", (shape.head,)
        yield f"{block}attn_output.weight", (d, q)
        yield f"{block}ffn_norm.weight", (d,)
        if shape.model_type == "phi3":
            yield f"{block}ffn_up.weight", (2 * n, d)
        else:
            yield f"{block}ffn_gate.weight", (n, d)
            yield f"{block}ffn_up.weight", (n, d)
        yield f"{block}ffn_down.weight", (d, n)
    yield "output_norm.weight", (d,)
    if not shape.tied:
        yield "output.weight", (shape.vocabulary, d)


def write_gguf(shape: Shape, path: Path, precision: str, layers: int | None = None) -> Path:
    """Writes the file; `layers` overrides the number of layers. Raises InputError for a shape or precision that
    llama.cpp does not have.
    """
    import gguf

    if shape.model_type not in ARCHITECTURES:
        raise InputError(
            f"A shape for llama.cpp must be of type {', '.join(ARCHITECTURES)}, got {shape.model_type}. Bench without "
            "this peer."
        )
    if shape.hidden % 32 or shape.neurons % 32:
        raise InputError(
            f"Sizes must be multiples of 32 for llama.cpp's formats, got {shape.hidden} and {shape.neurons}. Bench "
            "without this peer."
        )
    form, count = FORMATS[precision], layers or shape.layers
    writer = gguf.GGUFWriter(path, ARCHITECTURES[shape.model_type])
    writer.add_name(shape.name)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(count)
    writer.add_feed_forward_length(shape.neurons)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(gguf.LlamaFileType[form.file_type])
    writer.add_tokenizer_model("none")
    rng = np.random.default_rng(0)
    for name, size in tensors(shape, count):
        if len(size) == 1:
            writer.add_tensor(name, np.full(size, 0.0 if name.endswith("bias") else 1.0, np.float32))
        else:
            writer.add_tensor(name, _random(rng, form, *size), raw_dtype=gguf.GGMLQuantizationType[form.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _random(rng: np.random.Generator, form: Format, rows: int, columns: int) -> NDArray[Any]:
    """Random weights of variance about 1 / columns, as bytes [rows, bytes of a row] where blocks are quantised."""
    if form.values == 1:
        values = rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5)
        if form.name == "BF16":
            import ml_dtypes

            return values.astype(ml_dtypes.bfloat16).view(np.uint8)
        return values.astype(np.float16) if form.name == "F16" else values
    blocks = (
        np.frombuffer(rng.bytes(rows * columns // form.values * form.bytes), np.uint8)
        .reshape(rows, -1, form.bytes)
        .copy()
    )
    spread = 4.6 if form.name == "Q4_0" else 73.9  # standard deviation of uniform 4- and 8-bit integers
    scale = np.array([1 / spread / columns**0.5], np.float16).view(np.uint8)
    blocks[..., :2] = scale
    return blocks.reshape(rows, -1)

"""Sizes of well-known models, so that their speed can be measured without their weights. A new model is a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....runtime_onnx.errors import InputError


@dataclass(frozen=True)
class Shape:
    """What a transformers configuration of `model_type` needs; `head` is the size of an attention head, `tied` whether
    the output layer is the embedding.
    """

    name: str
    model_type: str
    hidden: int
    neurons: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool

    def config(self, layers: int | None = None) -> dict[str, Any]:
        """The fields of the configuration; `layers` overrides the number of layers."""
        fields = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.neurons,
            "num_hidden_layers": layers or self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        }
        if self.model_type == "phi3":
            fields["original_max_position_embeddings"] = CONTEXT
        return fields if self.head * self.heads == self.hidden else {**fields, "head_dim": self.head}


CONTEXT = 4096
"""Positions of every random-weight model: the cache grows with what is used, so a longer context would change nothing.
"""

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-1b", "llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
        Shape("llama-3b", "llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
        Shape("llama-8b", "llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
        Shape("mistral-7b", "mistral", 4096, 14336, 32, 32, 8, 128, 32768, False),
        Shape("qwen2.5-0.5b", "qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
        Shape("qwen2.5-1.5b", "qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True),
        Shape("qwen2.5-7b", "qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False),
        Shape("qwen3-0.6b", "qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
        Shape("smollm2-135m", "llama", 576, 1536, 30, 9, 3, 64, 49152, True),
        Shape("smollm2-360m", "llama", 960, 2560, 32, 15, 5, 64, 49152, True),
        Shape("smollm2-1.7b", "llama", 2048, 8192, 24, 32, 32, 64, 49152, True),
        Shape("phi-3.5-mini", "phi3", 3072, 8192, 32, 32, 32, 96, 32064, False),
    )
}


def find_shape(name: str) -> Shape:
    """The row of a name. Raises InputError when there is none."""
    if name not in SHAPES:
        raise InputError(
            f"--shape must be one of {', '.join(SHAPES)}, got {name!r}. Choose one of them, or bench two ONNX folders."
        )
    return SHAPES[name]

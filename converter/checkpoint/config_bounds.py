"""Bounds on what a config.json counts, judged before anything is built by it: a number alone must not cost minutes or
gigabytes.

`check_counts` needs the file alone, `check_backed` what the tensors in the files can back, `check_graph` what the ops
of the ONNX graph take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...runtime_onnx.errors import InputError
from ..arch import Arch

MOST = {
    "num_hidden_layers": 1 << 12,
    "n_layer": 1 << 12,
    "num_labels": 1 << 12,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "vocab_size": 1 << 24,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "max_position_embeddings": 1 << 25,
    "original_max_position_embeddings": 1 << 25,
    "sliding_window": 1 << 31,
    "no_rope_layer_interval": 1 << 12,
}
"""Fields of config.json that count -> the most that any model has, and ten times as much. Absent and null mean the
class's own value.
"""
LEAST_POSITIONS = 32
"""Positions of a model that can be converted: executors are compared on a prompt and its continuation."""
_ROTARY = 16  # ONNX Runtime's GroupQueryAttention rotates halves of a multiple of 8
_HEAD = 8  # and its heads have a multiple of 8


def check_counts(raw: Mapping[str, Any]) -> None:
    """Raise InputError for a count in config.json that is no whole number from 1 to what MOST says."""
    for name, most in MOST.items():
        value = raw.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise InputError(
                f"{name} in config.json must be a whole number from 1 to {most}, got {ascii(value):.60}. Mend the file."
            )
    heads, kv_heads = raw.get("num_attention_heads"), raw.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        raise InputError(
            f"num_key_value_heads in config.json must divide the {heads} attention heads, got {kv_heads}. Mend the "
            "file."
        )


def check_backed(arch: Arch, raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InputError for a count that tensors of `shapes` cannot back: more layers than tensors, or a size that no
    tensor has room for; besides what `check_counts` refuses.
    """
    check_counts(raw)
    largest = max((extent for shape in shapes.values() for extent in shape), default=0)
    for space, counted in arch.spaces.items():
        value, most = raw.get(counted.config), len(shapes) if space == "layers" else largest
        if value is not None and not 1 <= value <= most:
            what = (
                f"{len(shapes)} tensors" if space == "layers" else f"no tensor with more than {largest} rows or columns"
            )
            raise InputError(
                f"{counted.config} in config.json must be what the weights hold, got {value} with {what}. Fetch both "
                "again."
            )


def check_graph(arch: Arch, config: Any) -> None:
    """Raise InputError for a model whose ONNX graph could not run: heads of a width that the attention op does not
    rotate, and too few positions.
    """
    width = arch.head_dim(config)
    factor = (
        (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor")
        or getattr(config, "partial_rotary_factor", None)
        or 1.0
    )
    rotated = int(width * factor)
    if width % _HEAD or rotated % _ROTARY or not rotated:
        raise InputError(
            f"Heads must have a multiple of {_HEAD} channels, of which a multiple of {_ROTARY} are rotated, got "
            f"{width} and {rotated}: ONNX Runtime has no "
            "attention for others. Convert another model."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < LEAST_POSITIONS:
        raise InputError(
            f"max_position_embeddings must be at least {LEAST_POSITIONS} to be converted, got {positions}. Convert "
            "another model."
        )

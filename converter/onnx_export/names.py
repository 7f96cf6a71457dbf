"""Names of the ops' nodes in an exported graph, after the builder's own, as in /model/layers.0/attn/q_proj."""

from __future__ import annotations

from ...runtime_onnx.ops import gated_mlp, sparse_linear
from ..arch import Arch

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def mlp_node(arch: Arch, layer: int) -> str:
    """The node that computes a layer's feed-forward network."""
    return f"/model/layers.{layer}/{arch.ffn.module}/{gated_mlp.NAME}"


def joined_name(names: tuple[str, ...]) -> str:
    """One name for neighbouring linears, as in qk_proj."""
    return "".join(name.removesuffix("_proj") for name in names) + "_proj"


def linear_place(layer: int, names: tuple[str, ...]) -> str:
    """The place of linears of a layer, without an op."""
    return f"/model/layers.{layer}/{'attn' if names[0] in ATTENTION else 'mlp'}/{joined_name(names)}"


def linear_node(layer: int, names: tuple[str, ...]) -> str:
    """The node that computes linears of a layer."""
    return f"{linear_place(layer, names)}/{sparse_linear.NAME}"

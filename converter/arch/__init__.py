"""Architectures as data: one JSON file per transformers `model_type`, read strictly.

A file names the weights of a block as templates, the spaces (shared dimensions) they span, the kind of feed-forward
network and where its activation is configured. Adding an architecture is adding a file; no code names one.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.ops.activation import cuts_up
from .site import Site

_FOLDER = Path(__file__).parent

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""transformers' activation names -> the op's."""
SPACES = ("layers", "hidden", "units", "vocab", "heads", "kv_heads")
"""Dimensions that every architecture names; a mixture of experts has `experts` too, how many a layer has."""
SWAPPED = "sparsegate"
"""The activation's name in the configuration of a checkpoint whose activation was swapped: no stock class knows it. Its
model type has PREFIX.
"""
PREFIX = f"{SWAPPED}_"


class Space(BaseModel):
    """A dimension that several weights share; its size stands in the model's configuration under `config`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str


class Weight(BaseModel):
    """A weight of a block: its name below the block and the spaces of its axes; `2 units` is two spaces of `units` one
    after the other.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    spaces: tuple[str, ...]
    optional: bool = False


class Ffn(BaseModel):
    """The feed-forward network: act(gate x) * (up x) -> down when gated, act(up x) -> down when plain.

    `gate`, `up`, `gate_up` and `down` name modules below `module`; `onnx` names the base graph's initializers by role.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["gated", "plain"]
    module: str
    gate: str | None = None
    up: str | None = None
    gate_up: str | None = None
    down: str
    activation: Space
    onnx: dict[str, str]


class Attention(BaseModel):
    """The attention: names of its projections below `module`, q, k, v or all three in `qkv` (rows q, then k, then v),
    and the output's `o`.

    `onnx` names the base graph's initializers by role: q, k, v or all three in qkv (columns q, then k, then v), and o.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    module: str
    q: str | None = None
    k: str | None = None
    v: str | None = None
    qkv: str | None = None
    o: str
    onnx: dict[str, str]


class Stream(BaseModel):
    """The residual stream of an architecture where an orthogonal map of it can be absorbed by the weights: RMS norms
    stand right before the maps that read it, and what is added to it comes from o and down, at most scaled.

    `attn_norm` and `ffn_norm` name the norms below a block, `final_norm` that before the head.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    attn_norm: str
    ffn_norm: str
    final_norm: str


class Arch(BaseModel):
    """One architecture; templates hold `{layer}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_type: str
    block: str
    embedding: str
    spaces: dict[str, Space]
    ffn: Ffn
    attn: Attention
    weights: tuple[Weight, ...]
    stream: Stream | None = None

    @field_validator("spaces")
    @classmethod
    def _has_all(cls, spaces: dict[str, Space]) -> dict[str, Space]:
        missing = [name for name in SPACES if name not in spaces]
        if missing:
            raise ValueError(f"spaces must hold {', '.join(SPACES)}, got no {', '.join(missing)}")
        return spaces

    @property
    def matrices(self) -> int:
        """Matrices [n, d] of a feed-forward network: gate, up and down, or up and down of a plain one."""
        return 2 if self.ffn.kind == "plain" else 3

    def size(self, config: Any, space: str, layer: int | None = None) -> int:
        """The size of a space in a model's configuration, in one layer or (`layer` None) in all of them.

        A configuration may list a size by layer. Raises InputError where the list has another length than the model,
        and for all layers of a size that differs between them.
        """
        name = self.spaces[space].config
        value = getattr(config, name)
        if not isinstance(value, list | tuple):
            return int(value)
        if len(value) != self.size(config, "layers"):
            raise InputError(
                f"{name} must have a size for each of {self.size(config, 'layers')} layers, got {len(value)}. Mend "
                "config.json."
            )
        if layer is None and len(set(value)) != 1:
            raise InputError(f"{name} must be the same in every layer here, got {value!r:.100}. Take another method.")
        return int(value[layer or 0])

    def head_dim(self, config: Any) -> int:
        """Width d_h of a head."""
        width = getattr(config, "head_dim", None)
        return int(width) if width else self.size(config, "hidden") // self.size(config, "heads")

    def activation(self, config: Any) -> str:
        """The feed-forward activation by the op's name, of a model with swapped ones that of its base. Raises
        InputError for one that the op does not have.
        """
        name = getattr(config, self.ffn.activation.config)
        if name == SWAPPED:
            name = (getattr(config, "sparsity", None) or {}).get("base_activation")
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise InputError(
                f"{self.ffn.activation.config} must be one of {', '.join(sorted(ACTIVATIONS))}, got {name!r}. Convert "
                "a model with one of these activations."
            )
        return ACTIVATIONS[name]

    def check_activation(self, activation: str, network: str = "a plain network") -> None:
        """Raise InputError for an activation of two products, drelu, where the network has one; `network` is named."""
        if self.ffn.kind == "plain" and cuts_up(activation):
            raise InputError(
                f"The activation of {network} must be one of a single product, got {activation} in {self.model_type}. "
                "Use relu."
            )

    def sites(self, config: Any) -> list[Site]:
        """Every feed-forward site, in layer order; of a layer with experts one each."""
        layers = range(self.size(config, "layers"))
        experts = range(self.size(config, "experts")) if "experts" in self.spaces else (None,)
        return [Site(layer, expert) for layer in layers for expert in experts]

    def block_prefix(self, layer: int) -> str:
        """The prefix of a block's weights in the checkpoint, with its dot."""
        return self.block.format(layer=layer) + "."

    def ffn_module(self, layer: int) -> str:
        """The name of a block's feed-forward module."""
        return self.block_prefix(layer) + self.ffn.module

    def attn_module(self, layer: int) -> str:
        """The name of a block's attention module."""
        return self.block_prefix(layer) + self.attn.module

    def linears(self) -> dict[str, tuple[str, str | None]]:
        """Linear sites of a block in the order of the data flow: name (q_proj k_proj v_proj o_proj gate_proj up_proj
        down_proj) -> (module below the block, the part of a packed weight that it is, or None). A plain network has no
        gate_proj.
        """
        attn, ffn = self.attn, self.ffn
        sites: dict[str, tuple[str, str | None]] = {}
        for part, projection in (("q", attn.q), ("k", attn.k), ("v", attn.v)):
            sites[f"{part}_proj"] = (f"{attn.module}.{projection or attn.qkv}", None if projection else part)
        sites["o_proj"] = (f"{attn.module}.{attn.o}", None)
        if ffn.kind == "gated":
            sites["gate_proj"] = (f"{ffn.module}.{ffn.gate or ffn.gate_up}", None if ffn.gate else "gate")
        sites["up_proj"] = (f"{ffn.module}.{ffn.up or ffn.gate_up}", None if ffn.up else "up")
        sites["down_proj"] = (f"{ffn.module}.{ffn.down}", None)
        return sites

    def shape(self, config: Any, weight: Weight) -> tuple[int, ...]:
        """The shape that a weight must have under a configuration."""

        def extent(axis: str) -> int:
            times, _, name = axis.rpartition(" ")
            return int(times or 1) * self.size(config, name)

        return tuple(extent(axis) for axis in weight.spaces)


def supported() -> list[str]:
    """The model types that have a file, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


@cache
def load_arch(model_type: str) -> Arch:
    """The architecture of a model type, of its base where the activation was swapped. Raises InputError with what is
    supported and how to add one.
    """
    if model_type.startswith(PREFIX):
        return load_arch(model_type.removeprefix(PREFIX))
    if model_type not in supported():
        raise InputError(
            f"model_type must be one of {', '.join(supported())}, got {model_type!r}. "
            f"Add converter/arch/{model_type}.json (copy the nearest file and rename its weights) and run the tests on "
            "it."
        )
    path = _FOLDER / f"{model_type}.json"
    try:
        arch = Arch.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, ValidationError) as error:
        raise InputError(f"{path.name} must follow the architecture schema, got {error}. Mend the file.") from None
    if arch.model_type != path.stem:
        raise InputError(
            f"{path.name} must describe its own model type, got {arch.model_type!r}. Rename the file or the key."
        )
    return arch

"""The torch side of an architecture: blocks that are filled one at a time, and the parts of a feed-forward module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.ops.activation import cuts_up, split_activation
from ..arch import Arch, load_arch
from ..arch.site import Site
from ..checkpoint.source import Source

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda v: F.relu(v).square(),
    "drelu": F.relu,
    "identity": lambda v: v,
}
"""Of the gate (a plain network's up projection), by the op's name; dReLU's other half is `parts_of`'."""
_PARAMETRIC: dict[str, Callable[[Tensor, float], Tensor]] = {
    "fatrelu": lambda v, b: torch.where(v <= b, 0.0, v),
    "shifted_relu": lambda v, b: F.relu(v - b),
}


class Parts(NamedTuple):
    """A feed-forward module's inner values for rows of x: `gate` = act(gate x), `up`, `z` [..., n]. A plain one has
    gate = act(up x) = z and no up.
    """

    gate: Tensor
    up: Tensor | None
    z: Tensor


def activate(activation: str, v: Tensor) -> Tensor:
    """The activation of v, its parameter rounded to float32 as in the op. Raises InputError for a name that is none."""
    kind, parameter = split_activation(activation)
    return ACTIVATIONS[kind](v) if kind in ACTIVATIONS else _PARAMETRIC[kind](v, float(np.float32(parameter)))


def ffn_modules(model: Any, arch: Arch, sites: Iterable[Site]) -> dict[Site, Any]:
    """The feed-forward module of every site."""
    return {site: model.get_submodule(arch.ffn_module(site.layer)) for site in sites}


def ffn_activation(module: Any, activation: str) -> str:
    """The activation that a feed-forward module computes with: what it was swapped to, else the model's."""
    return vars(module).get("swapped", activation)


def ffn_products(module: Any, arch: Arch, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the activation is applied to, and up, both [..., n], for x [..., d]: gate x and up x, or up x and None of a
    plain network.
    """
    ffn = arch.ffn
    if ffn.kind == "plain":
        return getattr(module, str(ffn.up))(x), None
    if ffn.gate_up:
        gate, up = getattr(module, ffn.gate_up)(x).chunk(2, dim=-1)
        return gate, up
    return getattr(module, str(ffn.gate))(x), getattr(module, str(ffn.up))(x)


def ffn_parts(module: Any, arch: Arch, activation: str, x: Tensor) -> Parts:
    """Compute `Parts` of the feed-forward `module` for x [..., d]; an activation that it was swapped to goes before the
    given one.
    """
    return parts_of(ffn_activation(module, activation), *ffn_products(module, arch, x))


def parts_of(activation: str, before: Tensor, up: Tensor | None) -> Parts:
    """`Parts` of the products [..., n] that `ffn_products` gives; dReLU cuts up at zero too."""
    gate = activate(activation, before)
    if up is None:
        return Parts(gate, None, gate)
    if cuts_up(activation):
        up = F.relu(up)
    return Parts(gate, up, gate * up)


def swap(module: Any, arch: Arch, activation: str) -> None:
    """Give the feed-forward `module` of a model another activation, for good: its class becomes one that computes with
    `module.swapped`.

    Weights and their names stay; `forward` may be set on the instance above it. Raises InputError for drelu in a plain
    network and for an unknown name.
    """
    split_activation(activation)
    arch.check_activation(activation)
    if "swapped" not in vars(module):
        module.__class__ = _swapped_class(type(module), arch.model_type)
    module.swapped = activation


@cache
def _swapped_class(kind: type[nn.Module], model_type: str) -> type[nn.Module]:
    arch = load_arch(model_type)

    def forward(self: Any, x: Tensor) -> Tensor:
        return ffn_down(self, arch, ffn_parts(self, arch, self.swapped, x).z)

    return type(f"Swapped{kind.__name__}", (kind,), {"forward": forward, "__module__": kind.__module__})


def ffn_down(module: Any, arch: Arch, z: Tensor) -> Tensor:
    """The down projection of z [..., n], bias included: [..., d]."""
    return getattr(module, arch.ffn.down)(z)


def down_rows(module: Any, arch: Arch) -> Tensor:
    """The down projection neuron-major: [n, d]."""
    return getattr(module, arch.ffn.down).weight.T


def ffn_matrices(module: Any, arch: Arch) -> dict[str, Tensor]:
    """A feed-forward module's matrices neuron-major, [n, d] each, by part: gate (absent in a plain
    network), up, down.
    """
    ffn = arch.ffn
    if ffn.kind == "plain":
        matrices = {"up": getattr(module, str(ffn.up)).weight}
    elif ffn.gate_up:
        gate, up = getattr(module, ffn.gate_up).weight.chunk(2)
        matrices = {"gate": gate, "up": up}
    else:
        matrices = {"gate": getattr(module, str(ffn.gate)).weight, "up": getattr(module, str(ffn.up)).weight}
    return matrices | {"down": down_rows(module, arch)}


def ffn_biases(module: Any, arch: Arch) -> dict[str, Tensor]:
    """A feed-forward module's biases by part: gate [n], up [n], down [d]; only those that exist."""
    ffn = arch.ffn
    biases: dict[str, Tensor | None] = {"down": getattr(module, ffn.down).bias}
    if ffn.kind == "gated" and ffn.gate_up:
        packed = getattr(module, ffn.gate_up).bias
        biases["gate"], biases["up"] = (None, None) if packed is None else packed.chunk(2)
    else:
        biases["up"] = getattr(module, str(ffn.up)).bias
        biases["gate"] = None if ffn.kind == "plain" else getattr(module, str(ffn.gate)).bias
    return {part: bias for part, bias in biases.items() if bias is not None}


@contextmanager
def filled(module: nn.Module, tensors: dict[str, Tensor], device: str) -> Iterator[nn.Module]:
    """`module` with its parameters from `tensors` (names below the module) on `device`; back on the meta device
    afterwards.

    `tensors` must hold every parameter; it is emptied, so that memory is held once.
    """
    tensors_on_device = {name: tensors.pop(name).to(device) for name in list(tensors)}
    module.load_state_dict(tensors_on_device, assign=True, strict=True)
    tensors_on_device.clear()
    try:
        yield module
    finally:
        module.to(device="meta")


def moved(value: Any, device: str) -> Any:
    """`value` with its tensors, those in tuples and dicts too, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    return tuple(moved(part, device) for part in value) if isinstance(value, tuple) else value


def embed(model: Any, source: Source, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Put the rows of the embedding that `tokens` [N, S] use into `model`; returns the tokens renumbered for it, and
    the rows' ids [U].

    Raises InputError for a token that the embedding does not have.
    """
    used, renumbered = torch.unique(tokens, return_inverse=True)
    rows = source.tensors[source.arch.embedding].shape[0]
    if int(used[-1]) >= rows:
        raise InputError(
            f"The tokenizer's ids must lie below {rows}, the rows of {source.arch.embedding}, got {int(used[-1])}. "
            "Fetch the model's own tokenizer."
        )
    embedding = model.get_input_embeddings()
    embedding.weight = nn.Parameter(source.rows(source.arch.embedding, used), requires_grad=False)
    embedding.padding_idx = None
    return renumbered, used

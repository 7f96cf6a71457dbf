"""One rotation of a model's residual stream, absorbed by the weights: the dense model computes the same, and the inputs
of the maps that read the stream have their energy in fewer channels.

An RMS norm commutes with an orthogonal Q once its weight is part of the maps behind it, so Q goes into the embedding,
o and down, and its inverse into q, k, v, gate, up and the head. Inputs of o and down lie inside a block and stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ..arch import Arch, Stream
from ..checkpoint.source import HEAD, Source
from ..checkpoint.writer import DTYPES
from .taps import tapped_inputs

SOURCE = (
    "LaRoSA, arXiv 2507.01299, section 3; the absorption is that of SliceGPT, arXiv 2401.15024, theorem 1",
    "channels are principal axes of the normed inputs: x Q, with Q the eigenvectors of the sum of E[x x^T]",
    "one Q for all layers, which costs nothing at inference, where LaRoSA has one a layer and adapters on the residual",
)
AT_ONCE = 4
"""Windows that pass through the model together."""
_BOUNDS = {"F32": 1e-5, "F64": 1e-5, "F16": 2e-3, "BF16": 2e-2}


def stream_of(arch: Arch) -> Stream:
    """The norms of an architecture's stream. Raises InputError where a rotation cannot be absorbed."""
    if arch.stream is None:
        raise InputError(
            "A model to rotate must have RMS norms right before the maps that read its residual stream, and none "
            f"behind those that write to it, got {arch.model_type}. Leave rotate out."
        )
    return arch.stream


@torch.no_grad()
def principal_axes(model: Any, arch: Arch, tokens: Tensor) -> Tensor:
    """Orthogonal Q [d, d] fp64 on the CPU: eigenvectors (columns, the largest first) of the second moments of
    x / rms x, summed over what enters every block's norms, for token windows [N, S].

    A column's sign is such that its largest entry is positive. Raises InputError as `stream_of` does.
    """
    stream, width = stream_of(arch), arch.size(model.config, "hidden")
    moments = torch.zeros(width, width, dtype=torch.float64, device=model.device)

    def add(x: Tensor) -> None:
        rows = x.flatten(0, -2).float()
        rows = rows * rows.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt()
        moments.add_((rows.T @ rows).double())

    norms = [
        model.get_submodule(arch.block_prefix(layer) + name)
        for layer in range(arch.size(model.config, "layers"))
        for name in (stream.attn_norm, stream.ffn_norm)
    ]
    with tapped_inputs(dict.fromkeys(norms, add)):
        for rows in tokens.split(AT_ONCE):
            model.get_decoder()(input_ids=rows.to(model.device), use_cache=False)
    axes = torch.linalg.eigh(moments.cpu())[1].flip(1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return axes * largest.sign()


def rotated_weights(source: Source, q: Tensor, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """The weights of the model whose stream is x q for an orthogonal q [d, d] fp64, by name, the head's own among them:
    rotated ones, and norm weights of 1. Each is computed in fp64 and given in `dtype`, None: the one of its file.

    Raises InputError as `stream_of` does.
    """
    arch, config, stream = source.arch, source.config, stream_of(source.arch)

    def read(name: str) -> Tensor:
        return source.read([name], torch.float64)[name]

    def stored(name: str, weight: Tensor, like: str | None = None) -> tuple[str, Tensor]:
        return name, weight.to(dtype or DTYPES[source.tensors[like or name].dtype]).contiguous()

    embedding = read(arch.embedding)
    head, final = HEAD if HEAD in source.tensors else arch.embedding, f"{stream.final_norm}.weight"
    yield stored(HEAD, (read(head) if head == HEAD else embedding) * read(final) @ q, head)
    yield stored(arch.embedding, embedding @ q)
    yield stored(final, torch.ones_like(read(final)))
    modules = {name: module for name, (module, _) in arch.linears().items()}
    written = {modules[name] for name in ("o_proj", "down_proj")}
    for layer in range(arch.size(config, "layers")):
        prefix = arch.block_prefix(layer)
        norms = {
            part: f"{prefix}{norm}.weight"
            for part, norm in ((arch.attn.module, stream.attn_norm), (arch.ffn.module, stream.ffn_norm))
        }
        for module in dict.fromkeys(modules.values()):
            name = f"{prefix}{module}.weight"
            if module not in written:
                yield stored(name, read(name) * read(norms[module.rpartition(".")[0]]) @ q)
                continue
            yield stored(name, q.T @ read(name))
            if (bias := f"{prefix}{module}.bias") in source.tensors:
                yield stored(bias, q.T @ read(bias))
        for name in norms.values():
            yield stored(name, torch.ones_like(read(name)))


def logit_error(logits: Tensor, expected: Tensor) -> float:
    """Energy of the difference of a rotated model's logits from the model's, relative to theirs."""
    return float((logits.float() - expected.float()).square().sum() / expected.float().square().sum())


def error_bound(source: Source) -> float:
    """Largest `logit_error` of what is rotated from `source`, by the dtype of its embedding: rounding its weights anew
    costs as much as the rounding in its own files did.
    """
    return _BOUNDS[source.tensors[source.arch.embedding].dtype]

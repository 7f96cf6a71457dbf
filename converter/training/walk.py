"""A model's hidden states on their way through its blocks, of which one at a time is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime_onnx.errors import InputError
from ..arch import Arch
from ..checkpoint.source import Source
from ..modeling.blocks import embed, filled, moved
from ..modeling.taps import block_calls

TOKENS_AT_ONCE = 2048
"""Tokens that pass through a block together."""


class Half:
    """Rows [..., d] in fp16, each relative to its root mean square, so that outliers of hidden states fit the range."""

    def __init__(self, *shape: int) -> None:
        self.values = torch.empty(shape, dtype=torch.float16)
        self.scales = torch.empty((*shape[:-1], 1))

    def __setitem__(self, at: Any, rows: Tensor) -> None:
        scale = rows.float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
        self.values[at], self.scales[at] = (rows.float() / scale).half().cpu(), scale.cpu()

    def __getitem__(self, at: Any) -> Tensor:
        """Rows in fp32, on the CPU."""
        return self.values[at].float() * self.scales[at]

    def flat(self) -> Half:
        """The same memory as rows [R, d]."""
        rows = Half(0, 1)
        rows.values, rows.scales = self.values.flatten(0, -2), self.scales.flatten(0, -2)
        return rows


class Walk:
    """A model's hidden states [N, S, d] before one of its blocks."""

    @torch.no_grad()
    def __init__(self, model: Any, source: Source | None, arch: Arch, tokens: Tensor, device: str) -> None:
        self.arch, self.source = arch, source
        self.blocks: nn.ModuleList = model.get_decoder().layers
        self.device = device
        self.lean = any(p.is_meta for p in self.blocks.parameters())
        if self.lean:
            if source is None:
                raise InputError(
                    "A model on the meta device must come with its source, got none. Pass the source that it was made "
                    "from."
                )
            tokens, _ = embed(model, source, tokens)
        else:
            self.device = str(next(self.blocks.parameters()).device)
        rows = max(1, TOKENS_AT_ONCE // tokens.shape[1])
        self.groups = [slice(k, min(k + rows, len(tokens))) for k in range(0, len(tokens), rows)]
        self.hidden = Half(*tokens.shape, arch.size(model.config, "hidden"))
        self.keywords: dict[int, list[dict[str, Any]]] = {}
        for group in self.groups:
            window = tokens[group].to("cpu" if self.lean else self.device)
            call = block_calls(model, self.blocks, window, torch.ones_like(window, dtype=torch.bool))
            self.hidden[group] = call.hidden
            self.keywords.setdefault(len(window), call.keywords)

    @contextmanager
    def block(self, layer: int) -> Iterator[Any]:
        """The block with its weights, which a lean model holds inside the context only."""
        if not self.lean:
            yield self.blocks[layer]
            return
        assert self.source is not None
        prefix = self.arch.block_prefix(layer)
        tensors = self.source.read(prefix + name for name, _ in self.blocks[layer].named_parameters())
        with filled(
            self.blocks[layer], {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, self.device
        ) as block:
            yield block

    def run(self, layer: int, block: Any, group: slice) -> Tensor:
        """The block's output [B, S, d] for some windows."""
        rows = self.hidden[group].to(self.device)
        out = block(rows, **moved(self.keywords[len(rows)][layer], self.device))
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def advance(self, layer: int, block: Any) -> None:
        """Pass the hidden states on through the block."""
        for group in self.groups:
            self.hidden[group] = self.run(layer, block, group)

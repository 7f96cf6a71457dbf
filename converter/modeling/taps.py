"""Where a dense model is watched and masked: feed-forward networks, attention heads and single linears, by the names of
its architecture file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arch import Arch
from ..arch.site import Site
from .blocks import down_rows, ffn_down, ffn_parts

Fields = dict[str, Tensor]
See = Callable[[Site, Fields], Tensor | None]
"""Called at a site with the fields of a score's Context, leading axes [B, S]; returns the units that stay [B, S, n]
(heads: [B, S, H]) or None for all.
"""


@contextmanager
def tapped(model: Any, arch: Arch, kinds: Sequence[str], see: See) -> Iterator[None]:
    """`model` with `see` at every site of `kinds` (ffn, attn, linear) inside the block. What does not stay is zero
    afterwards.
    """
    with ExitStack() as stack:
        for layer in range(arch.size(model.config, "layers")):
            if "ffn" in kinds:
                ffn = model.get_submodule(arch.ffn_module(layer))
                ffn.forward = partial(_ffn, ffn, arch, arch.activation(model.config), Site(layer), see)
                stack.callback(delattr, ffn, "forward")
            if "attn" in kinds:
                o = model.get_submodule(f"{arch.attn_module(layer)}.{arch.attn.o}")
                heads = int(getattr(model.config, arch.attn.heads.config))
                stack.callback(
                    o.register_forward_pre_hook(partial(_heads, heads, Site(layer, kind="attn"), see)).remove
                )
            if "linear" in kinds:
                for name, parts in linear_parts(model, arch, layer).items():
                    linear = model.get_submodule(name)
                    linear.forward = partial(_linear, linear, parts, see)
                    stack.callback(delattr, linear, "forward")
        yield


def linear_parts(model: Any, arch: Arch, layer: int) -> dict[str, list[tuple[Site, slice]]]:
    """The linears of a block: full module name -> its sites with the rows of the weight that are theirs; a packed
    weight has two or three.
    """
    heads, groups = (int(getattr(model.config, space.config)) for space in (arch.attn.heads, arch.attn.kv_heads))
    width, units = arch.attn.head_dim(model.config), arch.size(model.config, "units")
    rows = {"q": heads * width, "k": groups * width, "v": groups * width, "gate": units, "up": units}
    found: dict[str, list[tuple[Site, slice]]] = {}
    for name, (module, part) in arch.linears().items():
        parts = found.setdefault(arch.block_prefix(layer) + module, [])
        start = parts[-1][1].stop if parts else 0
        parts.append((Site(layer, kind=f"linear:{name}"), slice(start, start + rows[part]) if part else slice(None)))
    return found


def _ffn(module: Any, arch: Arch, activation: str, site: Site, see: See, x: Tensor) -> Tensor:
    parts = ffn_parts(module, arch, activation, x)
    if arch.ffn.gate_up:
        w_gate, w_up = getattr(module, arch.ffn.gate_up).weight.chunk(2)
    else:
        w_up = getattr(module, str(arch.ffn.up)).weight
        w_gate = getattr(module, str(arch.ffn.gate)).weight if arch.ffn.gate else w_up
    fields = {
        "x": x,
        "gate": parts.gate,
        "z": parts.z,
        "w_gate": w_gate,
        "w_up": w_up,
        "w_down": down_rows(module, arch),
    }
    keep = see(site, fields if parts.up is None else fields | {"up": parts.up})
    return ffn_down(module, arch, parts.z if keep is None else _zero(parts.z, keep))


def _heads(heads: int, site: Site, see: See, module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    o = arguments[0].unflatten(-1, (heads, -1))
    keep = see(site, {"o": o})
    return None if keep is None else (_zero(o, keep.unsqueeze(-1)).flatten(-2), *arguments[1:])


def _linear(module: Any, parts: list[tuple[Site, slice]], see: See, x: Tensor) -> Tensor:
    out = []
    for site, rows in parts:
        w, b = module.weight[rows], None if module.bias is None else module.bias[rows]
        keep = see(site, {"x": x, "w": w})
        out.append(F.linear(x if keep is None else _zero(x, keep), w, b))
    return torch.cat(out, dim=-1) if len(out) > 1 else out[0]


def _zero(values: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, values, torch.zeros((), dtype=values.dtype, device=values.device))

"""Shapes of the linear maps of a block."""

from __future__ import annotations

from typing import Any

from . import Arch


def linear_shapes(arch: Arch, config: Any, layer: int | None = None) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every linear site of a block, by name in the order of the data flow; `layer` None:
    of every one.
    """
    hidden, units = arch.size(config, "hidden"), arch.size(config, "units", layer)
    heads, kv_heads = (arch.size(config, space, layer) * arch.head_dim(config) for space in ("heads", "kv_heads"))
    outputs = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads, "o_proj": hidden, "down_proj": hidden}
    inputs = {"o_proj": heads, "down_proj": units}
    return {name: (outputs.get(name, units), inputs.get(name, hidden)) for name in arch.linears()}


def linear_rows(arch: Arch, config: Any, layer: int | None = None) -> dict[str, dict[str, slice]]:
    """Module below a block -> its linear sites by name, each with its rows of the weight: one site, or the parts of a
    packed weight in order.
    """
    shapes = linear_shapes(arch, config, layer)
    modules: dict[str, dict[str, slice]] = {}
    for name, (module, _) in arch.linears().items():
        parts = modules.setdefault(module, {})
        start = max((rows.stop for rows in parts.values()), default=0)
        parts[name] = slice(start, start + shapes[name][0])
    return modules

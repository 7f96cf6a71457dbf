"""Finds the products behind linear sites in a base graph, by the initialisers that the architecture names; a packed
weight is cut into its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..arch import Arch
from ..arch.shapes import linear_shapes
from .names import joined_name
from .product import Product, find_product


@dataclass(frozen=True)
class Part:
    """Neighbouring columns of a product's weight that read the same input: one linear, or several of a packed weight.

    Attributes:
        names: The linears, as in sites: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj.
        columns: Their columns of the weight [d_in, d_out] and of the bias [d_out].
        tau: Threshold on |x| [d_in]; None reads all of x.
    """

    names: tuple[str, ...]
    columns: slice
    tau: NDArray[np.float32] | None

    @property
    def name(self) -> str:
        """One name for all of them, as in qk_proj."""
        return joined_name(self.names)


@dataclass(frozen=True)
class LinearRegion:
    """A product and how its columns are cut: the parts cover all of them, in order."""

    layer: int
    product: Product
    parts: tuple[Part, ...]


def find_linears(
    graph: ir.Graph, arch: Arch, config: Any, layer: int, tau: Mapping[str, NDArray[np.float32]]
) -> list[LinearRegion]:
    """The products of a layer that compute the linears named in `tau` {name: [d_in]}, in the order of the data flow.

    Neighbours in a packed weight that have the same tau, or none, stay together. Raises InputError when the graph has
    no such product.
    """
    shapes, templates = linear_shapes(arch, config, layer), _templates(arch)
    regions = []
    for packed, parts in cut_linears(arch, config, layer, tau).items():
        d_in = shapes[parts[0].names[0]][1]
        product = find_product(graph, layer, templates[packed].format(layer=layer), (d_in, parts[-1].columns.stop))
        regions.append(LinearRegion(layer, product, parts))
    return regions


def _templates(arch: Arch) -> dict[str, str]:
    return {f"{role}_proj": template for role, template in arch.ffn.onnx.items()} | {
        f"{role}_proj": name for role, name in arch.attn.onnx.items()
    }


def cut_linears(
    arch: Arch, config: Any, layer: int, tau: Mapping[str, NDArray[np.float32]]
) -> dict[str, tuple[Part, ...]]:
    """How a base graph's products that compute the linears named in `tau` are cut: product (qkv_proj, or a linear's own
    name) -> its parts.
    """
    shapes, templates = linear_shapes(arch, config, layer), _templates(arch)
    cuts = {}
    for packed, names in {"qkv_proj": ("q_proj", "k_proj", "v_proj"), **{name: (name,) for name in shapes}}.items():
        if packed not in templates or not set(names) & set(tau):
            continue
        widths = [shapes[name][0] for name in names]
        parts: list[Part] = []
        end = 0
        for name, width in zip(names, widths, strict=True):
            start, end = end, end + width
            part = Part((name,), slice(start, end), tau.get(name))
            if parts and _same(parts[-1].tau, part.tau):
                last = parts.pop()
                part = Part((*last.names, name), slice(last.columns.start, end), part.tau)
            parts.append(part)
        cuts[packed] = tuple(parts)
    return cuts


def _same(first: NDArray[np.float32] | None, second: NDArray[np.float32] | None) -> bool:
    return first is second or (first is not None and second is not None and np.array_equal(first, second))

"""Finds the products behind linear sites in a base graph, by the initialisers that the architecture names; a packed weight is cut into its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..arch import Arch
from ..plans import linear_shapes
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
        return "".join(name.removesuffix("_proj") for name in self.names) + "_proj"


@dataclass(frozen=True)
class LinearRegion:
    """A product and how its columns are cut: the parts cover all of them, in order."""

    layer: int
    product: Product
    parts: tuple[Part, ...]


def find_linears(graph: ir.Graph, arch: Arch, config: Any, layer: int, tau: Mapping[str, NDArray[np.float32]]) -> list[LinearRegion]:
    """The products of a layer that compute the linears named in `tau` {name: [d_in]}, in the order of the data flow.

    Neighbours in a packed weight that have the same tau, or none, stay together. Raises InputError when the graph has no such product.
    """
    shapes = linear_shapes(arch, config)
    templates = {f"{role}_proj": template for role, template in arch.ffn.onnx.items()} | {f"{role}_proj": name for role, name in arch.attn.onnx.items()}
    regions = []
    for packed, names in {"qkv_proj": ("q_proj", "k_proj", "v_proj"), **{name: (name,) for name in shapes}}.items():
        if packed not in templates or not set(names) & set(tau):
            continue
        d_in, widths = shapes[names[0]][1], [shapes[name][0] for name in names]
        product = find_product(graph, layer, templates[packed].format(layer=layer), (d_in, sum(widths)))
        parts: list[Part] = []
        end = 0
        for name, width in zip(names, widths, strict=True):
            start, end = end, end + width
            own = Part((name,), slice(start, end), tau.get(name))
            if parts and _same(parts[-1].tau, own.tau):
                last = parts.pop()
                own = Part((*last.names, name), slice(last.columns.start, end), own.tau)
            parts.append(own)
        regions.append(LinearRegion(layer, product, tuple(parts)))
    return regions


def _same(first: NDArray[np.float32] | None, second: NDArray[np.float32] | None) -> bool:
    return first is second or (first is not None and second is not None and np.array_equal(first, second))

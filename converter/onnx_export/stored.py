"""What an exported file must hold for every op of ai.sparsegate, made from the torch model and the plan alone.

Nothing here reads the file: it is what the file's ops are judged by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ...runtime_onnx.ops import gated_mlp, sparse_linear
from ...runtime_onnx.ops.quantisation import quantise
from ..arch import Arch
from ..arch.shapes import linear_rows, linear_shapes
from ..arch.site import Site
from ..checkpoint.plan import Plan, linear_thresholds
from ..modeling.blocks import ffn_biases, ffn_matrices
from .emit import emit
from .linear_region import Part, cut_linears
from .names import linear_node, mlp_node
from .precision import FLOAT_NAMES, PRECISIONS, Precision
from .stored_values import DTYPES, store_predictor


@dataclass(frozen=True)
class StoredOp:
    """One op as its node must compute it.

    Attributes:
        node: The node's name in the graph.
        variant: The op's variant.
        tensors: One array per role, in the stored dtype.
        places: Modules of the torch model, with the columns of their output that the op's output holds, in order; None
        is all of them.
    """

    node: str
    variant: gated_mlp.Variant | sparse_linear.Variant
    tensors: dict[str, NDArray]
    places: tuple[tuple[str, slice | None], ...]

    @property
    def emulated(self) -> bool:
        """Whether the CPU kernel rounds activations at this op."""
        return self.variant.weights != "float" or (
            isinstance(self.variant, gated_mlp.Variant) and self.variant.p == "int8"
        )

    @property
    def op(self) -> Any:
        """The module that describes the op."""
        return gated_mlp if isinstance(self.variant, gated_mlp.Variant) else sparse_linear


def stored_ops(model: Any, plan: Plan, arch: Arch, precision: str, target: str = "cpu") -> Iterator[StoredOp]:
    """Every op that `export` writes for a plan, layer by layer. `model` is the dense transformers model with its
    weights as they were before any rounding.
    """
    form = PRECISIONS[precision]
    half = form.builder(target)
    for layer in sorted({site.layer for site in plan}):
        if Site(layer) in plan:
            yield _mlp(model, plan, arch, form, half, layer)
        taus = {name: tau.detach().cpu().float().numpy() for name, tau in linear_thresholds(plan, layer).items()}
        for parts in cut_linears(arch, model.config, layer, taus).values():
            for part in parts:
                if part.tau is not None:
                    yield _linear(model, arch, form, half, layer, part)


def _mlp(model: Any, plan: Plan, arch: Arch, form: Precision, half: str, layer: int) -> StoredOp:
    config, module = model.config, model.get_submodule(arch.ffn_module(layer))
    hidden, units = arch.size(config, "hidden"), arch.size(config, "units", layer)
    emission = emit(Site(layer), plan[Site(layer)], hidden, units)
    tensors, predictor = store_predictor(emission.tensors, form)
    weights = form.fitting(hidden)
    for part, matrix in ffn_matrices(module, arch).items():
        rows = _rounded_for(half, matrix.detach().cpu().float().numpy())
        if weights == "float":
            tensors[f"w_{part}"] = rows.astype(DTYPES[form.w].numpy())
        else:
            tensors[f"w_{part}"], tensors[f"s_{part}"] = quantise(rows, weights)
    for part, bias in ffn_biases(module, arch).items():
        tensors[f"b_{part}"] = _rounded_for(half, bias.detach().cpu().float().numpy())
    roles = tuple(role for role in gated_mlp.ROLES if role in tensors)
    activation = emission.activation or arch.activation(config)
    variant = gated_mlp.Variant(activation, emission.score, weights, roles, x=FLOAT_NAMES[half], w=form.w, p=predictor)
    return StoredOp(mlp_node(arch, layer), variant, tensors, ((arch.ffn_module(layer), None),))


def _linear(model: Any, arch: Arch, form: Precision, half: str, layer: int, part: Part) -> StoredOp:
    rows, shapes, prefix = (
        linear_rows(arch, model.config, layer),
        linear_shapes(arch, model.config, layer),
        arch.block_prefix(layer),
    )
    places, pieces, biases = [], [], []
    for name in part.names:
        below = arch.linears()[name][0]
        linear: nn.Linear = model.get_submodule(prefix + below)
        at = rows[below][name]
        places.append((prefix + below, at))
        pieces.append(linear.weight.detach()[at].cpu().float().numpy())
        if linear.bias is not None:
            biases.append(linear.bias.detach()[at].cpu().float().numpy())
    by_channel = _rounded_for(half, np.ascontiguousarray(np.concatenate(pieces).T))  # [d_in, d_out]
    assert part.tau is not None and len(part.tau) == shapes[part.names[0]][1]
    tensors: dict[str, NDArray] = {"tau": part.tau}
    weights = form.fitting(by_channel.shape[1])
    if weights == "float":
        tensors["w"] = by_channel.astype(DTYPES[form.w].numpy())
    else:
        tensors["w"], tensors["s_w"] = quantise(by_channel, weights)
    if biases:
        tensors["b"] = _rounded_for(half, np.concatenate(biases))
    roles = tuple(role for role in sparse_linear.ROLES if role in tensors)
    variant = sparse_linear.Variant(weights, roles, x=FLOAT_NAMES[half], w=form.w)
    return StoredOp(linear_node(layer, part.names), variant, tensors, tuple(places))


def _rounded_for(half: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values as the builder's graph for CUDA holds them before they are converted further."""
    return values if half == "fp32" else values.astype(DTYPES[FLOAT_NAMES[half]].numpy()).astype(np.float32)

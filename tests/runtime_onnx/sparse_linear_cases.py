"""Random inputs and one-node models for the tests of SparseLinear."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes  # noqa: F401 registers bfloat16 with numpy
import numpy as np
from onnx import helper, numpy_helper

from sparsegate.runtime_onnx.ops.sparse_linear import DOMAIN, NAME, ROLES, Variant, active, function, reference

Tensors = dict[str, np.ndarray]


def make_variant(weights: str = "float", *, bias: bool = False, x: str = "float32", w: str = "float32") -> Variant:
    """The variant with just the roles it needs."""
    roles = {"w", "tau"} | ({"b"} if bias else set()) | ({"s_w"} if weights != "float" else set())
    return Variant(weights, tuple(role for role in ROLES if role in roles), x, w)


def make_tensors(variant: Variant, d_in: int, d_out: int, seed: int = 0) -> Tensors:
    """Random tensors of unit-scale products, without tau."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((d_in, d_out)) / d_in**0.5
    out: Tensors = {"w": w.astype(variant.w)}
    if variant.weights == "int8_row":
        scale = np.abs(w).max(1) / 127
        out = {"w": np.rint(w / scale[:, None]).astype(np.int8), "s_w": scale.astype(np.float32)}
    if "b" in variant.inputs:
        out["b"] = (rng.standard_normal(d_out) / 2).astype(np.float32)
    return out


def make_x(variant: Variant, shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(variant.x)


def with_tau(variant: Variant, x: np.ndarray, tensors: Tensors, keep: float, seed: int = 2) -> Tensors:
    """Adds a tau that keeps this share of the (token, channel) pairs; every |x| off the threshold, or a tie on both of its sides."""
    size = np.sort(np.abs(x.astype(np.float64)).reshape(-1, x.shape[-1]), axis=0)
    tokens, d_in = size.shape
    kept = np.random.default_rng(seed).binomial(tokens, keep, d_in)
    edges = np.concatenate([-np.ones((1, d_in)), size, size[-1:] + 1])
    columns = np.arange(d_in)
    tau = (edges[tokens - kept, columns] + edges[tokens - kept + 1, columns]) / 2
    return {**tensors, "tau": tau.astype(np.float32)}


def make_model(
    variant: Variant, tensors: Mapping[str, np.ndarray], x_rank: int = 2, fed: tuple[str, ...] = (), attributes: Mapping[str, str] | None = None
) -> bytes:
    """One node, its function body included; x and y are float32 outside (Cast inside for other dtypes), roles in `fed` are graph inputs."""
    free = [f"t{i}" for i in range(x_rank - 1)]
    code = helper.np_dtype_to_tensor_dtype(np.dtype(variant.x))
    cast = variant.x != "float32"
    node = helper.make_node(NAME, ["x_cast" if cast else "x", *variant.inputs], ["y_cast" if cast else "y"], domain=DOMAIN, name="linear")
    node.attribute.extend(helper.make_attribute(k, v) for k, v in (attributes or variant.attributes()).items())
    nodes = [node]
    if cast:
        nodes = [helper.make_node("Cast", ["x"], ["x_cast"], to=code), node, helper.make_node("Cast", ["y_cast"], ["y"], to=1)]
    inputs = [helper.make_tensor_value_info("x", 1, [*free, "d_in"])]
    inputs += [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(tensors[k].dtype), None) for k in fed]
    constants = [numpy_helper.from_array(tensors[k], k) for k in variant.inputs if k not in fed]
    graph = helper.make_graph(nodes, "graph", inputs, [helper.make_tensor_value_info("y", 1, [*free, "d_out"])], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function(variant)]).SerializeToString()


def without_one(variant: Variant, x: np.ndarray, tensors: Tensors) -> np.ndarray | None:
    """The reference without the kept channel of median contribution, the negative control of every bound; None if nothing contributes."""
    kept = np.where(active(variant, x, tensors), x.astype(np.float64).reshape(-1, x.shape[-1]), 0)
    size = np.sqrt((kept**2).sum(0)) * np.abs(tensors["w"].astype(np.float64)).sum(1)
    used = np.flatnonzero(size)
    if not used.size:
        return None
    w = tensors["w"].copy()
    w[used[np.argsort(size[used])[used.size // 2]]] = 0
    return reference(variant, x, {**tensors, "w": w})

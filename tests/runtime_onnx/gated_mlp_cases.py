"""Random inputs and one-node models for the tests of GatedMLP."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes  # noqa: F401 registers bfloat16 with numpy
import numpy as np
import onnxruntime as ort
from onnx import helper, numpy_helper

from sparsegate.runtime_onnx.library import library_path
from sparsegate.runtime_onnx.ops.gated_mlp import DOMAIN, NAME, ROLES, Variant, _activated, active, function, reference, scores

Tensors = dict[str, np.ndarray]


def make_variant(
    activation: str = "silu",
    score: str = "predictor",
    weights: str = "float",
    *,
    plain: bool = False,
    bias: bool = False,
    res: bool = False,
    x: str = "float32",
    w: str = "float32",
    p: str = "float32",
) -> Variant:
    """The variant with just the roles it needs."""
    roles = {"w_gate", "w_up", "w_down"}
    if weights != "float":
        roles |= {"s_gate", "s_up", "s_down"}
    if bias:
        roles |= {"b_gate", "b_up", "b_down"}
    if score in ("predictor", "gate"):
        roles.add("tau")
    if score == "predictor":
        roles |= {"p1", "p2"}
    if res:
        roles |= {"p1", "res"}
    if p == "int8":
        roles |= {"s_" + role for role in roles & {"p1", "p2"}}
    if plain:
        roles -= {"w_gate", "s_gate", "b_gate"}
    return Variant(activation, score, weights, tuple(role for role in ROLES if role in roles), x, w, p)


def make_tensors(variant: Variant, d: int, n: int, r: int = 8, seed: int = 0) -> Tensors:
    """Random tensors of unit-scale products, without tau."""
    rng = np.random.default_rng(seed)
    shapes = {"w_gate": (n, d), "w_up": (n, d), "w_down": (n, d), "b_gate": (n,), "b_up": (n,), "b_down": (d,), "p1": (r, d), "p2": (n, r), "res": (r, d)}
    out: Tensors = {}
    for role in variant.inputs:
        if role not in shapes:
            continue
        value = rng.standard_normal(shapes[role]) / (1 if role in ("w_down", "res") else shapes[role][-1] ** 0.5 if role[0] != "b" else 2)
        stored = variant.p if role in ("p1", "p2", "res") else "float32" if role[0] == "b" else variant.w if variant.weights == "float" else "int8"
        if stored == "int8":
            scale = np.abs(value).max(1) / 127
            out[("s_" if role[0] == "p" else "s") + (role if role[0] == "p" else role[1:])] = scale.astype(np.float32)
            value = np.rint(value / scale[:, None])
        out[role] = value.astype(stored)
    return out


def make_x(variant: Variant, shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(variant.x)


def with_tau(variant: Variant, x: np.ndarray, tensors: Tensors, keep: str | float, seed: int = 2) -> Tensors:
    """Adds a tau that keeps this share of the (token, neuron) pairs, or one neuron ("one"), with every score off the threshold.

    The one is the largest of the first token: where gate or up nearly cancel, a bound on the relative error would measure their condition.
    """
    if "tau" not in variant.inputs:
        return tensors
    n = tensors["w_up"].shape[0]
    s = np.sort(scores(variant, x, {**tensors, "tau": np.zeros(n, np.float32)}), axis=0)
    tokens = s.shape[0]
    if keep == "one":
        kept = np.where(np.arange(n) == np.abs(_activated(variant, x.astype(np.float64), tensors)[1][0]).argmax(), tokens, 0)
    else:
        kept = np.random.default_rng(seed).binomial(tokens, keep, n)
    edges = np.concatenate([s[:1] - 1, s, s[-1:] + 1])  # [tokens + 2, n]; tau lies in the middle of a gap
    columns = np.arange(n)
    tau = (edges[tokens - kept, columns] + edges[tokens - kept + 1, columns]) / 2
    return {**tensors, "tau": tau.astype(np.float32)}


def make_model(
    variant: Variant, tensors: Mapping[str, np.ndarray], x_rank: int = 2, fed: tuple[str, ...] = (), attributes: Mapping[str, str] | None = None
) -> bytes:
    """One node, its function body included; x and y are float32 outside (Cast inside for other dtypes), roles in `fed` are graph inputs."""
    d = [f"t{i}" for i in range(x_rank - 1)]
    width = tensors["w_down"].shape[-1]
    code = helper.np_dtype_to_tensor_dtype(np.dtype(variant.x))
    cast = variant.x != "float32"
    node = helper.make_node(NAME, ["x_cast" if cast else "x", *variant.inputs], ["y_cast" if cast else "y"], domain=DOMAIN, name="mlp")
    node.attribute.extend(helper.make_attribute(k, v) for k, v in (attributes or variant.attributes()).items())
    nodes = [node]
    if cast:
        nodes = [helper.make_node("Cast", ["x"], ["x_cast"], to=code), node, helper.make_node("Cast", ["y_cast"], ["y"], to=1)]
    inputs = [helper.make_tensor_value_info("x", 1, [*d, width])]
    inputs += [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(tensors[k].dtype), None) for k in fed]
    constants = [numpy_helper.from_array(tensors[k], k) for k in variant.inputs if k not in fed]
    graph = helper.make_graph(nodes, "graph", inputs, [helper.make_tensor_value_info("y", 1, [*d, width])], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function(variant)]).SerializeToString()


def open_model(model: bytes, native: bool = True, threads: int = 2) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if native:
        options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, x: np.ndarray, **fed: np.ndarray) -> np.ndarray:
    return session.run(None, {"x": x.astype(np.float32), **fed})[0]


def nmse(y: np.ndarray, expected: np.ndarray) -> float:
    difference = y.astype(np.float64) - expected
    return float((difference**2).sum() / max((expected**2).sum(), 1e-300))


def without_one(variant: Variant, x: np.ndarray, tensors: Tensors) -> np.ndarray | None:
    """The reference without the kept neuron of median contribution, the negative control of every bound; None if nothing contributes."""
    keep = active(variant, x, tensors)
    z = np.where(keep, _activated(variant, x.astype(np.float64), tensors)[1], 0)
    size = np.sqrt((z**2).sum(0)) * np.abs(tensors["w_down"].astype(np.float64)).sum(1)
    used = np.flatnonzero(size)
    if not used.size:
        return None
    down = tensors["w_down"].copy()
    down[used[np.argsort(size[used])[used.size // 2]]] = 0
    return reference(variant, x, {**tensors, "w_down": down})

"""One-node models of an op with its function body, sessions on them, and the builds of the CPU kernels."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import ml_dtypes  # noqa: F401 registers bfloat16 with numpy
import numpy as np
import onnxruntime as ort
from onnx import helper, numpy_helper

from sparsegate.runtime_onnx import library
from sparsegate.runtime_onnx.library import forced_isa as forced_isa

Tensors = dict[str, np.ndarray]

NODE = "node"


def make_model(
    op: ModuleType,
    variant: Any,
    tensors: Mapping[str, np.ndarray],
    *,
    x_rank: int = 2,
    fed: tuple[str, ...] = (),
    attributes: Mapping[str, str] | None = None,
    inputs: tuple[str, ...] | None = None,
    body: bool = True,
) -> bytes:
    """Model of one node; x and y are float32 outside (Cast inside for other dtypes).

    Roles in `fed` are graph inputs; `attributes` and `inputs` stand in place of the variant's.
    """
    free = [f"t{i}" for i in range(x_rank - 1)]
    roles = variant.inputs if inputs is None else inputs
    code = helper.np_dtype_to_tensor_dtype(np.dtype(variant.x))
    cast = variant.x != "float32"
    node = helper.make_node(
        op.NAME, ["x_cast" if cast else "x", *roles], ["y_cast" if cast else "y"], domain=op.DOMAIN, name=NODE
    )
    node.attribute.extend(
        helper.make_attribute(k, v) for k, v in (variant.attributes() if attributes is None else attributes).items()
    )
    nodes = [node]
    if cast:
        nodes = [
            helper.make_node("Cast", ["x"], ["x_cast"], to=code),
            node,
            helper.make_node("Cast", ["y_cast"], ["y"], to=1),
        ]
    given = [helper.make_tensor_value_info("x", 1, [*free, "d_in"] if x_rank else [])]
    given += [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(tensors[k].dtype), None) for k in fed]
    constants = [numpy_helper.from_array(tensors[k], k) for k in roles if k not in fed]
    graph = helper.make_graph(
        nodes, "graph", given, [helper.make_tensor_value_info("y", 1, [*free, "d_out"] if x_rank else [])], constants
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(op.DOMAIN, op.VERSION)]
    functions = [op.function(variant)] if body else []
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions).SerializeToString()


def open_model(model: bytes, native: bool = True, threads: int = 2) -> ort.InferenceSession:
    """A CPU session, with the library's kernels or the function body."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if native:
        options.register_custom_ops_library(str(library.library_path()))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, x: np.ndarray, **fed: np.ndarray) -> np.ndarray:
    """y in float32."""
    return session.run(None, {"x": x.astype(np.float32), **fed})[0]


def nmse(y: np.ndarray, expected: np.ndarray) -> float:
    """Energy of the difference relative to the expected energy."""
    difference = y.astype(np.float64) - expected
    return float((difference**2).sum() / max((expected**2).sum(), 1e-300))


def has_isa(name: str) -> bool:
    """Whether this machine and library have this build of the CPU kernels."""
    handle = library._open(library.library_path())
    found = bool(handle.sparsegate_force_isa(name.encode()))
    handle.sparsegate_force_isa(b"auto")
    return found

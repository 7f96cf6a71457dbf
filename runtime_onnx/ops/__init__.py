"""The ops of domain ai.sparsegate: each module holds an op's variants, its body in standard ONNX ops, its float64
reference and its bounds.
"""

from __future__ import annotations

OPS: dict[str, str] = {
    "gated_mlp": "sparsegate.runtime_onnx.ops.gated_mlp",
    "sparse_linear": "sparsegate.runtime_onnx.ops.sparse_linear",
}
"""Stem of every op -> module that describes it; the same stem names `csrc/<stem>.cc` and
`tests/runtime_onnx/test_<stem>.py`.
"""

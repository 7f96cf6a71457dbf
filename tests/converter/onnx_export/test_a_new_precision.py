"""A precision is a row: with a toy one, which no other row is, a graph is written, runs, and is what torch computes
with weights rounded so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gated_torch import BOUND, TOKENS, Gated, Tiny
from test_precision import torch_logits, write

from sparsegate.converter.onnx_export.base_graph import onnx_logits
from sparsegate.converter.onnx_export.matmul_nbits import open_float
from sparsegate.converter.onnx_export.precision import PRECISIONS, Precision
from sparsegate.runtime_onnx.library import variants


def test_a_row_makes_a_precision(tiny: Callable[[str], Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 weights, a predictor in bfloat16, and 4 bits in the rest."""
    one = tiny("llama")
    plan = Gated(one, "predictor", False).plan
    monkeypatch.setitem(PRECISIONS, "toy", Precision("toy", "int8_row", "float32", "bfloat16", 4, "fp16"))
    proto = write(one, plan, tmp_path / "toy", "toy")
    assert all("/int8_row/x=float32,w=float32,p=bfloat16/" in name for name in variants(tmp_path / "toy"))
    bits = {
        attribute.i
        for node in proto.graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "bits"
    }
    assert bits == {4}
    logits = onnx_logits(open_float(tmp_path / "toy"), TOKENS)
    assert np.abs(logits - torch_logits(one, plan, "toy")).max() < BOUND
    for other in ("int8", "int4", None):
        assert np.abs(logits - torch_logits(one, plan, other)).max() > 5 * BOUND, other

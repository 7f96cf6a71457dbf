"""The door to ONNX: a checkpoint folder becomes an ONNX folder. Weights, configuration, architecture and plan all come
from that folder, so what was edited there is in the graph.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from ...runtime_onnx.errors import InputError
from ..checkpoint.source import open_source
from ..checkpoint.sparsity import read_sparsity
from .base_graph import MODEL
from .emit import emissions
from .float_graph import check_same, float_graph, graph_header
from .gated_graph import gate_graph, save_graph
from .precision import PRECISIONS


def export(checkpoint: Path, out: Path, precision: str = "fp32", target: str = "cpu", base: Path | None = None) -> None:
    """Write the ONNX folder of a sparse checkpoint: the graph with the plan's sites gated, genai_config.json and the
    tokenizer's files.

    Args:
        checkpoint: A folder as `convert` writes it: config.json with the key "sparsity", safetensors, tokenizer.
        out: The ONNX folder, made if missing.
        precision: A row of PRECISIONS.
        target: cpu or cuda.
        base: Where the checkpoint's float graph is kept, or is to be: checkpoints of the same weights share one. None
            builds it in a temporary folder of 4 bytes a parameter.

    A float graph that is built is compared with torch. Raises InputError for a folder that is no sparse checkpoint, a
    plan that the ops cannot express, a model that onnxruntime-genai does not export rightly, a `base` that holds the
    graph of another checkpoint, `out` equal to it, and when the disk is full.
    """
    if base is not None and out.resolve() == base.resolve():
        raise InputError(
            f"The exported folder must be another one than the base graph's, got {out} for both. Choose another folder."
        )
    opened, (plan, _) = open_source(checkpoint, sparse=True), read_sparsity(checkpoint)
    arch, config, half = opened.arch, opened.config, PRECISIONS[precision].builder(target)
    emitted = emissions(plan, arch, config)
    if base is not None:
        check_same(base, graph_header(opened, half, target))
    with TemporaryDirectory() as scratch:
        graph = float_graph(opened, base or Path(scratch) / "base", half, target)
        model = ir.load(graph / MODEL)
        gate_graph(model, emitted, arch, config, precision, target)
        save_graph(model, graph, out)

"""The dense model in fewer bits, measured in the same run: what a sparse model has to be better than. The graphs are
made for it and thrown away.
"""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...runtime_onnx.bench.folders import BenchTiming, bench
from ...runtime_onnx.session import Decoder
from ...runtime_onnx.untrusted import read_json
from ..checkpoint.source import Source
from ..checkpoint.stage import Header, atomic_folder, is_finished, read_header, write_header, write_json
from ..evaluation.checks import QUALITY_WINDOWS
from ..evaluation.quality import measure_dense_executor
from ..evaluation.records import DenseReference
from ..modeling.gated import load_dense
from ..onnx_export.gated_graph import export_dense
from ..progress import resumed, stage
from .conversion import Conversion
from .graphs import Graphs, reference_base
from .texts import Texts

log = logging.getLogger("sparsegate")
PRECISIONS = ("int8", "int4")
PAIRS, PROMPT_TOKENS, NEW_TOKENS = 7, 64, 32
"""Of a timing beside the graph in fp32: a few, since only a large difference decides anything."""
_PRODUCTS = ("MatMul", "Gemm", "MatMulNBits")
_STAGE, _NUMBERS = "dense references", "references.json"


@dataclass(frozen=True)
class _Dense:
    """The dense model and its graph in fp32, and what exists already of its graph in one precision in integers: the
    folder and the loss.
    """

    source: Source
    graph: Path
    finished: dict[str, Graphs]


def measure_references(conversion: Conversion, graphs: Graphs, timed: bool) -> list[DenseReference]:
    """Loss and speed (where `timed`) of the dense reference's graphs in int8 and int4 against the one in fp32, a stage.
    None for another target than the CPU, nor where swapped activations leave no dense model at hand.
    """
    recipe, texts = conversion.recipe, conversion.texts
    if recipe.export.target != "cpu" or conversion.reference.swaps:
        return []
    graph = reference_base(conversion, graphs)
    parent = read_header(graph)
    assert parent is not None
    settings: dict[str, Any] = {
        "windows": QUALITY_WINDOWS,
        "pairs": PAIRS if timed else 0,
        "precision": recipe.export.precision,
    }
    folder = conversion.work / "references"
    header = Header(
        format="references", parents={"base": parent.fingerprint}, config=settings, calibration=texts.heldout.sha256
    )
    if is_finished(folder, header):
        resumed(_STAGE)
    else:
        finished = {recipe.export.precision: graphs} if graphs.loss is not None else {}
        with stage(_STAGE), atomic_folder(folder) as partial:
            references = _measure(_Dense(conversion.reference, graph, finished), texts, partial, timed)
            write_json(
                partial / _NUMBERS, {"references": [reference.model_dump(mode="json") for reference in references]}
            )
            write_header(partial, header)
    return [DenseReference.model_validate(row) for row in read_json(folder / _NUMBERS, "The references")["references"]]


def _measure(dense: _Dense, texts: Texts, scratch: Path, timed: bool) -> list[DenseReference]:
    references, whole = [], read_bytes(dense.graph)
    for precision in PRECISIONS:
        graphs = dense.finished.get(precision)
        folder = scratch / precision if graphs is None else graphs.dense
        if graphs is None:
            export_dense(dense.graph, folder, precision)
            loss = _loss(folder, dense.source, texts)
        else:
            loss = _known_loss(graphs)
        speed = _speed(dense.graph, folder, texts) if timed else {}
        size = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
        share = read_bytes(folder) / whole
        references.append(
            DenseReference.model_validate({"precision": precision, **loss, "bytes": size, "read_share": share, **speed})
        )
        if graphs is None:
            shutil.rmtree(folder)
    return references


def _loss(folder: Path, source: Source, texts: Texts) -> dict[str, Any]:
    """On the first QUALITY_WINDOWS windows. The torch model is gone before anything is timed, so that memory never
    holds three models.
    """
    total = measure_dense_executor(Decoder(folder), load_dense(source.folder), texts.heldout)
    nll_dense, nll, kl, agreement = total.means()
    error = total.error()
    return {
        "tokens": total.tokens,
        "nll_dense": nll_dense,
        "nll": nll,
        "nll_error": None if math.isinf(error) else error,
        "kl": max(kl, 0.0),
        "agreement": agreement,
    }


def _known_loss(graphs: Graphs) -> dict[str, Any]:
    """Of the graph that the candidates' speed is compared with, whose torch side is the dense model itself."""
    loss = graphs.loss
    assert loss is not None
    return {
        "tokens": loss.tokens,
        "nll_dense": loss.nll_torch,
        "nll": loss.nll,
        "nll_error": loss.nll_error if loss.windows > 1 else None,
        "kl": max(loss.kl, 0.0),
        "agreement": loss.agreement,
    }


def _speed(graph: Path, folder: Path, texts: Texts) -> dict[str, Any]:
    """Ratios to the graph in fp32, back to back; none where the machine was too busy to measure."""
    length = texts.heldout.tokens.shape[1]
    prompt = texts.heldout.tokens[0, : min(PROMPT_TOKENS, length // 2)].tolist()
    try:
        new = min(NEW_TOKENS, length - len(prompt) - 1)
        result = bench(graph, folder, BenchTiming(new_tokens=new, pairs=PAIRS), prompt, command="sparsegate convert")
    except ValueError as error:
        log.warning("The speed of a dense reference was not measured: %s", error)
        return {}
    return {
        "decode_ratio": result["decode"]["ratio"],
        "prefill_ratio": result["prefill"]["ratio"],
        "pairs": result["decode"]["pairs"],
        "disturbed": result["quiet"] is False,
    }


def read_bytes(folder: Path) -> int:
    """Bytes of a dense graph's weights that a token reads: those of its products, which are the blocks' linear maps and
    the output head.
    """
    model = ir.load(folder / "model.onnx")
    read = {
        value.name: value.const_value
        for node in model.graph
        if node.op_type in _PRODUCTS
        for value in node.inputs
        if value is not None
    }
    return sum(tensor.nbytes for tensor in read.values() if tensor is not None)

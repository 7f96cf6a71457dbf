"""The base graph of a model, and the ONNX folders of its candidates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import read_json
from ..checkpoint.source import Source, open_source
from ..checkpoint.stage import Header, atomic_folder, is_finished, read_header, write_header, write_json
from ..evaluation.agreement import check_dense_text, measure_shipped
from ..evaluation.checks import DENSE_WINDOWS, ExecutorQuality
from ..onnx_export.base_graph import check_base
from ..onnx_export.float_graph import float_graph, graph_header
from ..onnx_export.gated_graph import export_dense
from ..onnx_export.precision import PRECISIONS
from ..progress import resumed, stage
from .conversion import Conversion
from .recipe import Recipe

REFERENCE = "reference"
"""Where the graphs of the dense reference lie in the work folder, where the model was recovered from one."""
_NAMED = 16  # letters of a fingerprint


@dataclass(frozen=True)
class Graphs:
    """The graphs that the candidates of a conversion need.

    Attributes:
        base: The float graph that candidates are made from.
        dense: The dense one in their precision, which their speed is compared with. Floats of 16 bits on the CPU have
            the one in fp32, since ONNX Runtime has nothing faster there.
        loss: What `dense` loses, where it is in integers, something could run it and its function is a dense model's.
            Under swapped activations the float graph has the sizes of the dense source's, not its function.
    """

    base: Path
    dense: Path
    loss: ExecutorQuality | None = None


def make_graphs(conversion: Conversion) -> Graphs:
    """The dense graphs of a recipe's precision and target, each a stage; none before the one in fp32 is found to be the
    model. In integers it is the reference's. No model is held afterwards.
    """
    settings, models = conversion.recipe.export, conversion.models
    base = _float_graph(conversion, conversion.source, conversion.work)
    if PRECISIONS[settings.precision].bits is None:
        models.release()
        return Graphs(base, base)
    plain = base
    if conversion.recovered_from is not None:
        models.release()
        plain = _float_graph(conversion, conversion.recovered_from, conversion.work / REFERENCE)
    dense = _integer_graph(conversion, plain)
    loss = None if conversion.reference.swaps else _integer_loss(conversion, dense)
    models.release()
    return Graphs(base, dense, loss)


def reference_base(conversion: Conversion, graphs: Graphs) -> Path:
    """The graph in fp32 of the dense reference, for the CPU."""
    if conversion.recovered_from is None:
        return graphs.base
    base = make_base(conversion, conversion.recovered_from, conversion.work / REFERENCE)
    conversion.models.release()
    return base


def make_base(conversion: Conversion, source: Source, work: Path) -> Path:
    """The dense ONNX graph of a model below `work`, compared with torch before anything is built on it."""
    folder, heldout = work / "base", conversion.texts.heldout
    if is_finished(folder, graph_header(source)):
        resumed("base graph")
        return folder

    def check(graph: Path) -> None:
        model = conversion.models.stock(source)
        check_base(graph, model, heldout.tokens[heldout.mask.all(1)][:2, :32])
        check_dense_text(graph, model, heldout)

    with stage("base graph"):
        return float_graph(source, folder, check=check)


def graph_of(conversion: Conversion, graphs: Graphs, checkpoint: Path) -> Path:
    """Where the float graph of a checkpoint is, or is to be made: `graphs.base` where the weights are the source's."""
    settings = conversion.recipe.export
    half = PRECISIONS[settings.precision].builder(settings.target)
    header = graph_header(open_source(checkpoint, sparse=True), half, settings.target)
    if read_header(graphs.base) == header:
        return graphs.base
    return conversion.work / "bases" / header.fingerprint[:_NAMED]


def _float_graph(conversion: Conversion, source: Source, work: Path) -> Path:
    """A model's graph in floats for the recipe's target."""
    base, settings = make_base(conversion, source, work), conversion.recipe.export
    if settings.target == "cpu":
        return base
    conversion.models.release()  # the builder holds a model of its own
    half, folder = PRECISIONS[settings.precision].builder(settings.target), work / "base_cuda"
    if is_finished(folder, graph_header(source, half, settings.target)):
        resumed("base graph")
        return folder
    with stage("base graph"):  # its twin in fp32 was compared with torch
        return float_graph(source, folder, half, settings.target, check=lambda _: None)


def _integer_graph(conversion: Conversion, plain: Path) -> Path:
    """The dense graph in the recipe's integers, of the one in floats."""
    parent, settings = read_header(plain), conversion.recipe.export
    assert parent is not None
    folder = conversion.work / "dense"
    header = Header(format="dense", parents={"base": parent.fingerprint}, config=settings.model_dump(mode="json"))
    if is_finished(folder, header):
        resumed("base graph")
        return folder
    with stage("base graph"), atomic_folder(folder) as partial:
        export_dense(plain, partial, settings.precision, settings.target)
        write_header(partial, header)
    return folder


def _integer_loss(conversion: Conversion, dense: Path) -> ExecutorQuality | None:
    """What the dense graph in integers loses against the reference."""
    parent, recipe, heldout = read_header(dense), conversion.recipe, conversion.texts.heldout
    assert parent is not None
    folder = conversion.work / "quality_dense"
    header = Header(format="quality", parents={"onnx": parent.fingerprint}, calibration=heldout.sha256)
    if is_finished(folder, header):
        resumed("quality")
    else:
        with stage("quality"), atomic_folder(folder) as partial:
            model = conversion.models.stock(conversion.reference)
            windows = None if recipe.budget.bounded else DENSE_WINDOWS
            loss = measure_shipped(dense, model, heldout, recipe.export, count=windows)
            write_json(partial / "quality.json", {} if loss is None else loss.model_dump())
            write_header(partial, header)
    return stored_quality(read_json(folder / "quality.json", "The measured quality"))


def stored_quality(stored: dict[str, Any]) -> ExecutorQuality | None:
    """A quality as it was stored; nothing was measured where nothing is stored."""
    return ExecutorQuality(**stored) if stored else None


def room(recipe: Recipe, graphs: Graphs) -> Recipe:
    """The recipe with what its precision leaves of its budget. Raises InputError when the dense graph in that precision
    already breaks it.
    """
    loss, budget = graphs.loss, recipe.budget
    if loss is None or not budget.bounded:
        return recipe
    rise, left = math.exp(loss.nll - loss.nll_torch) - 1, {}
    if budget.max_ppl_increase is not None:
        left["max_ppl_increase"] = (1 + budget.max_ppl_increase) / (1 + max(rise, 0.0)) - 1
    if budget.max_kl is not None:
        left["max_kl"] = budget.max_kl - max(loss.kl, 0.0)
    if budget.max_kl_long is not None:  # what rounding costs hardly depends on the place
        left["max_kl_long"] = budget.max_kl_long - max(loss.kl, 0.0)
    if not all(value > 0 for value in left.values()):
        bounds = ", ".join(f"{name} {getattr(budget, name):.3g}" for name in left)
        raise InputError(
            f"The budget must leave room for {recipe.export.precision}, in which the dense graph alone raises "
            f"perplexity by {rise:.1%} and has KL "
            f"{loss.kl:.3g}, got {bounds}. Loosen it, or choose a precision of more bits."
        )
    return recipe.model_copy(update={"budget": budget.model_copy(update=left)})

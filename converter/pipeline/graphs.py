"""The base graph of a model, and the ONNX folders of its candidates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import read_json
from ..checkpoint.source import Source
from ..checkpoint.stage import Header, atomic_folder, is_finished, read_header, write_header, write_json
from ..evaluation.agreement import check_dense_text, measure_shipped
from ..evaluation.checks import DENSE_WINDOWS, ExecutorQuality
from ..onnx_export.base_graph import build_base, check_base, load_stock
from ..onnx_export.gated_graph import export_dense
from ..onnx_export.precision import PRECISIONS
from ..progress import resumed, stage
from .recipe import Recipe
from .texts import Texts


def make_base(source: Source, texts: Texts, work: Path) -> Path:
    """The dense ONNX graph, compared with torch before anything is built on it."""
    folder, header = work / "base", Header(format="base", parents={"model": source.fingerprint})
    if not is_finished(folder, header):
        with stage("base graph"), atomic_folder(folder) as partial:
            build_base(source.folder, partial)
            model = load_stock(source.folder)
            check_base(partial, model, texts.heldout.tokens[texts.heldout.mask.all(1)][:2, :32])
            check_dense_text(partial, model, texts.heldout)
            write_header(partial, header)
    else:
        resumed("base graph")
    return folder


@dataclass(frozen=True)
class Graphs:
    """The float graph that candidates are made from; the dense one in their precision, which their speed is compared
    with (fp16 and bf16 on the CPU: fp32, since ONNX Runtime has nothing faster there); and what that one loses, where
    it is in integers, something could run it and its function is a dense model's: under swapped activations the float
    graph has the sizes of the dense source's, not its function.
    """

    base: Path
    dense: Path
    loss: ExecutorQuality | None = None


def make_graphs(source: Source, texts: Texts, recipe: Recipe, work: Path, original: Source | None = None) -> Graphs:
    """The dense graphs of a recipe's precision and target, each a stage below `work`; none before the one in fp32 is
    found to be the model.

    `original` is the dense model that `source` was recovered from, where it was: the dense graph in integers is then
    made of it.
    """
    base, asked = _float_graph(source, texts, recipe, work), recipe.export
    if PRECISIONS[asked.precision].bits is None:
        return Graphs(base, base)
    model, plain = (
        (source, base) if original is None else (original, _float_graph(original, texts, recipe, work / "original"))
    )
    parent = read_header(plain)
    assert parent is not None
    dense, header = (
        work / "dense",
        Header(format="dense", parents={"base": parent.fingerprint}, config=asked.model_dump(mode="json")),
    )
    if not is_finished(dense, header):
        with stage("base graph"), atomic_folder(dense) as partial:
            export_dense(plain, partial, asked.precision, asked.target)
            write_header(partial, header)
    else:
        resumed("base graph")
    if model.swaps:
        return Graphs(base, dense)
    folder, header = (
        work / "quality_dense",
        Header(format="quality", parents={"onnx": header.fingerprint}, calibration=texts.heldout.sha256),
    )
    if not is_finished(folder, header):
        with stage("quality"), atomic_folder(folder) as partial:
            windows = None if recipe.budget.bounded else DENSE_WINDOWS
            found = measure_shipped(dense, load_stock(model.folder), texts.heldout, asked, count=windows)
            write_json(partial / "quality.json", {} if found is None else found.model_dump())
            write_header(partial, header)
    else:
        resumed("quality")
    return Graphs(base, dense, stored_quality(read_json(folder / "quality.json", "The measured quality")))


def _float_graph(source: Source, texts: Texts, recipe: Recipe, work: Path) -> Path:
    """A model's graph in floats for the recipe's target."""
    base, asked = make_base(source, texts, work), recipe.export
    if asked.target == "cpu":
        return base
    form = PRECISIONS[asked.precision]
    base, header = (
        work / "base_cuda",
        Header(format="base", parents={"model": source.fingerprint}, config={"precision": form.cuda, "target": "cuda"}),
    )
    if not is_finished(base, header):
        with stage("base graph"), atomic_folder(base) as partial:
            build_base(source.folder, partial, form.cuda, "cuda")
            write_header(partial, header)
    else:
        resumed("base graph")
    return base


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
    if not all(value > 0 for value in left.values()):
        asked = ", ".join(f"{name} {getattr(budget, name):.3g}" for name in left)
        raise InputError(
            f"The budget must leave room for {recipe.export.precision}, in which the dense graph alone raises "
            f"perplexity by {rise:.1%} and has KL "
            f"{loss.kl:.3g}, got {asked}. Loosen it, or choose a precision of more bits."
        )
    return recipe.model_copy(update={"budget": budget.model_copy(update=left)})

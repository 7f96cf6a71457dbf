"""What is made of a model whose activation was swapped or whose weights were trained: dense means the source, budgets
are the source's, and it can be tuned again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import TEXT, make_model
from small_recipe import small_recipe

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Exact, Plan, SitePlan, Swap, Threshold, load_plan, uniform_tau
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.checkpoint.writer import write_checkpoint
from sparsegate.converter.evaluation.checks import ExecutorQuality
from sparsegate.converter.evaluation.records import RESULTS, Report
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.onnx_export import float_graph
from sparsegate.converter.pipeline import candidates, fingerprint, graphs
from sparsegate.converter.pipeline import convert as conversion
from sparsegate.converter.pipeline import texts as texts_module
from sparsegate.converter.pipeline.configs import method_configs
from sparsegate.converter.pipeline.conversion import Conversion, Loaded
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.recipe import Recipe, read_recipe
from sparsegate.converter.pipeline.schedule import once
from sparsegate.converter.pipeline.search import Judge
from sparsegate.converter.pipeline.texts import make_texts
from sparsegate.converter.pipeline.tune import tune
from sparsegate.converter.text.windows import make_batches
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.untrusted import read_json

TRAIN = {
    "steps": 3,
    "windows": 4,
    "precision": "fp32",
    "data": {"windows": 8, "length": 24},
    "penalty": {"density": 0.2},
}
LAST = {"method": "exact"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_speed", lambda base, onnx, texts: {})
    monkeypatch.setattr(texts_module, "SEARCH_WINDOWS", 16)


def swapped(model: Path, out: Path, activation: str = "drelu") -> Path:
    """The same weights under another activation."""
    out.mkdir(parents=True)
    source = open_source(model)
    write_checkpoint(
        source, {site: SitePlan((Swap(activation),), Exact()) for site in source.arch.sites(source.config)}, out
    )
    return out


def trained(
    model: Path,
    folder: Path,
    activation: str | None,
    last: dict[str, Any] | None = None,
    rate: float = 2e-3,
    **changes: Any,
) -> Path:
    config = {} if activation is None else {"activation": activation}
    return small_recipe(
        model,
        folder,
        stages=[{"method": "exact", "config": config, "tune": TRAIN | {"rate": rate}}, *([last] if last else [])],
        **changes,
    )


def test_a_swapped_model_is_tuned_to_another_activation(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = swapped(tiny_model("llama"), tmp_path / "relu", "fatrelu(0.25)")
    out = tune(output=tmp_path / "out", recipe=trained(folder, tmp_path, "drelu")).folder
    assert open_source(out).swaps.keys() == {Site(0), Site(1)} and {
        swap.activation("") for swap in open_source(out).swaps.values()
    } == {"drelu"}
    raw = read_json(out / "config.json", "config")
    assert (
        raw["model_type"] == "sparsegate_llama"
        and raw["sparsity"]["base_activation"] == "silu"
        and raw["hidden_act"] == "sparsegate"
    )


def test_a_relu_model_is_tuned_as_it_is(tmp_path: Path) -> None:
    stock = make_model("llama", tmp_path / "model", hidden_act="relu")
    out = tune(output=tmp_path / "out", recipe=trained(stock, tmp_path, None)).folder
    raw, found = read_json(out / "config.json", "config"), open_source(out)
    assert (
        raw["model_type"] == "llama"
        and raw["hidden_act"] == "relu"
        and found.swaps == {}
        and found.arch.activation(found.config) == "relu"
    )
    assert {site["score"] for site in raw["sparsity"]["sites"].values()} == {"exact"}


def test_integers_of_the_dense_graph_are_the_dense_source_s(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense_source, source = (
        open_source(tiny_model("llama")),
        open_source(swapped(tiny_model("llama"), tmp_path / "swapped")),
    )
    measured: list[Path] = []
    loss = ExecutorQuality(tokens=1, nll_torch=1.0, nll=1.25, kl=0.5, agreement=1.0)
    monkeypatch.setattr(float_graph, "build_base", lambda folder, out, *_: (out / "of").write_text(str(folder)))
    monkeypatch.setattr(graphs, "check_base", lambda *_: 0.0)
    monkeypatch.setattr(graphs, "check_dense_text", lambda *_: None)
    monkeypatch.setattr(
        graphs, "export_dense", lambda base, out, *_: (out / "of").write_text((base / "of").read_text())
    )
    monkeypatch.setattr(Loaded, "stock", lambda _, source: source.folder)
    monkeypatch.setattr(graphs, "measure_shipped", lambda onnx, model, *_, **__: measured.append(model) or loss)
    recipe = read_recipe(
        small_recipe(source.folder, tmp_path, stages=[LAST], export={"precision": "int8", "target": "cpu"})
    )
    texts = make_texts(source, recipe)
    found = graphs.make_graphs(Conversion(source, texts, recipe, tmp_path / "recovered", recovered_from=dense_source))
    assert [(folder / "of").read_text() for folder in (found.base, found.dense)] == [
        str(source.folder),
        str(dense_source.folder),
    ]
    assert found.loss == loss and measured == [dense_source.folder]
    alone = graphs.make_graphs(Conversion(source, texts, recipe, tmp_path / "alone"))
    assert alone.loss is None and measured == [dense_source.folder], (
        "no dense model is known, and that graph computes with the base's activation"
    )


@pytest.mark.slow
def test_the_dense_row_of_integers_is_the_dense_source(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    export = {"precision": "int8", "target": "cpu"}
    convert(
        output=tmp_path / "out", recipe=trained(tiny_model("llama"), tmp_path, "drelu", LAST, rate=0.05, export=export)
    )  # weights far from the source's
    report = Report.load(tmp_path / "out" / RESULTS)
    rows = {row.model: row for row in report.onnx}
    assert rows["dense"].kl < 0.05 and rows["dense"].nll == pytest.approx(report.dense.nll, abs=0.05)
    assert rows["sparse"].kl > 2 * rows["dense"].kl, "the swap costs more than the rounding"


def test_a_budget_is_the_dense_source_s(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    dense_source, source = (
        open_source(tiny_model("llama")),
        open_source(swapped(tiny_model("llama"), tmp_path / "swapped")),
    )
    plan: Plan = {Site(1): SitePlan(gate=Threshold("gate", uniform_tau(0.2, 176), 0.5))}
    batches = make_batches(source.tokenizer(), TEXT, 4, 48, 0)
    dense, model = load_dense(dense_source.folder), load_dense(source.folder)
    against, own = (
        Judge(model, source.arch, "silu", batches, reference_model=each).loss(plan) for each in (dense, None)
    )
    none = Judge(model, source.arch, "silu", batches, reference_model=dense).loss(
        {Site(0): SitePlan((Swap("drelu"),), Exact())}
    )
    assert none.kl > 0.01, "the swap alone costs something"
    assert against.kl > own.kl + 0.01 and against.nll != own.nll
    recipe = read_recipe(small_recipe(source.folder, tmp_path, stages=[LAST], budget={"max_kl": none.kl / 4}))
    texts, configs = make_texts(source, recipe), method_configs(recipe, True)
    with pytest.raises(InputError, match="none of exact within it"):
        once(Conversion(source, texts, recipe, tmp_path / "work", recovered_from=dense_source), configs)
    assert list(once(Conversion(source, texts, recipe, tmp_path / "alone"), configs)) == ["exact"]


@pytest.mark.parametrize("changes", [pytest.param({"budget": {"max_kl": 0.2}}, marks=pytest.mark.slow), {}])
def test_inputs_are_skipped_beside_swapped_networks(
    changes: dict[str, Any], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Linears inside a network that keeps what is not zero are left to it."""
    source = open_source(swapped(tiny_model("llama"), tmp_path / "swapped"))
    config = {"greedy": False} if changes else {"greedy": False, "sparsity": 0.4}
    recipe = read_recipe(
        small_recipe(source.folder, tmp_path, stages=[{"method": "teal", "config": config}], **changes)
    )
    conversion_of = Conversion(source, make_texts(source, recipe), recipe, tmp_path / "work")
    plan = once(conversion_of, method_configs(recipe, True))["teal"].plan
    assert [site.kind for site in plan] == 2 * ["ffn", *(f"linear:{x}_proj" for x in "qkvo")]
    assert all(plan[Site(layer)].edits and plan[Site(layer)].gating.density < 0.9 for layer in range(2))
    assert load_plan(tmp_path / "work" / "plan" / "teal").keys() == plan.keys()


def test_another_text_of_a_mixture_is_another_conversion(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text(TEXT * 4, encoding="utf-8")
    data = {"windows": 8, "length": 24, "mixture": [{"name": "own", "share": 1.0, "files": [str(text)]}]}

    def asked(**changes: Any) -> Recipe:
        stages = [{"method": "exact", "config": {"activation": "drelu"}, "tune": TRAIN | {"data": data} | changes}]
        return read_recipe(small_recipe(tiny_model("llama"), tmp_path, stages=stages))

    before, again = (fingerprint.conversion_fingerprint("model", asked(), {}) for _ in range(2))
    text.write_text(TEXT * 4 + "new", encoding="utf-8")
    assert before == again != fingerprint.conversion_fingerprint("model", asked(), {})
    with pytest.raises(InputError, match=r"convert must train in one process, got parallel fsdp\."):
        conversion._recovered(open_source(tiny_model("llama")), asked(parallel="fsdp"), tmp_path / "work", "cpu")

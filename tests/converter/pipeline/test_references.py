"""The dense models of fewer bits, measured in a conversion: against torch, never built twice, resumed, and what is left
out where nothing can be said.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from small_recipe import call_cli, small_recipe

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Exact, Plan, SitePlan, Swap, Threshold, uniform_tau
from sparsegate.converter.checkpoint.source import Source, open_source
from sparsegate.converter.evaluation.checks import QUALITY_WINDOWS, Quality
from sparsegate.converter.evaluation.records import RESULTS, Report
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.onnx_export.precision import Export
from sparsegate.converter.pipeline import candidates, record, references
from sparsegate.converter.pipeline import convert as conversion
from sparsegate.converter.pipeline.candidates import Candidate
from sparsegate.converter.pipeline.conversion import Conversion
from sparsegate.converter.pipeline.graphs import Graphs, make_graphs
from sparsegate.converter.pipeline.recipe import read_recipe
from sparsegate.converter.pipeline.references import measure_references, read_bytes
from sparsegate.converter.pipeline.texts import Texts, make_texts
from sparsegate.runtime_onnx.bench.folders import BenchTiming

Make = Callable[[str], Path]


class Case(NamedTuple):
    """What a conversion hands over."""

    conversion: Conversion
    graphs: Graphs

    @property
    def source(self) -> Source:
        return self.conversion.source

    @property
    def texts(self) -> Texts:
        return self.conversion.texts

    @property
    def work(self) -> Path:
        return self.conversion.work

    def but(self, **changes: Any) -> Case:
        """The same with another part of the conversion."""
        return self._replace(conversion=replace(self.conversion, **changes))

    def measure(self, timed: bool = False) -> list[Any]:
        return measure_references(self.conversion, self.graphs, timed)


def case_of(precision: str, model: Path, folder: Path) -> Case:
    source, recipe = open_source(model), read_recipe(small_recipe(model, folder, export={"precision": precision}))
    texts, work = make_texts(source, recipe), folder / "work"
    conversion = Conversion(source, texts, recipe, work)
    return Case(conversion, make_graphs(conversion))


@pytest.fixture(scope="module")
def fp32(tiny_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of("fp32", tiny_model("llama"), tmp_path_factory.mktemp("fp32"))


def no_export(*_: object) -> None:
    raise AssertionError("a graph was built")


def test_losses_are_those_beside_torch_on_the_same_windows(fp32: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    int8, int4 = fp32.measure()
    assert (int8.precision, int4.precision) == ("int8", "int4")
    heldout, model = fp32.texts.heldout, load_dense(fp32.source.folder)
    rows = [
        row[mask] for row, mask in zip(heldout.tokens[:QUALITY_WINDOWS], heldout.mask[:QUALITY_WINDOWS], strict=True)
    ]
    with torch.no_grad():
        chances = [
            model(input_ids=row[None]).logits[0, :-1].double().log_softmax(-1).gather(1, row[1:, None]) for row in rows
        ]
    nll = -torch.cat(chances).mean().item()
    for reference in (int8, int4):
        assert reference.nll_dense == pytest.approx(nll, abs=1e-5) and reference.tokens == sum(
            len(row) - 1 for row in rows
        )
        assert reference.nll_error > 0 and reference.decode_ratio is None and reference.pairs is None
    assert 0 < int8.kl < int4.kl and int4.read_share < int8.read_share < 0.3 and int4.bytes < int8.bytes
    assert {path.name for path in (fp32.work / "references").iterdir()} == {"header.json", "references.json"}, (
        "the graphs are thrown away"
    )
    monkeypatch.setattr(references, "export_dense", no_export)
    assert fp32.measure() == [int8, int4], "found finished"


def test_a_graph_that_is_there_is_not_built_again(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, built, export_dense = case_of("int4", tiny_model("llama"), tmp_path), [], references.export_dense
    monkeypatch.setattr(
        references,
        "export_dense",
        lambda base, out, precision: (built.append(precision), export_dense(base, out, precision)),
    )
    int8, int4 = case.measure()
    loss = case.graphs.loss
    assert built == ["int8"] and loss is not None and case.graphs.dense.is_dir()
    assert (int4.nll, int4.nll_dense, int4.kl, int4.tokens) == (loss.nll, loss.nll_torch, loss.kl, loss.tokens)
    assert loss.nll_dense == pytest.approx(loss.nll_torch) and len(loss.rises) == loss.windows
    assert sum(rise for _, rise in loss.rises) / loss.tokens == pytest.approx(loss.nll - loss.nll_torch, abs=1e-9)
    assert int8.read_share > int4.read_share


def test_speeds_are_ratios_to_the_graph_in_fp32(fp32: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[Path, str]] = []

    def bench(baseline: Path, candidate: Path, timing: BenchTiming, prompt: list[int], command: str) -> dict[str, Any]:
        timed.append((baseline, candidate.name))
        assert (candidate / "model.onnx").is_file() and len(prompt) + timing.new_tokens < 48
        if candidate.name == "int4":
            raise ValueError("too busy")
        return {"decode": {"ratio": 1.5, "pairs": 7}, "prefill": {"ratio": 0.9}, "quiet": False}

    monkeypatch.setattr(references, "bench", bench)
    int8, int4 = fp32.but(work=tmp_path).measure(timed=True)
    assert timed == [(fp32.graphs.base, "int8"), (fp32.graphs.base, "int4")]
    assert (int8.decode_ratio, int8.prefill_ratio, int8.pairs, int8.disturbed) == (1.5, 0.9, 7, True)
    assert int4.decode_ratio is None and int4.disturbed is False and int4.kl > 0


def test_nothing_is_measured_where_nothing_can_be_said(
    fp32: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "export_dense", no_export)
    cuda = fp32.conversion.recipe.model_copy(update={"export": Export(precision="fp16", target="cuda")})
    assert fp32.but(recipe=cuda, work=tmp_path).measure() == []
    swapped = replace(fp32.source, swaps={Site(0): SitePlan((Swap("drelu"),), Exact(0.5, 0.5))})
    assert fp32.but(source=swapped, work=tmp_path).measure() == []


def test_bytes_that_a_token_reads(fp32: Case) -> None:
    blocks, head = record.decoder_values(fp32.source.arch, fp32.source.config)
    matrices = [
        tensor
        for name, tensor in load_dense(fp32.source.folder).state_dict().items()
        if "layers" in name and tensor.dim() == 2
    ]
    assert blocks == sum(tensor.numel() for tensor in matrices)
    assert read_bytes(fp32.graphs.base) == 4 * (blocks + head)


def test_shares_of_a_file(fp32: Case) -> None:
    blocks, head = record.decoder_values(fp32.source.arch, fp32.source.config)
    network = 3 * 64 * 176
    plan: Plan = {Site(0): SitePlan(gate=Threshold("gate", uniform_tau(0.1, 176), 0.25))}
    quality = Quality(
        tokens=1,
        nll_dense=1.0,
        nll=1.0,
        kl=0.0,
        agreement=1.0,
        density=0.25,
        cost=0.75,
        block_cost=1 - network / blocks / 2,
        site_density={"layers.0.ffn": 0.25},
        site_cost={"layers.0.ffn": 0.5},
    )
    chosen = Candidate("gate", plan, 0.75, quality, [], fp32.source)
    whole = 4 * (blocks + head)
    for precision, bytes_of_network in (("fp32", 2 * network), ("fp16", network)):
        shares = record._file_shares(chosen, fp32.graphs, fp32.source, Export(precision=precision))
        assert shares == {"dense": 1.0, "sparse": pytest.approx((whole - 4 * network + bytes_of_network) / whole)}
    assert record._read_share(chosen, fp32.source) == pytest.approx((whole - 2 * network) / whole)


def test_a_conversion_shows_them_and_ends_with_the_verdict(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(conversion, "measure_references", measure_references)
    monkeypatch.setattr(candidates, "_speed", lambda base, onnx, texts: {})
    done = call_cli(capsys, "convert", "--recipe", small_recipe(tiny_model("llama"), tmp_path), "-o", tmp_path / "out")
    assert done.status == 0, done.err
    report = Report.load(tmp_path / "out" / RESULTS)
    assert [reference.precision for reference in report.references] == ["int8", "int4"]
    assert report.chosen.nll_error and math.isclose(
        report.chosen.read_share or 0, 1 - (1 - (report.chosen.block_cost or 0)) * _blocks_share(tiny_model)
    )
    last = done.out.strip().splitlines()[-1]
    assert last.startswith("Reads 0.") and last.endswith("speed was not measured.") and "(± " in last
    assert "decode / fp32" in done.out
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (
        f"**{last}**" in card
        and "| dense | int4 |" in card
        and (tmp_path / "out" / "report" / "candidates.png").is_file()
    )
    again = json.loads(
        call_cli(capsys, "convert", "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--json").out
    )
    assert again["verdict"]["sentence"] == last and again["up_to_date"] is True


def _blocks_share(tiny_model: Make) -> float:
    source = open_source(tiny_model("llama"))
    blocks, head = record.decoder_values(source.arch, source.config)
    return blocks / (blocks + head)

"""Oracle labels against scores computed window by window, and a deployable predictor that learns them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCAB
from plan_checks import gates
from small_recipe import small_recipe
from torch import Tensor

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Predictor, load_plan
from sparsegate.converter.checkpoint.source import Source, open_source
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.modeling.gradients import AttributionSettings, attribute
from sparsegate.converter.pipeline import candidates
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.verify import verify
from sparsegate.converter.stats import oracle as labels
from sparsegate.converter.stats.collect import collect, drop_samples
from sparsegate.converter.stats.oracle import collect_labels
from sparsegate.converter.text.windows import Batches

CORRECTED, GXO = "samples:corrected_gxo", "samples:gxo"
Stats = Mapping[Site, Mapping[str, Tensor]]


@pytest.fixture(scope="module", name="source")
def _source(tiny_model: Callable[[str], Path]) -> Source:
    return open_source(tiny_model("llama"))


@pytest.fixture(scope="module", name="model")
def _model(source: Source) -> Any:
    return load_dense(source.folder)


@pytest.fixture(scope="module", name="batches")
def _batches() -> Batches:
    """Windows of which the second and the last are padded."""
    tokens = torch.randint(3, VOCAB, (6, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 9:] = mask[5, 3:] = False
    return Batches(tokens, mask)


@pytest.fixture(scope="module", name="found")
def _found(model: Any, source: Source, batches: Batches, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    return collect_labels(model, source, batches, [CORRECTED, GXO], tmp_path_factory.mktemp("labels"), seed=0)


def by_hand(model: Any, source: Source, batches: Batches) -> dict[Site, tuple[Tensor, Tensor, Tensor]]:
    """Inputs [T, d], corrected GxO and GxO [T, n] of every site, one window at a time without its padding."""
    seen: dict[Site, list[tuple[Tensor, Tensor, Tensor]]] = {}
    inputs: dict[int, Tensor] = {}
    for row, mask in zip(batches.tokens, batches.mask, strict=True):
        handles = [
            b.mlp.register_forward_pre_hook(lambda _, x, k=k: inputs.update({k: x[0][0]}))
            for k, b in enumerate(model.model.layers)
        ]
        with torch.no_grad():
            logits = model(input_ids=row[mask][None]).logits
        for handle in handles:
            handle.remove()
        entered = dict(inputs)
        sites = attribute(
            model,
            source.arch,
            row[mask][None],
            AttributionSettings(kinds=("ffn",), recompute=False),
            labels=logits.argmax(-1),
        ).sites
        for site, (value, grad, _) in sites.items():
            z, g = value[0], grad[0]
            gxo = -z * g
            seen.setdefault(site, []).append(
                (entered[site.layer], gxo + z.abs() * g.square().sum(-1, keepdim=True).sqrt() / 2, gxo)
            )
    return {
        site: (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts]))
        for site, parts in seen.items()
    }


def test_labels_equal_scores_window_by_window(found: Stats, model: Any, source: Source, batches: Batches) -> None:
    expected = by_hand(model, source, batches)
    assert set(found) == set(expected) == {Site(0), Site(1)}
    for site, (x, corrected, gxo) in expected.items():
        assert len(x) == batches.count
        for name, score in ((CORRECTED, corrected), (GXO, gxo)):
            stored = found[site][f"{name}.score"].float()
            torch.testing.assert_close(found[site][f"{name}.x"].float(), x, rtol=1e-3, atol=1e-5)
            least = score.amin(1, keepdim=True)
            torch.testing.assert_close(
                stored, (score - least) / (score - least).amax(1, keepdim=True), rtol=2e-3, atol=1e-4
            )
            assert bool((stored.amin(1) == 0).all()) and bool((stored.amax(1) == 1).all())
            ordered = stored.gather(1, score.argsort(1))
            assert float((ordered[:, :-1] - ordered[:, 1:]).max()) < 2e-3, "the order is the score's"
            kept, wanted = (torch.zeros_like(s).scatter_(1, s.topk(70, dim=1).indices, 1.0) for s in (stored, score))
            assert float((kept * wanted).sum() / wanted.sum()) > 0.98
        rows = gxo.argsort(1)
        ordered = found[site][f"{CORRECTED}.score"].float().gather(1, rows)
        assert float((ordered[:, :-1] - ordered[:, 1:]).max()) > 0.1, "another score has another order"


def test_labels_are_those_of_the_inputs_that_other_samples_have(
    found: Stats, source: Source, batches: Batches, tmp_path: Path
) -> None:
    """The same tokens in the same order as statistics of one forward, whose walk goes block by block."""
    plain = collect(source, batches, ["samples:magnitude"], tmp_path, seed=0)
    for site in found:
        torch.testing.assert_close(
            found[site][f"{CORRECTED}.x"].float(), plain[site]["samples:magnitude.x"].float(), rtol=1e-3, atol=1e-4
        )
        assert (found[site][f"{CORRECTED}.score"] - plain[site]["samples:magnitude.score"]).abs().max() > 0.1


def test_labels_are_made_once_and_again_when_they_were_dropped(
    model: Any, source: Source, batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, plain = [], labels.attribute
    monkeypatch.setattr(labels, "attribute", lambda *given, **named: runs.append(1) or plain(*given, **named))

    def stored(seed: int = 0) -> Tensor:
        return collect_labels(model, source, batches, [CORRECTED], tmp_path, seed)[Site(1)][f"{CORRECTED}.score"]

    first = stored()
    assert len(runs) == 1 and torch.equal(stored(), first) and len(runs) == 1
    drop_samples(tmp_path)
    assert torch.equal(stored(), first) and len(runs) == 2
    stored(seed=1)
    assert len(runs) == 3, "another seed is another sample"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_oracle_becomes_deployable(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_speed", lambda base, onnx, texts: {})
    config = {
        "sparsity": 0.4,
        "loss": "cross_entropy",
        "score": "corrected_gxo",
        "steps": 120,
        "batch": 128,
        "rank": 24,
    }
    result = convert(
        recipe=small_recipe(source.folder, tmp_path, stages=[{"method": "predictor", "config": config}]),
        output=tmp_path / "out",
        keep_stages=True,
    )
    assert result.report is not None
    (row,) = (row for row in result.report.rows if row.method == "predictor")
    assert row.selected and abs(row.density - 0.6) < 0.05
    plan = load_plan(tmp_path / "out.work" / "plan" / "predictor")
    for entry in gates(plan).values():
        assert isinstance(entry, Predictor) and entry.recall is not None and entry.recall > 0.62, "better than chance"
    assert verify(tmp_path / "out", calibration=tmp_path / "text.txt").passed
    assert not list((tmp_path / "out.work").rglob("samples.*.safetensors")), "stored activations go"

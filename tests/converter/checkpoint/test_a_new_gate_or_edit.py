"""A kind of gate or of edit is its class and one row in each consumer's table: a toy gate is stored in a plan and in a
checkpoint, counted, executed and emitted, and a toy edit before it changes what the network computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from plan_checks import same
from torch import Tensor

from sparsegate.converter.arch import load_arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint import cost, plan, sparsity
from sparsegate.converter.checkpoint.plan import Plan, SitePlan, Swap, Threshold
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.checkpoint.stage import Header
from sparsegate.converter.checkpoint.writer import write_checkpoint
from sparsegate.converter.modeling import gated
from sparsegate.converter.modeling.gated import apply_plan, load, load_dense
from sparsegate.converter.onnx_export import emit
from sparsegate.runtime_onnx.errors import InputError

N = 176
TOKENS = torch.randint(3, 290, (2, 12), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Negative:
    """Keep unit i when -|act(gate_i)| > tau_i: what a threshold on the gate skips."""

    ROLES: ClassVar[dict[str, str]] = {"tau": "tau"}
    score: ClassVar[str] = "negative"
    tau: Tensor
    density: float


@dataclass(frozen=True)
class Double(Swap):
    """The site computes with its activation as it is; its weights are read twice."""

    activation: str = "silu"


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class and the rows that converter/README.md names."""
    monkeypatch.setitem(plan.GATES, "negative", Negative)
    monkeypatch.setitem(sparsity.FIELDS, "negative", {"score", "activation", "density"})
    monkeypatch.setitem(sparsity.SCORES[2], "ffn", (*sparsity.SCORES[2]["ffn"], "negative"))
    monkeypatch.setitem(sparsity.SCORES[1], "ffn", (*sparsity.SCORES[1]["ffn"], "negative"))
    monkeypatch.setitem(sparsity.WRITERS, Negative, lambda gate: {})
    monkeypatch.setitem(sparsity.READERS, "negative", lambda stored: (Negative(stored.tau(), stored.density), None))
    monkeypatch.setitem(cost.COSTS, Negative, lambda gate, size, density, opened: density)
    monkeypatch.setitem(gated.EXECUTORS, Negative, lambda gate, parts, x: (-parts.gate.abs(), None))
    monkeypatch.setitem(emit.EMITTERS, Negative, lambda gate: emit.Emission("negative", {"tau": gate.tau.numpy()}))


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The edit's class and rows."""
    monkeypatch.setitem(plan.EDITS, "double", Double)
    monkeypatch.setattr(plan, "check_exact", lambda activation: None)
    monkeypatch.setitem(cost.EDIT_COSTS, Double, lambda edit, size: 2.0)
    monkeypatch.setitem(gated.EDITORS, Double, lambda module, edit: None)
    monkeypatch.setitem(emit.EDIT_EMITTERS, Double, lambda emission, edit: emission)


def make_plan() -> Plan:
    tau = -0.1 - torch.rand(N, generator=torch.Generator().manual_seed(1))
    return {Site(layer): SitePlan((), Negative(tau, 0.4)) for layer in range(2)}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_without_its_rows_it_is_refused(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"kind": "negative", "density": 0.4}
    with pytest.raises(InputError, match="kind of gate must be one of exact, predictor, threshold, got 'negative'"):
        plan.make_site_plan([], fields, {"tau": torch.zeros(N)})
    with pytest.raises(InputError, match="score of layers.0.ffn must be one of .*, got 'negative'"):
        sparsity.encode(make_plan(), "silu")


def test_a_gate_goes_through_every_consumer(
    rows: None, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, arch = make_plan(), load_arch("llama")
    plan.save_plan(tmp_path / "plan" if (tmp_path / "plan").mkdir() is None else tmp_path, made, Header(format="plan"))
    assert all(same(entry, made[site]) for site, entry in plan.load_plan(tmp_path / "plan").items())
    (tmp_path / "out").mkdir()
    write_checkpoint(open_source(tiny_model("llama")), made, tmp_path / "out")
    stored, _ = sparsity.read_sparsity(tmp_path / "out")
    assert all(same(entry, stored[site]) for site, entry in made.items())
    assert cost.mlp_cost(made, arch, load_dense(tiny_model("llama")).config) == pytest.approx(0.4)
    emission = emit.emit(Site(0), made[Site(0)], 64, N)
    assert emission.score == "negative" and list(emission.tensors) == ["tau"]
    kept = logits(load(tmp_path / "out"))
    opposite = {
        site: SitePlan((), Threshold("gate", -entry.gating.tau, 0.6))  # type: ignore[union-attr]
        for site, entry in make_plan().items()
    }
    other = logits(apply_plan(load_dense(tiny_model("llama")), opposite, arch, "silu"))
    dense = logits(load_dense(tiny_model("llama")))
    assert float((kept - other).abs().max()) > 0.1 and float((kept - dense).abs().max()) > 0.1
    module = load(tmp_path / "out").model.layers[0].mlp
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        gate = torch.nn.functional.silu(module.gate_proj(x))
        keep = gate.abs() < -made[Site(0)].gating.tau  # type: ignore[union-attr]
        expected = module.down_proj(torch.where(keep, gate * module.up_proj(x), 0.0))
        torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-6)
    assert 0.1 < float(keep.float().mean()) < 0.9


def test_an_edit_goes_through_every_consumer(rows: None, edit: None, tmp_path: Path) -> None:
    gate = make_plan()[Site(0)].gating
    entry = SitePlan((Double(),), gate)
    plan.save_plan(tmp_path, {Site(0): entry}, Header(format="plan"))
    assert same(plan.load_plan(tmp_path)[Site(0)], entry)
    assert cost.cost(entry, cost.SiteSize(64, N, 3), 0.25) == pytest.approx(0.5)
    assert emit.emit(Site(0), entry, 64, N).score == "negative"

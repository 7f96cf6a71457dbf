"""The budget search: bisection on curves that are known, and losses on a tiny model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from models import VOCAB

from sparsegate.converter.arch import Arch, load_arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Plan, Predictor, SitePlan, Threshold, uniform_tau
from sparsegate.converter.evaluation import quality
from sparsegate.converter.evaluation.quality import measure_quality
from sparsegate.converter.modeling.gated import apply_plan, load_dense, remove_plan
from sparsegate.converter.pipeline import search
from sparsegate.converter.pipeline.recipe import Budget, Flags, compile_recipe, make_recipe
from sparsegate.converter.pipeline.search import (
    Judge,
    Loss,
    settled,
    shifted,
    sparsest,
)
from sparsegate.converter.text.windows import Batches

D, N = 64, 176
LOW, HIGH = 0.02, 0.99


class Known:
    """A judge of plans that are levels: `loss(level)` nats of divergence, `rough(level)` on a part of the windows; it
    counts its whole passes.
    """

    def __init__(self, loss: Callable[[float], float], rough: Callable[[float], float] | None = None) -> None:
        self.curve, self.rough, self.passes = loss, rough or loss, 0

    def loss(self, plan: Any, every: int = 1, most: int | None = None, budget: Budget | None = None) -> Loss:
        self.passes += every == 1
        return Loss(0.0, (self.curve if every == 1 else self.rough)(plan), {})


def level_of(judge: Known, max_kl: float) -> float | None:
    found = sparsest(
        cast("Callable[[float], Plan]", lambda level: level), cast(Judge, judge), Budget(max_kl=max_kl), LOW, HIGH
    )
    if found is None:
        return None
    level, plan, loss = found
    assert plan == cast(Any, level) and loss.kl == judge.curve(level) <= max_kl
    return level


@pytest.mark.parametrize("wanted", [0.1, 0.33, 0.5, 0.72, 0.95])
def test_bisection_finds_the_level(wanted: float) -> None:
    judge = Known(lambda level: (1 - level) ** 2)
    level = level_of(judge, (1 - wanted) ** 2)
    assert level is not None and wanted - 1e-9 <= level < wanted + 0.01
    assert judge.passes <= 8


def test_bisection_survives_a_part_that_misleads() -> None:
    for rough in (lambda level: 0.1 * (1 - level) ** 2, lambda level: 1.3 * (1 - level) ** 2):
        level = level_of(Known(lambda level: (1 - level) ** 2, rough), 0.3**2)
        assert level is not None and 0.7 - 1e-9 <= level < 0.8


def test_a_loose_budget_ends_at_the_end_and_an_impossible_one_nowhere() -> None:
    level = level_of(Known(lambda level: (1 - level) ** 2), 5.0)
    assert level is not None and LOW <= level < LOW + 0.005
    assert level_of(Known(lambda level: 1.0 + (1 - level) ** 2), 0.5) is None
    assert level_of(Known(lambda level: math.nan), 0.5) is None
    assert level_of(Known(lambda level: 0.0 if level == HIGH else 1.0), 0.5) == HIGH


def test_the_tightest_bound_decides() -> None:
    loss = Loss(nll=math.log(1.02), kl=0.03, density={})
    assert loss.share(Budget(max_ppl_increase=0.04)) == pytest.approx(math.log(1.02) / math.log(1.04))
    assert loss.share(Budget(max_kl=0.06)) == pytest.approx(0.5)
    assert loss.share(Budget(max_ppl_increase=0.04, max_kl=0.06)) == pytest.approx(math.log(1.02) / math.log(1.04))
    assert loss.share(Budget(max_ppl_increase=0.04, max_kl=0.01)) == pytest.approx(3.0)
    assert (
        loss.share(Budget(max_kl=0.0)) > 1 and Loss(0.0, 0.0, {}).share(Budget(max_kl=0.0, max_ppl_increase=0.0)) <= 1
    )


def test_a_bound_on_long_context_decides_by_long_windows_alone() -> None:
    budget, loss = Budget(max_kl=0.06, max_kl_long=0.04), Loss(0.0, 0.03, {}, kl_long=0.05)
    assert loss.share(Budget(max_kl=0.06)) == pytest.approx(0.5) and loss.share(budget) == pytest.approx(1.25)
    assert Loss(0.0, 0.03, {}, kl_long=0.01).share(budget) == pytest.approx(0.5), "the tightest one"
    for nothing in (None, math.nan):
        assert Loss(0.0, 0.0, {}, kl_long=nothing).share(budget) == math.inf, "not measured is not kept"


def test_a_budget_without_long_context_is_stored_as_before_there_was_one() -> None:
    """Fingerprints of conversions and headers of stages hash it."""
    assert Budget(max_kl=0.1).model_dump() == {"max_ppl_increase": None, "max_kl": 0.1}
    assert Budget(max_kl_long=0.1).model_dump(mode="json")["max_kl_long"] == 0.1
    assert Budget(max_kl_long=0.1).bounded and not Budget().bounded
    recipe = compile_recipe(Flags(model="m", max_kl_long=0.2))
    assert recipe.searches and make_recipe(recipe.model_dump(mode="json")) == recipe


def test_a_shift_keeps_more() -> None:
    g = torch.Generator().manual_seed(0)
    tau, logits = torch.rand(N, generator=g), torch.randn(50, N, generator=g)
    plan: Plan = {
        Site(0): SitePlan(gate=Threshold("gate", tau, 0.5)),
        Site(1): SitePlan(gate=Predictor(torch.zeros(2, D), torch.zeros(N, 2), tau - 0.5, 0.5)),
    }
    scores = {site: logits.abs() if site.layer == 0 else logits for site in plan}
    kept = {
        site: [float((score > shifted(plan, s)[site].gating.tau).float().mean()) for s in range(-2, 3)]
        for site, score in scores.items()
    }
    for shares in kept.values():
        assert all(one < other for one, other in itertools.pairwise(shares)) and shares[-1] - shares[0] > 0.2
    assert torch.equal(shifted(plan, 0.0)[Site(0)].gating.tau, tau)
    assert torch.equal(plan[Site(0)].gating.tau, tau), "the given plan stays"


def test_settled_takes_the_realised_densities() -> None:
    plan: Plan = {Site(k): SitePlan(gate=Threshold("gate", uniform_tau(0.1, N), 0.5)) for k in range(2)}
    found = settled(plan, {Site(1): 0.25})
    assert [found[site].gating.density for site in plan] == [0.5, 0.25] and found[Site(1)].gating.tau is plan[
        Site(1)
    ].gating.tau


# A tiny model


@pytest.fixture(scope="module", name="model")
def _model(tiny_model: Callable[[str], Path]) -> Any:
    return load_dense(tiny_model("llama"))


ARCH: Arch = load_arch("llama")


def batches(rows: int = 21, length: int = 20) -> Batches:
    """Windows of which the second is padded."""
    tokens = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 7:] = False
    return Batches(tokens, mask)


def plan_of(ffn: float, linear: float = 0.0) -> Plan:
    """Both networks by gate, q of the second layer by input."""
    plan: Plan = {Site(k): SitePlan(gate=Threshold("gate", uniform_tau(ffn, N), 0.5)) for k in range(2)}
    plan[Site(1, kind="linear:q_proj")] = SitePlan(gate=Threshold("input", uniform_tau(linear, D), 0.5))
    return plan


@pytest.mark.parametrize("keep_bytes", [0.0, 2e9])
def test_losses_are_those_of_the_verification(model: Any, keep_bytes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "GROUP_TOKENS", 160)
    judge, plan = Judge(model, ARCH, "silu", batches(), keep_bytes), plan_of(0.15, 0.3)
    apply_plan(model, plan, ARCH, "silu")
    whole = measure_quality(model, plan, batches())
    few = measure_quality(model, plan, Batches(batches().tokens[:8], batches().mask[:8]))
    remove_plan(model)
    for _ in range(2):  # the second time the dense side is there already
        loss = judge.loss(plan)
        assert loss.nll == pytest.approx(whole.nll - whole.nll_dense, abs=1e-5) and loss.kl == pytest.approx(
            whole.kl, abs=1e-5
        )
        assert {site.key: share for site, share in loss.density.items()} == pytest.approx(whole.site_density, abs=1e-12)
    part = judge.loss(plan, every=3)
    assert part.kl == pytest.approx(few.kl, abs=1e-5) and abs(part.kl - whole.kl) > 1e-4
    assert judge.loss(plan, most=1) == part
    assert loss.kl > 0.003 and abs(judge.loss(plan_of(0.15)).kl - loss.kl) > 1e-4


def test_the_model_is_dense_after_a_loss(model: Any) -> None:
    tokens = batches().tokens[:2]
    before = model(input_ids=tokens).logits
    assert Judge(model, ARCH, "silu", batches()).loss(plan_of(0.3)).kl > 0.01
    assert torch.equal(model(input_ids=tokens).logits, before)


def test_a_budget_is_decided_on_as_few_windows_as_are_sure(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far from the budget on the first windows, near it on all."""
    monkeypatch.setattr(quality, "GROUP_TOKENS", 160)
    windows = batches(64)
    judge, plan, used = Judge(model, ARCH, "silu", windows, keep_bytes=1e9), plan_of(1.2), []
    monkeypatch.setattr(search, "compare", lambda *given: used.append(given[1]) or quality.compare(*given))
    whole = judge.loss(plan)
    assert len(used) == 8 and 0 < whole.kl_error < 0.1 * whole.kl
    for share, groups in ((0.01, 2), (1.0, 8), (100.0, 2)):
        used.clear()
        loss, budget = judge.loss(plan, budget=Budget(max_kl=whole.kl * share)), Budget(max_kl=whole.kl * share)
        assert used == list(range(groups)), "16 windows at least"
        assert (loss.share(budget) <= 1) == (share >= 1)
    assert (
        loss.share(budget, 4) < 1 and loss.is_decided(budget) and not whole.is_decided(Budget(max_kl=whole.kl * 1.01))
    )
    both = (
        Budget(max_kl=whole.kl * 100, max_ppl_increase=math.expm1(whole.nll))
        if whole.nll > 0
        else Budget(max_kl=whole.kl)
    )
    assert not whole.is_decided(both), "the tightest bound decides"

"""Plans trained end to end on tiny models: densities hold, runs resume to the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCAB
from plan_checks import gates
from selection_cases import (
    HEADER,
    D,
    Load,
    N,
    batches,
    divergence,
    executed,
    input_plan,
    logits,
    make_entry,
    make_plan,
    models_of,
    objective_of,
    trained,
    trained_with_weights,
    windows,
)
from torch import Tensor

from sparsegate.converter.arch import Arch, Site
from sparsegate.converter.checkpoint.plan import Exact, Plan, Predictor, SitePlan, Swap, Threshold
from sparsegate.converter.checkpoint.stage import Header
from sparsegate.converter.checkpoint.tensor_files import load_tensors
from sparsegate.converter.methods.tune import Tune
from sparsegate.converter.modeling.losses import kl_divergence
from sparsegate.converter.text.windows import Batches
from sparsegate.converter.training import plans as plans_module
from sparsegate.converter.training.inputs import TrainingRun
from sparsegate.converter.training.plans import TrainedPlan, train_plan
from sparsegate.converter.training.selection import SelectionObjective
from sparsegate.converter.training.settings import Settings
from sparsegate.runtime_onnx.errors import InputError


@pytest.fixture(name="trained_on")
def _trained_on(monkeypatch: pytest.MonkeyPatch) -> list[Batches]:
    """The windows that every run trains on, filled as runs go."""
    seen, plain = [], plans_module.train
    monkeypatch.setattr(
        plans_module, "train", lambda objective, data, *rest: seen.append(data) or plain(objective, data, *rest)
    )
    return seen


@pytest.fixture(name="cut_at")
def _cut_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """Make runs break off in a step, or in none; returns the steps begun from then on."""
    plain = SelectionObjective.loss

    def cut_at(cut: int | None) -> list[int]:
        steps: list[int] = []

        def loss(self: SelectionObjective, tokens: Tensor, mask: Tensor, step: int) -> Tensor:
            steps.append(step)
            if step == cut:
                raise KeyboardInterrupt
            return plain(self, tokens, mask, step)

        monkeypatch.setattr(SelectionObjective, "loss", loss)
        return steps

    return cut_at


# Training


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("llama", "predictor"), ("phi", "predictor and residual"), ("llama", "gate"), ("phi", "gate and residual")],
)
def test_training_beats_the_start_at_the_same_density_on_other_windows(
    model_type: str, kind: str, load: Load, tmp_path: Path
) -> None:
    loaded, heldout = load(model_type), windows(12, seed=3)
    before = {name: tensor.clone() for name, tensor in loaded[0].state_dict().items()}
    if kind == "predictor":
        fresh: Plan = {
            site: SitePlan(gate=Predictor(e.fc1, 0.3 * e.fc2, torch.full((N,), -1.0), 1.0))
            for site, e in gates(make_plan(kind)).items()
            if isinstance(e, Predictor)
        }
        start = 1.0
    else:
        fresh, start = make_plan(kind), 0.5
    if kind == "gate":  # thresholds without reason, so that there is something to learn
        g = torch.Generator().manual_seed(0)
        fresh = {
            site: SitePlan(gate=Threshold("gate", e.tau * (0.2 + 2 * torch.rand(N, generator=g)), 0.5))
            for site, e in gates(fresh).items()
        }
    (plan,) = trained(
        loaded, fresh, tmp_path, [0.4], start, batches(200), steps=50, rate=0.3 if kind == "gate" else 0.02
    )
    cut = objective_of(loaded, fresh).plan(heldout, 0.4)
    ours, theirs = divergence(loaded, plan, heldout), divergence(loaded, cut, heldout)
    densities = [sum(executed(loaded, each, heldout)[1].values()) / 2 for each in (plan, cut)]
    assert densities == pytest.approx([0.4, 0.4], abs=0.02)
    assert ours < 0.9 * theirs
    assert all(
        not torch.equal(tensor, fresh[site].tensors()[role])
        for site, entry in plan.items()
        for role, tensor in entry.tensors().items()
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded[0].state_dict().items()), (
        "base weights stay"
    )
    assert all(p.grad is None and not p.requires_grad for p in loaded[0].parameters())
    assert not any("forward" in vars(module) for module in loaded[0].modules())


@pytest.mark.parametrize("kind", ["predictor", "gate and residual"])
def test_every_density_holds_on_windows_not_trained_on(
    kind: str, load: Load, tmp_path: Path, trained_on: list[Batches]
) -> None:
    loaded, given = load("llama"), batches(40)
    given.mask[0, 7:] = False  # a padded window is trained on and sets no densities
    plans = trained(loaded, make_plan(kind), tmp_path, [0.6, 0.3], data=given, steps=6)
    rows = {tuple(row) for row in trained_on[0].tokens.tolist()}
    aside = torch.tensor([row for row in given.tokens.tolist() if tuple(row) not in rows])
    assert len(aside) == 3 and len(rows) == 37
    assert torch.equal(trained_on[0].tokens[0], given.tokens[0]) and torch.equal(trained_on[0].mask[0], given.mask[0])
    for density, plan in zip([0.6, 0.3], plans, strict=True):
        _, found = executed(loaded, plan, aside)
        assert sum(found.values()) / 2 == pytest.approx(density, abs=0.003)
        assert {site: entry.density for site, entry in gates(plan).items()} == pytest.approx(found, abs=1e-5)


def test_densities_hold_on_the_text_that_is_named_for_them(
    load: Load, tmp_path: Path, trained_on: list[Batches]
) -> None:
    loaded, given = load("llama"), batches(40)
    named = Batches(given.tokens[:16] % 3, given.mask[:16])
    both = Batches(torch.cat([given.tokens, named.tokens]), torch.cat([given.mask, named.mask]))
    (plan,) = trained(loaded, make_plan("gate"), tmp_path, [0.4], data=both, density_text=named, steps=6)
    density = sum(executed(loaded, plan, named.tokens[:1])[1].values()) / 2
    assert density == pytest.approx(0.4, abs=0.003)
    assert abs(sum(executed(loaded, plan, given.tokens)[1].values()) / 2 - 0.4) > 0.01
    rows = {tuple(row) for row in trained_on[0].tokens.tolist()}
    assert tuple(named.tokens[0].tolist()) not in rows and len(trained_on[0].tokens) == 55


def test_training_in_bf16_gives_a_plan_of_the_same_density(load: Load, tmp_path: Path) -> None:
    loaded = load("llama")
    (half,) = trained(loaded, make_plan("predictor and residual"), tmp_path / "half", [0.4], steps=12, precision="bf16")
    (full,) = trained(loaded, make_plan("predictor and residual"), tmp_path / "full", [0.4], steps=12)
    for a, b in zip(half.values(), full.values(), strict=True):
        for role, tensor in a.tensors().items():
            assert tensor.dtype == torch.float32 and not torch.equal(tensor, b.tensors()[role])
            assert torch.nn.functional.cosine_similarity(tensor.flatten(), b.tensors()[role].flatten(), dim=0) > 0.95
    assert sum(e.density for e in gates(half).values()) / 2 == pytest.approx(0.4, abs=0.003)


def test_sites_with_exact_zeros_pass_through(load: Load, tmp_path: Path) -> None:
    exact: Plan = {Site(0): SitePlan((Swap("relu"),), Exact())}
    (plan,) = trained(load("llama"), exact | make_plan("gate", layers=(1,)), tmp_path, [0.5], steps=2)
    assert set(plan) == {Site(0), Site(1)} and plan[Site(0)] is exact[Site(0)]


def test_x_may_have_any_scale(load: Load, tmp_path: Path) -> None:
    """A model whose network's inputs are eight times larger, and its first weights eight times smaller, trains to the
    same functions.
    """
    plans = []
    for scale in (1.0, 8.0):
        loaded = load("llama")
        with torch.no_grad():
            for layer in loaded[0].model.layers:
                layer.post_attention_layernorm.weight *= scale
                layer.mlp.gate_proj.weight /= scale
                layer.mlp.up_proj.weight /= scale
        start = {Site(layer): make_entry("predictor and residual", layer + 1, scale=scale) for layer in range(2)}
        (plan,) = trained(loaded, start, tmp_path / str(scale), [0.4], steps=20)
        _, found = executed(loaded, plan, batches().tokens[::16])
        assert sum(found.values()) / 2 == pytest.approx(0.4, abs=0.003), "fc1 works on x itself"
        plans.append(plan)
    for site, one in plans[0].items():
        other = plans[1][site].tensors()
        for role, tensor in one.tensors().items():
            assert torch.allclose(tensor, other[role] * (8 if "fc1" in role else 1), rtol=1e-3, atol=1e-5)


# Weights


def with_weights(loaded: tuple[Any, Arch, str], trained_plan: TrainedPlan) -> tuple[Any, Arch, str]:
    """Another copy of the model, with the weights of a training."""
    model, arch, activation = loaded
    assert trained_plan.weights is not None
    updated = copy.deepcopy(model)
    weights = load_tensors(trained_plan.weights)
    assert set(weights) <= set(updated.state_dict()), "by the model's own names"
    updated.load_state_dict(weights, strict=False)
    return updated, arch, activation


def moved_weights(one: Any, other: Any) -> set[str]:
    """Last parts of the names of the weights that differ."""
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return {name.split(".")[-2] for (name, tensor), other_tensor in pairs if not torch.equal(tensor, other_tensor)}


@pytest.mark.parametrize(
    ("kind", "updates"),
    [
        ("gate", "low_rank"),
        pytest.param("gate", "networks", marks=pytest.mark.slow),
        pytest.param("predictor and residual", "low_rank", marks=pytest.mark.slow),
        pytest.param("inputs", "low_rank", marks=pytest.mark.slow),
        pytest.param("inputs", "networks", marks=pytest.mark.slow),
    ],
)
def test_weights_that_are_trained_too_lose_less(kind: str, updates: str, load: Load, tmp_path: Path) -> None:
    loaded, few = load("llama"), batches(20)
    start = input_plan() if kind == "inputs" else make_plan(kind)
    go = partial(trained_with_weights, loaded, start, densities=[0.4], data=few, steps=60, rate=0.01)
    (alone,) = go(folder=tmp_path / "alone")
    (result,) = go(folder=tmp_path / "both", updates=updates, rank=8, update_rate=0.01, offsets=True, likeliest=VOCAB)
    assert alone.weights is None
    updated = with_weights(loaded, result)
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert moved_weights(loaded[0], updated[0]) == linears, "all linear maps of the blocks, and nothing else"
    seen = few.tokens  # random windows have nothing in common but themselves
    dense = logits(loaded[0], seen)
    ours = float(kl_divergence(dense, executed(updated, result.plan, seen)[0]))
    assert ours < 0.9 * divergence(loaded, alone.plan, seen)
    crossed = float(kl_divergence(dense, executed(loaded, result.plan, seen)[0]))
    assert crossed > 1.05 * ours, "the plan belongs to its weights"
    if kind != "inputs":
        offsets = [entry.offset for entry in result.plan.values()]
        assert all(offset is not None and offset.shape == (D,) and bool(offset.any()) for offset in offsets)
        bare = {site: replace(entry, offset=None) for site, entry in result.plan.items()}
        assert float(kl_divergence(dense, executed(updated, bare, seen)[0])) != ours, "offsets are a part of it"
    assert all(p.grad is None and not p.requires_grad for p in loaded[0].parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_trained_pass_is_that_of_plan_and_weights(precision: str, load: Load, tmp_path: Path) -> None:
    """What training saw and what comes out of it compute the same."""
    loaded, tokens = load("llama"), windows(3)
    tune = Tune(steps=3, precision=precision, rank=4, update_rate=0.05)  # type: ignore[arg-type]
    objective = SelectionObjective(
        models_of(loaded), make_plan("gate and residual"), tune, Settings(3, 2, 4e-3), 0.5, [0.5], windows(2)
    )
    for leaf, _ in objective.parameters().values():
        with torch.no_grad():
            leaf += 0.05 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(leaf.numel()))
    plan = objective.student.site_plans(tokens, 0.5, 0.0)
    updated = copy.deepcopy(loaded[0])
    updated.load_state_dict(objective.student.merged(), strict=False)
    expected, densities = executed((updated, *loaded[1:]), plan, tokens)
    steep = {site: unit.steep for site, unit in objective.student.units.items()}
    for site, unit in objective.student.units.items():
        moved = plan[site].gating.tau * steep[site] - unit.tensors["bias"]
        unit.shift = float(moved.detach().mean())
    with objective.student.masking() as seen, torch.no_grad():
        found = objective.student.model(input_ids=tokens, use_cache=False).logits.float()
    assert float((found - expected).norm() / expected.norm()) < (1e-5 if precision == "fp32" else 0.05)
    assert [float(each.share) for each in seen] == pytest.approx(
        list(densities.values()), abs=1e-6 if precision == "fp32" else 0.02
    )


def test_blocks_computed_again_give_the_same_gradients(load: Load) -> None:
    loaded, tokens = load("llama"), windows(2)
    gradients = []
    for recompute in (False, True):
        tune = Tune(precision="fp32", rank=4, recompute=recompute)
        objective = SelectionObjective(
            models_of(loaded), make_plan("gate"), tune, Settings(3, 2, 4e-3), 0.5, [0.5], windows(2)
        )
        with torch.no_grad():
            for name, (leaf, _) in objective.parameters().items():
                leaf += 0.1 if name.endswith(".b") else 0.0
        objective.loss(tokens, torch.ones_like(tokens, dtype=torch.bool), 0).backward()
        gradients.append([leaf.grad for leaf, _ in objective.parameters().values()])
        assert not any("forward" in vars(module) for module in loaded[0].modules())
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None and torch.allclose(one, other, atol=1e-7)


# Resume


def bits(plans: list[Plan]) -> list[tuple[str, float, bytes]]:
    return [
        (f"{site.key}.{role}", e.gating.density, t.numpy().tobytes())
        for plan in plans
        for site, e in plan.items()
        for role, t in e.tensors().items()
    ]


@pytest.mark.parametrize(("kind", "cut"), [("predictor and residual", 3), ("predictor and residual", 9), ("gate", 11)])
def test_an_interrupted_run_gives_the_same_plans(
    kind: str,
    cut: int,
    load: Load,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut_at: Callable[[int | None], list[int]],
) -> None:
    folder = tmp_path / "cut"
    monkeypatch.setattr(plans_module, "Settings", partial(Settings, save_every=4))
    go = partial(trained, load("llama"), make_plan(kind), densities=[0.5, 0.3], data=batches(18), steps=6)
    whole = go(folder=tmp_path / "whole")
    cut_at(cut)
    with pytest.raises(KeyboardInterrupt):
        go(folder=folder)
    steps = cut_at(None)
    assert bits(go(folder=folder)) == bits(whole) and steps == [*range(cut // 4 * 4, 12)]
    assert (folder / "curve.json").read_bytes() == (tmp_path / "whole" / "curve.json").read_bytes()
    steps = cut_at(None)
    assert bits(go(folder=folder)) == bits(whole) and not steps, "finished: nothing runs again"
    (folder / "curve.json").unlink()  # as if killed before its last file was written
    assert bits(go(folder=folder)) == bits(whole) and steps == [8, 9, 10, 11]
    assert (folder / "curve.json").read_bytes() == (tmp_path / "whole" / "curve.json").read_bytes()


def test_another_run_in_the_same_folder_spoils_nothing(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_at: Callable[[int | None], list[int]]
) -> None:
    monkeypatch.setattr(plans_module, "Settings", partial(Settings, save_every=6))
    go = partial(trained, load("llama"), make_plan("gate"), densities=[0.5, 0.3], data=batches(18))
    whole = go(folder=tmp_path / "whole", steps=5)
    for steps, cut in ((5, 8), (2, 3)):  # the second run overwrites level 0 and stores no state
        cut_at(cut)
        with pytest.raises(KeyboardInterrupt):
            go(folder=tmp_path / "one", steps=steps)
    cut_at(None)
    assert bits(go(folder=tmp_path / "one", steps=5)) == bits(whole)


@pytest.mark.parametrize("change", ["plan", "tune", "densities", "header"])
def test_what_decides_the_result_decides_whether_it_is_there(change: str, load: Load, tmp_path: Path) -> None:
    loaded, base = load("llama"), {"plan": make_plan("gate"), "rate": 4e-3, "densities": [0.5], "header": HEADER}
    other: dict[str, Any] = {
        "plan": make_plan("gate", 0.01),
        "tune": 8e-3,
        "densities": [0.4],
        "header": HEADER.model_copy(update={"seed": 1}),
    }

    def go(folder: Path, plan: Plan, rate: float, densities: list[float], header: Header) -> list[Plan]:
        tune = Tune(steps=3, rate=rate, precision="fp32", updates="none", offsets=False, likeliest=0)
        run = TrainingRun(batches(18), header.seed, folder, header)
        return [each.plan for each in train_plan(models_of(loaded), plan, 0.5, densities, tune, run)]

    changed = base | {"rate" if change == "tune" else change: other[change]}
    first, second = go(tmp_path / "a", **base), go(tmp_path / "a", **changed)  # type: ignore[arg-type]
    assert bits(second) == bits(go(tmp_path / "b", **changed)) != bits(first)  # type: ignore[arg-type]


# What cannot be trained


def test_a_plan_without_thresholds(load: Load, tmp_path: Path) -> None:
    plan: Plan = {Site(0): SitePlan((Swap("relu"),), Exact())}
    with pytest.raises(InputError, match=r"must have thresholds or predictors, got layers\.0\.ffn\. "):
        trained(load("llama"), plan, tmp_path, [0.5])


@pytest.mark.parametrize(("full", "padded"), [(1, 0), (0, 3)])
def test_too_few_windows(full: int, padded: int, load: Load, tmp_path: Path) -> None:
    given = batches(full + padded)
    given.mask[full:, 20:] = False
    with pytest.raises(InputError, match=f"got {full} full ones of {full + padded}. Give more text.$"):
        trained(load("llama"), make_plan("gate"), tmp_path, [0.5], data=given)
    assert not list(tmp_path.iterdir())

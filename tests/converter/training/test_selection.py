"""The objective of training end to end on tiny models: the masked pass is the executors', gradients are brute force's,
the controller's price.
"""

from __future__ import annotations

import pytest
import torch
from plan_checks import gates
from selection_cases import (
    ENTRIES,
    Load,
    N,
    executed,
    input_plan,
    inputs_of,
    logits,
    make_plan,
    models_of,
    objective_of,
    windows,
)
from torch import Tensor

from sparsegate.converter.arch import Site
from sparsegate.converter.checkpoint.plan import Plan, Predictor, SitePlan, Threshold
from sparsegate.converter.methods.tune import Tune
from sparsegate.converter.modeling.blocks import down_rows, ffn_parts
from sparsegate.converter.modeling.losses import kl_divergence
from sparsegate.converter.training.selection import SelectionObjective
from sparsegate.converter.training.settings import Settings
from sparsegate.converter.training.unit import Unit

# The masked pass


@pytest.mark.parametrize("model_type", ["llama", "phi"])
@pytest.mark.parametrize("kind", ENTRIES)
def test_masked_pass_is_the_executors(model_type: str, kind: str, load: Load) -> None:
    loaded, tokens = load(model_type), windows(3)
    objective = objective_of(loaded, make_plan(kind))
    plan = objective.plan(tokens, 0.4)
    for site, unit in objective.student.units.items():
        unit.shift = shift_of(unit, plan[site].gating)
    with objective.student.masking() as seen:
        found = logits(loaded[0], tokens)
    expected, densities = executed(loaded, plan, tokens)
    assert float((found - expected).abs().max()) < 1e-5
    assert [float(each.share) for each in seen] == pytest.approx(list(densities.values()), abs=1e-6)
    assert float((found - logits(loaded[0], tokens)).abs().max()) > 0.1, "the plan does something"
    for unit in objective.student.units.values():
        unit.shift += 0.01
    with objective.student.masking():
        assert float((logits(loaded[0], tokens) - expected).abs().max()) > 1e-3, (
            "a control that keeps a few neurons fewer"
        )
    with pytest.raises(KeyboardInterrupt), objective.student.masking():
        raise KeyboardInterrupt
    assert not any("forward" in vars(module) for module in loaded[0].modules()), "masking ends where the pass raises"


def shift_of(unit: Unit, entry: Threshold | Predictor) -> float:
    bias, steep = unit.tensors["bias"].detach(), 1.0 if unit.steep is None else unit.steep
    sign = 1 if unit.steep is None else -1
    return float((entry.tau * steep + sign * bias).mean())


@pytest.mark.parametrize("kind", ["predictor and residual", "gate"])
def test_divergence_is_that_of_the_plan_with_padding_masked(kind: str, load: Load) -> None:
    loaded, tokens = load("llama"), windows(2)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :5] = False  # in front, where padding reaches every later position unless attention is masked
    mask[1, 17:] = False
    objective = objective_of(loaded, make_plan(kind))
    plan = {site: unit.site_plan(0.5) for site, unit in objective.student.units.items()}
    objective.loss(tokens, mask, 0)
    sparse, _ = executed(loaded, plan, tokens, mask.long())
    dense = logits(loaded[0], tokens, mask.long())
    assert objective.figures["kl"] == pytest.approx(float(kl_divergence(dense, sparse, mask)), rel=1e-5)
    unmasked = kl_divergence(logits(loaded[0], tokens), executed(loaded, plan, tokens)[0], mask)
    for other in (unmasked, kl_divergence(dense, sparse)):
        assert abs(float(other) / objective.figures["kl"] - 1) > 1e-3


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("density", [0.8, 0.3, 0.05])
def test_plan_meets_the_density(kind: str, density: float, load: Load) -> None:
    loaded, tokens = load("llama"), windows(12)
    plan = objective_of(loaded, make_plan(kind)).plan(tokens, density)
    _, found = executed(loaded, plan, tokens)
    assert sum(found.values()) / 2 == pytest.approx(density, abs=0.003)
    assert {site: entry.density for site, entry in gates(plan).items()} == pytest.approx(found, abs=1e-5)
    assert abs(found[Site(0)] - found[Site(1)]) > 0.005, "layers are free"


def test_plan_reaches_a_density_far_from_the_start(load: Load) -> None:
    loaded, tokens = load("llama"), windows(8)
    plan: Plan = {
        Site(layer): SitePlan(gate=Threshold("gate", torch.full((N,), 0.01), 0.99)) for layer in range(2)
    }  # .1 lies 300 logits away
    _, found = executed(loaded, objective_of(loaded, plan).plan(tokens, 0.1), tokens)
    assert sum(found.values()) / 2 == pytest.approx(0.1, abs=0.003)


# Gradients


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("model_type", ["llama", "phi"])
def test_gradient_is_the_masks_times_the_sigmoids_slope(layer: int, model_type: str, load: Load) -> None:
    loaded, tokens, site = load(model_type), windows(2), Site(layer)
    model, arch, _ = loaded
    objective = objective_of(loaded, make_plan("predictor", layers=(layer,)), target=0.45)
    objective.restore({"price": 0.7, "shift": 0.0, "steps": 5})
    objective.loss(tokens, torch.ones_like(tokens, dtype=torch.bool), 0).backward()
    unit = objective.student.units[site]
    share = objective.figures["density"]
    with torch.no_grad():
        inner = torch.relu(inputs_of(model, arch, layer, tokens) / unit.scale @ unit.tensors["fc1"].T)
        logit = inner @ unit.tensors["fc2"].T + unit.tensors["bias"]
    mask = (logit > 0).float().requires_grad_()
    handle = getattr(model.get_submodule(arch.ffn_module(layer)), arch.ffn.down).register_forward_pre_hook(
        lambda _, given: (given[0] * mask,)
    )
    sparse = model(input_ids=tokens, use_cache=False).logits
    handle.remove()
    assert share == pytest.approx(float(mask.mean().detach()), abs=1e-6)
    divergence = kl_divergence(logits(model, tokens), sparse)
    (of_mask,) = torch.autograd.grad(divergence, mask)
    mask.grad = of_mask + 0.7 / mask.numel()
    slope = torch.sigmoid(logit) * torch.sigmoid(-logit)
    balance = max(0.0, -float((of_mask * slope).sum()) / float(slope.mean()))
    assert balance > 0 and objective.price == pytest.approx(0.9 * 0.7 + 0.1 * balance, rel=1e-4), (
        "the price goes to where a common shift gains nothing"
    )
    moved = 0.15 * (share - 0.45) / float(slope.mean())
    assert objective.shift == pytest.approx(moved, rel=1e-4), "the shift to where the density is the wished one"
    expected = {"bias": (mask.grad * slope).sum((0, 1)), "fc2": torch.einsum("bsn,bsr->nr", mask.grad * slope, inner)}
    for name, gradient in expected.items():
        found = unit.tensors[name].grad
        assert found is not None and float((found - gradient).abs().max()) < 1e-4 * float(gradient.abs().max())
        assert float((found - mask.grad.sum((0, 1)) if name == "bias" else found).abs().max()) > 1e-2 * float(
            gradient.abs().max()
        )


def energies(objective: SelectionObjective, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By hand, for every token [T] and neuron [n]: the change of the weighted lost energy by toggling that one mask
    from 0 to 1, its plain derivative there, and the mask's slope.
    """
    student, arch, unit = objective.models.student, objective.models.arch, objective.student.units[site]
    module, x = student.get_submodule(arch.ffn_module(site.layer)), inputs_of(student, arch, site.layer, tokens)
    x = x.flatten(0, 1)
    with torch.no_grad():
        parts = ffn_parts(module, arch, objective.models.activation, x)
        inner = torch.relu(x / unit.scale @ unit.tensors["fc1"].T) if "fc1" in unit.tensors else None
        logit = unit.logits(inner, parts.gate).double()
        rows = down_rows(module, arch).double()
        extra = 0.0 if "residual" not in unit.tensors or inner is None else (inner @ unit.tensors["residual"]).double()
    mask, z = (logit > 0).double().requires_grad_(), parts.z.double()

    def energy(m: Tensor) -> Tensor:
        """Of masks [..., T, n], by token [..., T]; the bias of the down projection is in both outputs."""
        return (z @ rows - (z * m) @ rows - extra).square().sum(-1)

    plain = torch.autograd.grad(energy(mask).sum(), mask)[0]
    toggled = torch.empty_like(plain)
    for i in range(plain.shape[1]):
        on, off = mask.detach().clone(), mask.detach().clone()
        on[:, i], off[:, i] = 1, 0
        toggled[:, i] = energy(on) - energy(off)
    whole = z @ rows
    if getattr(module, arch.ffn.down).bias is not None:
        whole = whole + getattr(module, arch.ffn.down).bias.double()
    share = objective.student.worth[site] / whole.square().sum()
    added = (1 - 2 * mask.detach()) * (z[..., None] * rows).square().sum(-1)
    assert float((toggled - plain - added).abs().max()) < 1e-9 * float(toggled.abs().max()), (
        "the exact change is the derivative at the midpoint"
    )
    return share * toggled, share * plain, torch.sigmoid(logit) * torch.sigmoid(-logit)


@pytest.mark.parametrize(
    ("model_type", "kind", "tau"),
    [
        ("llama", "predictor", 0.0),
        ("llama", "predictor", -9.0),
        ("phi", "predictor and residual", 0.3),
        ("llama", "gate and residual", 0.0),
        ("phi", "gate", 0.0),
    ],
)
def test_lost_energys_gradient_is_the_exact_change_by_one_mask(
    model_type: str, kind: str, tau: float, load: Load
) -> None:
    loaded, tokens = load(model_type), windows(1, 3)
    objective = objective_of(loaded, make_plan(kind, tau, layers=(1,)), local=1.0)
    with objective.student.masking() as seen:
        objective.models.student(input_ids=tokens, use_cache=False)
    bias = objective.student.units[Site(1)].tensors["bias"]
    (found,) = torch.autograd.grad(seen[0].lost, bias)
    toggled, plain, slope = energies(objective, Site(1), tokens)
    sign = 1 if kind.startswith("predictor") else -1  # a gate's bias is subtracted
    expected, without = sign * (toggled * slope).sum(0).float(), sign * (plain * slope).sum(0).float()
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert float((found - without).abs().max()) > 1e-2 * float(expected.abs().max()), "the plain derivative is another"
    if tau == -9.0:
        assert float(seen[0].share.detach()) == 1.0 and not bool(without.any()), (
            "all kept: nothing is lost and the plain derivative vanishes"
        )
        assert bool((expected <= 0).all()) and float(expected.min()) < 0, "yet every neuron is worth keeping"


def test_loss_weighs_the_lost_energy(load: Load) -> None:
    loaded, tokens = load("llama"), windows(2)
    full = torch.ones_like(tokens, dtype=torch.bool)
    values = [
        float(objective_of(loaded, make_plan("predictor"), local).loss(tokens, full, 0).detach())
        for local in (0.0, 1.0, 3.0)
    ]
    assert (
        values[2] - values[0] == pytest.approx(3 * (values[1] - values[0]), rel=1e-4)
        and abs(values[1] - values[0]) > 1e-3
    )


# The controllers


def test_target_sinks_over_a_quarter_of_a_level(load: Load) -> None:
    loaded = load("llama")
    tune, settings = Tune(precision="fp32", updates="none"), Settings(24, 2, 4e-3, levels=2)
    objective = SelectionObjective(models_of(loaded), make_plan("gate"), tune, settings, 1.0, [0.4, 0.1], windows(2))
    first = [0.8, 0.6, 0.4] + 9 * [0.4]
    second = [0.3, 0.2, 0.1] + 9 * [0.1]
    assert [objective.target(step) for step in range(24)] == pytest.approx(first + second)


@pytest.mark.parametrize("kind", ["predictor", "gate", "inputs"])
def test_the_density_follows_the_target_and_stays(kind: str, load: Load) -> None:
    """Nothing but the shift moves: the density goes where it is wished within a few steps, from far above and below."""
    loaded, tokens = load("llama"), windows(8)
    full = torch.ones_like(tokens, dtype=torch.bool)
    for target in (0.2, 0.8):
        plan = input_plan() if kind == "inputs" else make_plan(kind)
        objective = objective_of(loaded, plan, target=target, steps=60)
        for step in range(25):
            objective.loss(tokens, full, step)
        assert objective.figures["density"] == pytest.approx(target, abs=0.02)
        _, densities = executed(loaded, objective.plan(tokens, target), tokens)
        weights = objective.student.weights
        assert sum(densities[site] * weights[site] for site in plan) == pytest.approx(target, abs=0.003)


def test_the_first_price_is_the_balanced_one(load: Load) -> None:
    objective, tokens = objective_of(load("llama"), make_plan("predictor")), windows(2)
    loss = objective.loss(tokens, torch.ones_like(tokens, dtype=torch.bool), 0)
    assert float(loss.detach()) == pytest.approx(objective.figures["kl"], abs=1e-6), "nothing is priced at first"
    state = objective.state()
    assert state["price"] == objective.price > 0
    other = objective_of(load("llama"), make_plan("predictor"))
    other.restore(state)
    for each in (objective, other):
        each.loss(tokens, torch.ones_like(tokens, dtype=torch.bool), 1)
    assert other.state() == objective.state(), "a resumed run goes on with the same controllers"

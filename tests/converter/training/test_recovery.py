"""The objective of recovery training: its terms against direct formulas, the penalty's gradient against autograd, the
controllers, and predictors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsegate.converter.arch import load_arch
from sparsegate.converter.checkpoint.plan import SitePlan
from sparsegate.converter.modeling.blocks import swap
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.modeling.predictor import fresh_predictor
from sparsegate.converter.training.inputs import Models
from sparsegate.converter.training.recovery import RecoveryObjective, grown, predicted_path
from sparsegate.converter.training.settings import Joint, Penalty, Recovery, settings_of
from sparsegate.converter.training.unit import make_unit

TOKENS = torch.randint(3, 290, (4, 12), generator=torch.Generator().manual_seed(1))
WHOLE = torch.ones_like(TOKENS, dtype=torch.bool)
PADDED = torch.arange(12)[None] < torch.tensor([12, 5, 9, 2])[:, None]
Model = Callable[..., Any]


@pytest.fixture(name="model")
def _model(tiny_model: Callable[[str], Path]) -> Model:
    def make(activation: str | None = "drelu", model_type: str = "llama") -> Any:
        found = load_dense(tiny_model(model_type))
        if activation is not None:
            for block in found.get_decoder().layers:
                swap(block.mlp, load_arch(model_type), activation)
        return found

    return make


def asked(**changes: Any) -> Recovery:
    return Recovery.model_validate(
        {"steps": 20, "windows": 4, "precision": "fp32", "penalty": {"weight": 0.0}} | changes
    )


def objective(
    student: Any, teacher: Any | None, recovery: Recovery, model_type: str = "llama", **given: Any
) -> RecoveryObjective:
    models = Models(student, teacher, load_arch(model_type), "silu")
    trained = dict(student.named_parameters())
    return RecoveryObjective(models, recovery, settings_of(recovery, 0), trained, **given)


def inner(student: Any, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Gate and up products [T, n] of every block, with gradients, from a plain pass."""
    found: list[tuple[Tensor, Tensor]] = []
    hooks = [
        b.mlp.register_forward_pre_hook(lambda m, x: found.append((m.gate_proj(x[0])[mask], m.up_proj(x[0])[mask])))
        for b in student.model.layers
    ]
    student(input_ids=TOKENS, attention_mask=mask.long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def gradients(student: Any, loss: Tensor) -> dict[str, Tensor]:
    student.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    largest = max(float(tensor.abs().max()) for tensor in other.values())
    return max(float((one[name] - tensor).abs().max()) for name, tensor in other.items()) / largest


# Terms


@pytest.mark.parametrize("mask", [WHOLE, PADDED])
def test_divergence_and_cross_entropy(mask: Tensor, model: Model) -> None:
    student, teacher = model(), model(None)
    found = objective(student, teacher, asked(losses={"distill": 2.0, "lm": 0.5}))
    loss = found.loss(TOKENS, mask, 0)
    with torch.no_grad():
        p, q = (m(input_ids=TOKENS, attention_mask=mask.long()).logits.log_softmax(-1) for m in (teacher, student))
    kl = float(sum((p[b, t].exp() * (p[b, t] - q[b, t])).sum() for b, t in mask.nonzero()) / mask.sum())
    pairs = [(b, t) for b, t in mask.nonzero() if t + 1 < 12 and mask[b, t + 1]]
    lm = float(sum(-q[b, t, TOKENS[b, t + 1]] for b, t in pairs) / len(pairs))
    assert float(loss.detach()) == pytest.approx(2 * kl + 0.5 * lm, rel=1e-4)
    assert (
        found.figures["kl"] == pytest.approx(kl, rel=1e-4)
        and found.figures["lm"] == pytest.approx(lm, rel=1e-4)
        and kl > 0.01
    )


def test_hidden_states_of_every_block(model: Model) -> None:
    student, teacher = model(), model(None)
    loss = objective(student, teacher, asked(losses={"distill": 0.0, "hidden": 3.0})).loss(TOKENS, WHOLE, 0)

    def states(m: Any) -> list[Tensor]:
        found: list[Tensor] = []
        hooks = [block.register_forward_hook(lambda _, __, y: found.append(y)) for block in m.model.layers]
        with torch.no_grad():
            m(input_ids=TOKENS)
        for hook in hooks:
            hook.remove()
        return found

    parts = [
        float((h - t).square().sum() / t.square().sum()) for h, t in zip(states(student), states(teacher), strict=True)
    ]
    assert float(loss.detach()) == pytest.approx(3 * sum(parts) / len(parts), rel=1e-5) and min(parts) > 1e-3


def test_without_losses_of_the_teacher_none_is_needed(model: Model) -> None:
    found = objective(model(), None, asked(losses={"distill": 0.0, "lm": 1.0}))
    assert float(found.loss(TOKENS, WHOLE, 0).detach()) == pytest.approx(found.figures["lm"])


# The penalty


@pytest.mark.parametrize("mask", [WHOLE, PADDED])
def test_l1_has_the_gradient_of_the_ratio(mask: Tensor, model: Model) -> None:
    student = model()
    settings = asked(losses={"distill": 0.0}, penalty={"kind": "l1", "weight": 0.7, "ramp": 0.01})
    got = gradients(student, objective(student, None, settings).loss(TOKENS, mask, 19))
    z = [F.relu(g) * F.relu(u) for g, u in inner(student, mask)]
    direct = 0.7 * torch.stack([v.abs().mean() / v.square().mean().sqrt() for v in z]).mean()
    wanted = gradients(student, direct)
    assert furthest(got, wanted) < 1e-4
    z = [F.relu(g) * F.relu(u) for g, u in inner(student, mask)]
    detached = gradients(
        student, 0.7 * torch.stack([v.abs().mean() / v.detach().square().mean().sqrt() for v in z]).mean()
    )
    assert furthest(detached, wanted) > 0.05, "a norm that shrinking lowers has another gradient"


@pytest.mark.parametrize("activation", ["drelu", "relu", "fatrelu(0.25)"])
def test_count_of_open_units(activation: str, model: Model) -> None:
    student = model(activation)
    settings = asked(losses={"distill": 0.0}, penalty={"weight": 0.7, "ramp": 0.01, "softness": 0.5})
    found = objective(student, None, settings)
    loss = found.loss(TOKENS, PADDED, 19)

    def count() -> Tensor:
        parts = []
        for g, u in inner(student, PADDED):
            rms = [v.detach().square().mean().sqrt() for v in (g, u)]
            margin = (g - (0.25 if "fat" in activation else 0.0)) / rms[0]
            parts.append(
                torch.sigmoid((torch.minimum(margin, u / rms[1]) if activation == "drelu" else margin) / 0.5).mean()
            )
        return 0.7 * torch.stack(parts).mean()

    direct = count()
    assert float(loss.detach()) == pytest.approx(float(direct.detach()), rel=1e-5)
    assert furthest(gradients(student, loss), gradients(student, count())) < 1e-4
    share = [
        float(((g > (0.25 if "fat" in activation else 0)) & ((u > 0) | (activation != "drelu"))).float().mean())
        for g, u in inner(student, PADDED)
    ]
    assert found.figures["density"] == pytest.approx(sum(share) / len(share), abs=1e-6)


def test_scales_are_those_of_the_step_before(model: Model) -> None:
    student = model()
    found = objective(student, None, asked(losses={"distill": 0.0}, penalty={"weight": 1.0, "ramp": 0.01}))
    first = float(found.loss(TOKENS, WHOLE, 18).detach())
    with torch.no_grad():
        student.model.layers[0].mlp.gate_proj.weight.mul_(3)
    old, fresh = (
        float(each.loss(TOKENS, WHOLE, 19).detach()) for each in (found, objective(student, None, found.recovery))
    )
    assert fresh == pytest.approx(first, rel=1e-2) and abs(old - fresh) > 1e-3


def test_growth_by_hand() -> None:
    line = Penalty(ramp=0.5)
    assert [grown(line, at) for at in (0, 0.25, 0.5, 0.9)] == [0, 0.5, 1, 1]
    sine = Penalty(ramp=1.0, shape="sine", periods=2)
    assert [grown(sine, at) for at in (0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert grown(sine, 0.125) == pytest.approx(0.25 * (1 - math.cos(math.pi / 4)))
    assert grown(sine, 0.125) < grown(Penalty(ramp=1.0), 0.125), "it starts flat"


# Controllers


def test_path_of_what_is_predicted() -> None:
    line = Joint(density=0.25)
    assert [predicted_path(line, at) for at in (0, 0.25, 0.5, 0.9)] == [1, 0.625, 0.25, 0.25]
    assert [predicted_path(Joint(density=0.25, ramp=0.4, path="geometric"), at) for at in (0, 0.2, 0.4, 1)] == [
        1,
        0.5,
        0.25,
        0.25,
    ]


def test_the_weight_leads_to_the_density(model: Model) -> None:
    """A plant whose density falls with the weight: 0.4 / (1 + 2 weight), slowly."""
    recovery = asked(steps=400, penalty={"weight": 0.1, "density": 0.1, "ramp": 0.5})
    found = objective(model(), None, recovery)
    density, seen = 0.4, []
    for step in range(400):
        found._steer(density, step)
        density += 0.2 * (0.4 / (1 + 2 * found._weight(step)) - density)
        seen.append(density)
    assert (
        found.begin == 0.4
        and found.path(399) == pytest.approx(0.1)
        and found.path(99) == pytest.approx((0.4 * 0.1) ** 0.5, rel=0.02)
    )
    assert seen[-1] == pytest.approx(0.1, rel=0.05) and min(seen) > 0.08
    assert found.path(100) < seen[100] < 0.3 and found.path(150) < seen[150] < 0.2, (
        "on the way it follows the path, with a lag"
    )


def test_state_round_trip(model: Model) -> None:
    settings = asked(penalty={"weight": 0.4, "density": 0.05})
    first, second = (objective(model(), model(None), settings) for _ in range(2))
    for step in range(3):
        first.loss(TOKENS, WHOLE, step)
        first.after(step)
    second.restore(first.state())
    assert {k: v for k, v in second.state().items() if k != "cpu_seconds"} == {
        k: v for k, v in first.state().items() if k != "cpu_seconds"
    }
    goes_on = second.loss(TOKENS, PADDED, 3)
    assert torch.equal(first.loss(TOKENS, PADDED, 3), goes_on)
    third = objective(model(), model(None), settings)
    assert not torch.equal(third.loss(TOKENS, PADDED, 3), goes_on), "the memory matters"


def test_controllers_are_led_once_a_step(model: Model) -> None:
    """By the mean of the micro-batches since they were last led; what is left over is kept with the state."""
    settings = asked(penalty={"weight": 0.4, "density": 0.05, "ramp": 0.5})
    one, several = (objective(model(), None, settings) for _ in range(2))
    for step, density in enumerate((0.4, 0.3, 0.2)):
        one._steer(density, step)
    for step, densities in enumerate(((0.4,), (0.2, 0.5), (0.3, 0.15))):
        for at, density in enumerate(densities):
            if (step, at) == (2, 0):
                state = several.state()
                several = objective(model(), None, settings)
                several.restore(state)
            several._steer(density, step)
    first_of_the_second, rest_and_first_of_the_third = 0.2, (0.5 + 0.3) / 2
    by_hand = objective(model(), None, settings)
    for step, density in enumerate((0.4, first_of_the_second, rest_and_first_of_the_third)):
        by_hand._steer(density, step)
    assert (several.mean, several.weight) == pytest.approx(
        (by_hand.mean, by_hand.weight), rel=1e-12
    ) and several.weight != one.weight
    assert several.pending["density"].count == 1


def test_figures_are_means_over_micro_batches(model: Model) -> None:
    found = objective(model(), model(None), asked(penalty={"weight": 0.4, "density": 0.05}))
    seen = []
    for rows in (slice(0, 2), slice(2, 4)):
        found.loss(TOKENS[rows], WHOLE[rows], 0)
        seen.append(found.figures["kl"])
    assert found.after(0)["kl"] == pytest.approx(sum(seen) / 2) and seen[0] != seen[1]
    found.loss(TOKENS, WHOLE, 1)
    assert found.after(1)["kl"] == found.figures["kl"]


# Predictors


def test_predictors_are_trained_with_the_weights(model: Model) -> None:
    student = model()
    arch, recovery = load_arch("llama"), asked(predictors={"density": 0.2}, steps=10)
    generator = torch.Generator().manual_seed(0)
    units = {
        site: make_unit(SitePlan(gate=fresh_predictor(64, 176, 8, generator)), torch.device("cpu"), 1.0)
        for site in arch.sites(student.config)
    }
    found = objective(student, model(None), recovery, units=units)
    names = set(found.parameters())
    assert {"layers.1.ffn.fc1", "layers.0.ffn.bias", "model.layers.0.mlp.up_proj.weight"} <= names
    loss = found.loss(TOKENS, WHOLE, 9)
    loss.backward()
    assert all(
        each.tensor.grad is not None and bool(each.tensor.grad.any())
        for name, each in found.parameters().items()
        if "ffn" in name
    )
    kept = found.figures["predicted"]
    assert 0.9 < kept <= 1.0 and found.figures["price"] == pytest.approx(0.1 * (kept - 0.2)), (
        "fresh ones keep nearly everything, which has a price"
    )
    # everything ruled out: the networks give nothing, and the weights behind them get no gradient
    for unit in units.values():
        unit.tensors["bias"].data.fill_(-1e4)
    student.zero_grad(set_to_none=True)
    found.loss(TOKENS, WHOLE, 9).backward()
    assert found.figures["predicted"] == 0.0
    assert not bool(student.model.layers[1].mlp.down_proj.weight.grad.any())


def test_modules_are_themselves_again(model: Model) -> None:
    student = model()
    before = student(input_ids=TOKENS).logits
    found = objective(student, model(None), asked())
    found.loss(TOKENS, WHOLE, 0)
    assert all("forward" not in vars(block.mlp) for block in student.model.layers)
    assert torch.equal(student(input_ids=TOKENS).logits, before)

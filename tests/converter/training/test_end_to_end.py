"""Training end to end on tiny models: the masked pass is the executors', gradients are brute force's, densities hold,
runs resume to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCAB
from torch import Tensor

from sparsegate.converter.arch import Arch, Site, load_arch
from sparsegate.converter.checkpoint.plan import Entry, Plan, Predictor, Threshold
from sparsegate.converter.checkpoint.stage import Header
from sparsegate.converter.methods.tune import Tune
from sparsegate.converter.modeling.gated import apply_plan, load_dense, recording, remove_plan
from sparsegate.converter.modeling.losses import kl_divergence
from sparsegate.converter.text.windows import Batches
from sparsegate.converter.training import selection as end_to_end
from sparsegate.converter.training.selection import EndToEnd, Unit, noise_costs, train_plan
from sparsegate.converter.training.settings import Settings
from sparsegate.runtime_onnx.errors import InputError

D, N, R = 64, 176, 12
ENTRIES = ("predictor", "predictor and residual", "gate", "gate and residual")
HEADER = Header(format="test")
Load = Callable[[str], tuple[Any, Arch, str]]


@pytest.fixture(name="load")
def _load(tiny_model: Callable[[str], Path]) -> Load:
    def load(model_type: str) -> tuple[Any, Arch, str]:
        model, arch = load_dense(tiny_model(model_type)), load_arch(model_type)
        return model, arch, arch.activation(model.config)

    return load


@pytest.fixture(name="trained_on")
def _trained_on(monkeypatch: pytest.MonkeyPatch) -> list[Batches]:
    """The windows that every run trains on, filled as runs go."""
    seen, plain = [], end_to_end.train
    monkeypatch.setattr(
        end_to_end, "train", lambda objective, data, *rest: seen.append(data) or plain(objective, data, *rest)
    )
    return seen


@pytest.fixture(name="cut_at")
def _cut_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """Make runs break off in a step, or in none; returns the steps begun from then on."""
    plain = EndToEnd.loss

    def cut_at(cut: int | None) -> list[int]:
        steps: list[int] = []

        def loss(self: EndToEnd, tokens: Tensor, mask: Tensor, step: int) -> Tensor:
            steps.append(step)
            if step == cut:
                raise KeyboardInterrupt
            return plain(self, tokens, mask, step)

        monkeypatch.setattr(EndToEnd, "loss", loss)
        return steps

    return cut_at


def windows(count: int, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def batches(count: int = 40, seed: int = 0) -> Batches:
    tokens = windows(count, seed=seed)
    return Batches(tokens, torch.ones_like(tokens, dtype=torch.bool))


def make_entry(kind: str, seed: int, tau: float = 0.0, scale: float = 1.0) -> Entry:
    """An entry that keeps about half; `tau` is added to its thresholds."""
    g = torch.Generator().manual_seed(seed)
    fc1, fc2 = torch.randn(R, D, generator=g) / D**0.5 / scale, torch.randn(N, R, generator=g) / R**0.5
    residual = torch.randn(R, D, generator=g) / 4 if "residual" in kind else None
    if kind.startswith("gate"):
        return Threshold(
            "gate", 0.3 + 0.2 * torch.rand(N, generator=g) + tau, 0.5, None if residual is None else fc1, residual
        )
    return Predictor(fc1, fc2, 0.1 * torch.randn(N, generator=g) + tau, 0.5, residual)


def make_plan(kind: str, tau: float = 0.0, layers: tuple[int, ...] = (0, 1)) -> Plan:
    return {Site(layer): [make_entry(kind, layer + 1, tau + 0.2 * layer)] for layer in layers}


def objective_of(
    loaded: tuple[Any, Arch, str], plan: Plan, local: float = 0.0, target: float = 0.5, steps: int = 10
) -> EndToEnd:
    return EndToEnd(*loaded, plan, Settings(steps, 2, 4e-3), [target], target, local, False, windows(2, seed=9))


@torch.no_grad()
def logits(model: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits


def executed(
    loaded: tuple[Any, Arch, str], plan: Plan, tokens: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, dict[Site, float]]:
    """Logits and densities of the executors of reference.py; the model is dense again afterwards."""
    model, arch, activation = loaded
    try:
        with recording(apply_plan(model, plan, arch, activation)) as seen:
            return logits(model, tokens, mask), seen.density()
    finally:
        remove_plan(model)


def inputs_of(model: Any, arch: Arch, layer: int, tokens: Tensor) -> Tensor:
    """What enters a layer's feed-forward network: [B, S, d]."""
    found: list[Tensor] = []
    handle = model.get_submodule(arch.ffn_module(layer)).register_forward_pre_hook(
        lambda _, given: found.append(given[0])
    )
    logits(model, tokens)
    handle.remove()
    return found[0]


def divergence(loaded: tuple[Any, Arch, str], plan: Plan, tokens: Tensor) -> float:
    return float(kl_divergence(logits(loaded[0], tokens), executed(loaded, plan, tokens)[0]))


def trained(
    loaded: tuple[Any, Arch, str],
    plan: Plan,
    folder: Path,
    densities: list[float],
    start: float = 0.5,
    data: Batches | None = None,
    **tune: Any,
) -> Any:
    settings = Tune(**({"steps": 40, "precision": "fp32"} | tune))
    return train_plan(*loaded, plan, start, densities, data or batches(), settings, 0, folder, HEADER)


# The masked pass


@pytest.mark.parametrize("model_type", ["llama", "phi"])
@pytest.mark.parametrize("kind", ENTRIES)
def test_masked_pass_is_the_executors(model_type: str, kind: str, load: Load) -> None:
    loaded, tokens = load(model_type), windows(3)
    objective = objective_of(loaded, make_plan(kind))
    plan = objective.plan(tokens, 0.4)
    for site, unit in objective.units.items():
        unit.shift = shift_of(unit, plan[site][0])
    with objective.masking() as seen:
        found = logits(loaded[0], tokens)
    expected, densities = executed(loaded, plan, tokens)
    assert float((found - expected).abs().max()) < 1e-5
    assert [float(share) for share, _ in seen] == pytest.approx(list(densities.values()), abs=1e-6)
    assert float((found - logits(loaded[0], tokens)).abs().max()) > 0.1, "the plan does something"
    for unit in objective.units.values():
        unit.shift += 0.01
    with objective.masking():
        assert float((logits(loaded[0], tokens) - expected).abs().max()) > 1e-3, (
            "a control that keeps a few neurons fewer"
        )
    with pytest.raises(KeyboardInterrupt), objective.masking():
        raise KeyboardInterrupt
    assert not any("forward" in vars(module) for module in loaded[0].modules()), "masking ends where the pass raises"


def shift_of(unit: Unit, entry: Entry) -> float:
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
    plan = {site: [unit.entry(0.5)] for site, unit in objective.units.items()}
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
    assert {site: entry.density for site, (entry,) in plan.items()} == pytest.approx(found, abs=1e-5)
    assert abs(found[Site(0)] - found[Site(1)]) > 0.005, "layers are free"


def test_plan_reaches_a_density_far_from_the_start(load: Load) -> None:
    loaded, tokens = load("llama"), windows(8)
    plan: Plan = {
        Site(layer): [Threshold("gate", torch.full((N,), 0.01), 0.99)] for layer in range(2)
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
    objective.restore({"price": 0.7})
    objective.loss(tokens, torch.ones_like(tokens, dtype=torch.bool), 0).backward()
    unit = objective.units[site]
    share = objective.figures["density"]
    price = max(0.0, 0.7 + end_to_end.INTEGRAL * (share - 0.45))
    assert objective.state() == {"price": pytest.approx(price)} and objective.figures["price"] == pytest.approx(price)
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
    (
        kl_divergence(logits(model, tokens), sparse)
        + max(0.0, price + end_to_end.PROPORTIONAL * (share - 0.45)) * mask.mean()
    ).backward()
    assert mask.grad is not None
    slope = torch.sigmoid(logit) * torch.sigmoid(-logit)
    expected = {"bias": (mask.grad * slope).sum((0, 1)), "fc2": torch.einsum("bsn,bsr->nr", mask.grad * slope, inner)}
    for name, gradient in expected.items():
        found = unit.tensors[name].grad
        assert found is not None and float((found - gradient).abs().max()) < 1e-4 * float(gradient.abs().max())
        assert float((found - mask.grad.sum((0, 1)) if name == "bias" else found).abs().max()) > 1e-2 * float(
            gradient.abs().max()
        )


def energies(objective: EndToEnd, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By hand, for every token [T] and neuron [n]: the change of the weighted lost energy by toggling that one mask
    from 0 to 1, its plain derivative there, and the mask's slope.
    """
    module = objective.model.get_submodule(objective.arch.ffn_module(site.layer))
    unit, x = objective.units[site], inputs_of(objective.model, objective.arch, site.layer, tokens).flatten(0, 1)
    with torch.no_grad():
        parts = end_to_end.ffn_parts(module, objective.arch, objective.activation, x)
        inner = torch.relu(x / unit.scale @ unit.tensors["fc1"].T) if "fc1" in unit.tensors else None
        logit = unit.logits(inner, parts.gate).double()
        rows = end_to_end.down_rows(module, objective.arch).double()
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
    if getattr(module, objective.arch.ffn.down).bias is not None:
        whole = whole + getattr(module, objective.arch.ffn.down).bias.double()
    share = objective.worth[site] / whole.square().sum()
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
    with objective.masking() as seen:
        objective.model(input_ids=tokens, use_cache=False)
    bias = objective.units[Site(1)].tensors["bias"]
    (found,) = torch.autograd.grad(seen[0][1], bias)
    toggled, plain, slope = energies(objective, Site(1), tokens)
    sign = 1 if kind.startswith("predictor") else -1  # a gate's bias is subtracted
    expected, without = sign * (toggled * slope).sum(0).float(), sign * (plain * slope).sum(0).float()
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert float((found - without).abs().max()) > 1e-2 * float(expected.abs().max()), "the plain derivative is another"
    if tau == -9.0:
        assert float(seen[0][0].detach()) == 1.0 and not bool(without.any()), (
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


# The controller


def test_target_sinks_over_half_a_level(load: Load) -> None:
    loaded = load("llama")
    objective = EndToEnd(
        *loaded, make_plan("gate"), Settings(20, 2, 4e-3, levels=2), [0.5, 0.2], 1.0, 0.0, False, windows(2)
    )
    first = [0.9, 0.8, 0.7, 0.6, 0.5] + 5 * [0.5]
    second = [0.44, 0.38, 0.32, 0.26, 0.2] + 5 * [0.2]
    assert [objective.target(step) for step in range(20)] == pytest.approx(first + second)


@pytest.mark.parametrize(("price", "target", "wanted"), [(0.0, 0.9, 0.0), (0.0, 0.1, 1.0), (0.01, 0.9, 0.0)])
def test_price_is_never_negative(price: float, target: float, wanted: float, load: Load) -> None:
    objective, tokens = objective_of(load("llama"), make_plan("predictor"), target=target), windows(2)
    objective.restore({"price": price})
    loss = objective.loss(tokens, torch.ones_like(tokens, dtype=torch.bool), 0)
    excess = objective.figures["density"] - target
    assert objective.price == pytest.approx(max(0.0, price + 0.1 * excess), abs=1e-7)
    added = float(loss.detach()) - objective.figures["kl"]
    assert added == pytest.approx(wanted * (5.1 * excess) * objective.figures["density"], abs=1e-5) and (
        excess > 0
    ) == bool(wanted)


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
            site: [Predictor(e.fc1, 0.3 * e.fc2, torch.full((N,), -1.0), 1.0)]
            for site, (e,) in make_plan(kind).items()
            if isinstance(e, Predictor)
        }
        start = 1.0
    else:
        fresh, start = make_plan(kind), 0.5
    if kind == "gate":  # thresholds without reason, so that there is something to learn
        g = torch.Generator().manual_seed(0)
        fresh = {
            site: [Threshold("gate", e.tau * (0.2 + 2 * torch.rand(N, generator=g)), 0.5)]
            for site, (e,) in fresh.items()
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
        not torch.equal(tensor, fresh[site][0].tensors()[role])
        for site, (entry,) in plan.items()
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
        assert {site: entry.density for site, (entry,) in plan.items()} == pytest.approx(found, abs=1e-5)


def test_training_in_bf16_gives_a_plan_of_the_same_density(load: Load, tmp_path: Path) -> None:
    loaded = load("llama")
    (half,) = trained(loaded, make_plan("predictor and residual"), tmp_path / "half", [0.4], steps=12, precision="bf16")
    (full,) = trained(loaded, make_plan("predictor and residual"), tmp_path / "full", [0.4], steps=12)
    for (a,), (b,) in zip(half.values(), full.values(), strict=True):
        for role, tensor in a.tensors().items():
            assert tensor.dtype == torch.float32 and not torch.equal(tensor, b.tensors()[role])
            assert torch.nn.functional.cosine_similarity(tensor.flatten(), b.tensors()[role].flatten(), dim=0) > 0.95
    assert sum(e.density for (e,) in half.values()) / 2 == pytest.approx(0.4, abs=0.003)


def test_other_sites_pass_through(load: Load, tmp_path: Path) -> None:
    others: Plan = {
        Site(0, kind=f"linear:{name}"): [Threshold("input", torch.rand(D), 0.7)] for name in ("q_proj", "up_proj")
    }
    (plan,) = trained(load("llama"), others | make_plan("gate", layers=(1,)), tmp_path, [0.5], steps=2)
    assert set(plan) == {*others, Site(1)} and all(plan[site] is entries for site, entries in others.items())


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
        start = {Site(layer): [make_entry("predictor and residual", layer + 1, scale=scale)] for layer in range(2)}
        (plan,) = trained(loaded, start, tmp_path / str(scale), [0.4], steps=20)
        _, found = executed(loaded, plan, batches().tokens[::16])
        assert sum(found.values()) / 2 == pytest.approx(0.4, abs=0.003), "fc1 works on x itself"
        plans.append(plan)
    for site, (one,) in plans[0].items():
        other = plans[1][site][0].tensors()
        for role, tensor in one.tensors().items():
            assert torch.allclose(tensor, other[role] * (8 if "fc1" in role else 1), rtol=1e-3, atol=1e-5)


# Resume


def bits(plans: list[Plan]) -> list[tuple[str, float, bytes]]:
    return [
        (f"{site.key}.{role}", e.density, t.numpy().tobytes())
        for plan in plans
        for site, (e,) in plan.items()
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
    monkeypatch.setattr(end_to_end, "Settings", partial(Settings, save_every=4))
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
    monkeypatch.setattr(end_to_end, "Settings", partial(Settings, save_every=6))
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
        tune = Tune(steps=3, rate=rate, precision="fp32")
        return train_plan(*loaded, plan, 0.5, densities, batches(18), tune, header.seed, folder, header)

    changed = base | {"rate" if change == "tune" else change: other[change]}
    first, second = go(tmp_path / "a", **base), go(tmp_path / "a", **changed)  # type: ignore[arg-type]
    assert bits(second) == bits(go(tmp_path / "b", **changed)) != bits(first)  # type: ignore[arg-type]


# What noise costs


def test_noise_costs_more_where_the_output_is_larger(load: Load) -> None:
    model, arch, _ = load("llama")
    sites, tokens = [Site(0), Site(1)], windows(4)
    before = noise_costs(model, arch, sites, tokens)
    assert list(before) == sites and min(before.values()) > 0 and noise_costs(model, arch, sites, tokens) == before
    for site in sites:
        weight = model.model.layers[site.layer].mlp.down_proj.weight.data
        weight *= 4
        larger = noise_costs(model, arch, sites, tokens)[site]
        weight /= 16
        smaller = noise_costs(model, arch, sites, tokens)[site]
        weight *= 4
        assert larger > before[site] > 2 * smaller, "the output is a larger or a smaller part of the residual stream"
    assert not any(module._forward_hooks for module in model.modules())


def test_noise_costs_are_per_unit_of_energy(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model, arch, _ = load("llama")
    at = []
    for energy in (0.0004, 0.0016):
        monkeypatch.setattr(end_to_end, "_NOISE", energy)
        at.append(noise_costs(model, arch, [Site(0), Site(1)], windows(4)))
    assert at[0] == pytest.approx(at[1], rel=0.1)


# What cannot be trained


def test_a_plan_without_networks(load: Load, tmp_path: Path) -> None:
    plan: Plan = {Site(0, kind="linear:q_proj"): [Threshold("input", torch.rand(D), 0.7)]}
    with pytest.raises(InputError, match=r"must gate a feed-forward network, got layers\.0\.linear\.q_proj\. "):
        trained(load("llama"), plan, tmp_path, [0.5])


@pytest.mark.parametrize(("full", "padded"), [(1, 0), (0, 3)])
def test_too_few_windows(full: int, padded: int, load: Load, tmp_path: Path) -> None:
    given = batches(full + padded)
    given.mask[full:, 20:] = False
    with pytest.raises(InputError, match=f"got {full} full ones of {full + padded}. Give more text.$"):
        trained(load("llama"), make_plan("gate"), tmp_path, [0.5], data=given)
    assert not list(tmp_path.iterdir())

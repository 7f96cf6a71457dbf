"""Plans of a tiny model that training end to end starts from, its objective, and what the executors make of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import VOCAB
from torch import Tensor

from sparsegate.converter.arch import Arch, Site
from sparsegate.converter.checkpoint.plan import Gate, Plan, Predictor, Residual, SitePlan, Threshold
from sparsegate.converter.checkpoint.stage import Header
from sparsegate.converter.methods.tune import Tune
from sparsegate.converter.modeling.gated import apply_plan, recording, remove_plan
from sparsegate.converter.modeling.losses import kl_divergence
from sparsegate.converter.text.windows import Batches
from sparsegate.converter.training.inputs import Models, TrainingRun
from sparsegate.converter.training.plans import TrainedPlan, train_plan
from sparsegate.converter.training.selection import SelectionObjective
from sparsegate.converter.training.settings import Settings

D, N, R = 64, 176, 12
ENTRIES = ("predictor", "predictor and residual", "gate", "gate and residual")
HEADER = Header(format="test")
Load = Callable[[str], tuple[Any, Arch, str]]


def windows(count: int, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def batches(count: int = 40, seed: int = 0) -> Batches:
    tokens = windows(count, seed=seed)
    return Batches(tokens, torch.ones_like(tokens, dtype=torch.bool))


def make_entry(kind: str, seed: int, tau: float = 0.0, scale: float = 1.0) -> SitePlan:
    """A plan that keeps about half; `tau` is added to its thresholds."""
    g = torch.Generator().manual_seed(seed)
    fc1, fc2 = torch.randn(R, D, generator=g) / D**0.5 / scale, torch.randn(N, R, generator=g) / R**0.5
    residual = torch.randn(R, D, generator=g) / 4 if "residual" in kind else None
    if kind.startswith("gate"):
        gate: Gate = Threshold("gate", 0.3 + 0.2 * torch.rand(N, generator=g) + tau, 0.5)
        return SitePlan((), gate, None if residual is None else Residual(residual, fc1))
    gate = Predictor(fc1, fc2, 0.1 * torch.randn(N, generator=g) + tau, 0.5)
    return SitePlan((), gate, None if residual is None else Residual(residual))


def make_plan(kind: str, tau: float = 0.0, layers: tuple[int, ...] = (0, 1)) -> Plan:
    return {Site(layer): make_entry(kind, layer + 1, tau + 0.2 * layer) for layer in layers}


def input_plan(layers: tuple[int, ...] = (0, 1)) -> Plan:
    """Thresholds on the inputs of a few linear maps of each block, those of a network and of attention."""
    g = torch.Generator().manual_seed(5)
    sizes = {"q_proj": (D, 1.0), "o_proj": (D, 0.05), "gate_proj": (D, 1.0), "down_proj": (N, 0.02)}
    return {
        Site(layer, kind=f"linear:{name}"): SitePlan(
            gate=Threshold("input", size * (0.4 + 0.6 * torch.rand(width, generator=g)), 0.6)
        )
        for layer in layers
        for name, (width, size) in sizes.items()
    }


def models_of(loaded: tuple[Any, Arch, str]) -> Models:
    """The model as its own teacher."""
    model, arch, activation = loaded
    return Models(model, None, arch, activation)


def objective_of(
    loaded: tuple[Any, Arch, str], plan: Plan, local: float = 0.0, target: float = 0.5, steps: int = 10
) -> SelectionObjective:
    tune = Tune(local=local, precision="fp32", updates="none", offsets=False, likeliest=0)
    return SelectionObjective(
        models_of(loaded), plan, tune, Settings(steps, 2, 4e-3), target, [target], windows(2, seed=9)
    )


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


def trained(*given: Any, **more: Any) -> list[Plan]:
    """The plans of `trained_with_weights`."""
    return [each.plan for each in trained_with_weights(*given, **more)]


def trained_with_weights(
    loaded: tuple[Any, Arch, str],
    plan: Plan,
    folder: Path,
    densities: list[float],
    start: float = 0.5,
    data: Batches | None = None,
    density_text: Batches | None = None,
    **tune: Any,
) -> list[TrainedPlan]:
    """What a training gives, of what selects alone unless `tune` says more."""
    settings = Tune(**({"steps": 40, "precision": "fp32", "updates": "none", "offsets": False, "likeliest": 0} | tune))
    run = TrainingRun(data or batches(), 0, folder, HEADER, density_text)
    return train_plan(models_of(loaded), plan, start, densities, settings, run)

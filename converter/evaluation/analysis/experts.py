"""Neurons inside the experts of a mixture: the activation swapped by (layer, expert), what is active counted, and
neurons masked.

transformers holds the experts of a layer in one module with 3-D weights, gate_up_proj [E, 2 n, d] (gate rows first) and
down_proj [E, d, n], which is called with the tokens [T, d], the chosen experts [T, k] and their weights [T, k]. A site
is Site(layer, expert); the router is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ....runtime_onnx.errors import InputError
from ...arch.site import Site
from ...modeling.blocks import parts_of
from ...modeling.taps import masked, replaced
from ...text.windows import Batches
from .dense import groups

SOURCE = (
    "Turbo Sparse, arXiv 2406.05955: dReLU in every expert; the zeros of relu(gate) * relu(up) inside each routed "
    "expert",
    "active share of all experts' neurons = (k / E) (1 - s) where every expert is as sparse as the others",
)
ExpertTap = Callable[[Site, Tensor, Tensor], Tensor | None]
"""Called at a site that tokens were routed to with their rows [t] int64 among the layer's tokens and z [t, n], the down
projection's input; returns the neurons that stay [t, n] or [n] bool, or None for all.
"""


@dataclass(frozen=True)
class ExpertActivity:
    """What an expert did: `tokens` passed its layer, `routed` of them reached it, and in those `nonzero` of routed *
    `units` neurons were not zero.
    """

    tokens: int
    routed: int
    nonzero: int
    units: int

    @property
    def share(self) -> float:
        """Share of the layer's tokens that were routed to the expert."""
        return self.routed / self.tokens

    @property
    def density(self) -> float:
        """Share of non-zero neurons in the tokens routed to the expert; 0 without any."""
        return self.nonzero / (self.routed * self.units) if self.routed else 0.0


@dataclass(frozen=True)
class Activity:
    """The experts' activity by site, Site(layer, expert)."""

    sites: dict[Site, ExpertActivity]

    @property
    def active(self) -> float:
        """Active share of the feed-forward neurons: mean over tokens and layers of the active ones over those of all
        experts.
        """
        return sum(site.nonzero for site in self.sites.values()) / sum(
            site.tokens * site.units for site in self.sites.values()
        )

    @property
    def sparsity(self) -> float:
        """Share of zeros inside routed experts, every expert that was reached counted alike."""
        reached = [site.density for site in self.sites.values() if site.routed]
        return 1 - sum(reached) / len(reached)


def expert_modules(model: Any) -> dict[int, Any]:
    """The fused experts of a transformers model by layer; layers without experts are absent. Raises InputError where
    there are none, or of another layout.
    """
    modules: dict[int, Any] = {}
    for layer, block in enumerate(model.get_decoder().layers):
        for name, module in block.named_modules():
            weight = getattr(module, "gate_up_proj", None)
            if not isinstance(weight, Tensor) or weight.dim() != 3:
                continue
            experts, double, hidden = weight.shape
            plain = not (
                getattr(module, "has_bias", False) or getattr(module, "has_post_expert_norm", False)
            ) and getattr(module, "is_concatenated", True)
            if not plain or tuple(module.down_proj.shape) != (experts, hidden, double // 2):
                what = f"{type(module).__name__} with gate_up_proj {list(weight.shape)} at layer {layer} ({name})"
                raise InputError(
                    f"Experts must be gate and up rows one after the other, [E, 2 n, d], without biases, got {what}. "
                    "Analyse another model."
                )
            modules[layer] = module
    if not modules:
        raise InputError(
            "The model must have experts in 3-D weights (gate_up_proj [E, 2 n, d]), got none in "
            f"{type(model).__name__}. Give a mixture."
        )
    return modules


def expert_sites(model: Any) -> dict[Site, int]:
    """Every expert's site and its number of neurons n, in order."""
    return {
        Site(layer, expert): module.down_proj.shape[-1]
        for layer, module in expert_modules(model).items()
        for expert in range(len(module.down_proj))
    }


@contextmanager
def swapped(model: Any, activations: Mapping[Site, str] | None = None, see: ExpertTap | None = None) -> Iterator[None]:
    """`model` with other activations at the listed experts, and `see` at every expert that tokens are routed to, inside
    the block.

    Raises InputError for a site that is no expert of the model.
    """
    activations = activations or {}
    unknown = sorted(set(activations) - set(expert_sites(model)))
    if unknown:
        raise InputError(
            f"A site must be an expert of the model, got {unknown[0].key}. Take the sites of expert_sites(model)."
        )
    forwards = {
        module: partial(_forward, module, layer, activations, see) for layer, module in expert_modules(model).items()
    }
    with replaced(forwards):
        yield


@torch.no_grad()
def measure(
    model: Any, batches: Batches, activations: Mapping[Site, str] | None = None, see: ExpertTap | None = None
) -> Activity:
    """The activity of every expert on windows of tokens, padding left out; `activations` and `see` as in `swapped`.

    What `see` drops counts as zero. Raises InputError for windows without a token.
    """
    if not batches.count:
        raise InputError("Windows must hold a token, got none. Give longer text.")
    units = expert_sites(model)
    routed, nonzero = dict.fromkeys(units, 0), dict.fromkeys(units, 0)

    def count(counted: Tensor, site: Site, rows: Tensor, z: Tensor) -> Tensor | None:
        keep = None if see is None else see(site, rows, z)
        here = counted[rows]
        active = z != 0 if keep is None else (z != 0) & keep
        routed[site] += int(here.sum())
        nonzero[site] += int(active[here].sum())
        return keep

    for tokens, mask in groups(batches):
        with swapped(model, activations, partial(count, mask.flatten().to(model.device))):
            model(input_ids=tokens.to(model.device), attention_mask=mask.long().to(model.device), use_cache=False)
    return Activity({site: ExpertActivity(batches.count, routed[site], nonzero[site], n) for site, n in units.items()})


def _forward(
    module: Any,
    layer: int,
    activations: Mapping[Site, str],
    see: ExpertTap | None,
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
) -> Tensor:
    """The experts of a layer one after the other: x [T, d], chosen [T, k] int64, weights [T, k] -> [T, d]."""
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        site = Site(layer, expert)
        gate, up = F.linear(x[rows], module.gate_up_proj[expert]).chunk(2, dim=-1)
        activation = activations.get(site)
        if activation is None:
            z = module.act_fn(gate) * up
        else:
            z = parts_of(activation, gate, up).z
        keep = None if see is None else see(site, rows, z)
        if keep is not None:
            z = masked(z, keep)
        out.index_add_(0, rows, (F.linear(z, module.down_proj[expert]) * weights[rows, place, None]).to(out.dtype))
    return out

"""Signs of a gated network's neurons, chosen before an activation drops one of them.

In act(gate x) * (up x) -> down, negating row i of up and column i of down together changes nothing. dReLU, relu(gate x)
* relu(up x) (arXiv 2406.05955, section 3), keeps what a neuron says with both factors positive and drops the rest, so
of the two signs the one is taken on which the neuron has more energy where its gate is open. An activation that leaves
up alone, such as ReLU on the gate, keeps the same under either sign.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.ops.activation import cuts_up
from ..arch import Arch
from ..arch.site import Site
from ..modeling.blocks import activate, ffn_activation, ffn_products
from ..modeling.taps import tapped_inputs
from .inputs import AT_ONCE


@torch.no_grad()
def orient(
    model: Any, arch: Arch, activation: str, tokens: Tensor, sites: Iterable[Site] | None = None
) -> dict[Site, float]:
    """Flip (up_i, down_i) to (-up_i, -down_i), in place, wherever sum (act(g_i) u_i)^2 over tokens [N, S] with g_i > 0
    is larger on the negative side of u_i.

    The model's function stays. Returns, for every one of `sites` (default: all feed-forward networks), the share of the
    energy of z = act(g) * u that relu(g) * relu(u) would now keep, act's own values in place of relu(g)'s. A plain
    network has no such freedom: it is left alone and is not in the result. Raises InputError for a network whose
    activation drops negative up already: its signs are no longer free.
    """
    if arch.ffn.kind == "plain":
        return {}
    wanted = list(arch.sites(model.config) if sites is None else sites)
    modules = {site: model.get_submodule(arch.ffn_module(site.layer)) for site in wanted}
    for site, module in modules.items():
        if cuts_up(ffn_activation(module, activation)):
            raise InputError(
                f"{site.key} must be oriented while negative up still counts, got the activation drelu there. Orient "
                "before the swap."
            )
    sums: dict[Site, Tensor] = {}
    adding = {module: partial(_add, sums, site, module, arch, activation) for site, module in modules.items()}
    with tapped_inputs(adding):
        for rows in tokens.split(AT_ONCE):
            model.get_decoder()(input_ids=rows.to(model.device), use_cache=False)
    for site, module in modules.items():
        flip(module, arch, sums[site][1] > sums[site][0])
    return {
        site: float(torch.maximum(s[0], s[1]).sum() / s.sum().clamp_min(torch.finfo(s.dtype).tiny))
        for site, s in sums.items()
    }


def _add(sums: dict[Site, Tensor], site: Site, module: Any, arch: Arch, activation: str, x: Tensor) -> None:
    energy = energy_by_sign(module, arch, ffn_activation(module, activation), x.flatten(0, -2))
    sums[site] = sums[site] + energy if site in sums else energy


@torch.no_grad()
def energy_by_sign(module: Any, arch: Arch, activation: str, x: Tensor) -> Tensor:
    """Energy of act(g_i) u_i over rows x [T, d] of a gated network where the gate is open and up positive, where it is
    open and up negative, and elsewhere: [3, n] fp64 on the CPU. `activation` is taken, whatever the network was swapped
    to.
    """
    before, up = ffn_products(module, arch, x)
    assert up is not None
    gate = activate(activation, before)
    energy, opened = (
        (gate * up).double().square(),
        gate > 0,
    )  # every activation here is positive exactly where its argument is
    sides = torch.stack([(energy * (side & opened)).sum(0) for side in (up > 0, up < 0)])
    return torch.cat([sides, energy.sum(0, keepdim=True) - sides.sum(0, keepdim=True)]).cpu()


@torch.no_grad()
def flip(module: Any, arch: Arch, flipped: Tensor) -> None:
    """Negate up's rows, with their biases, and down's columns where `flipped` [n]."""
    signs = torch.where(flipped, -1.0, 1.0)
    down = getattr(module, arch.ffn.down).weight
    down *= signs.to(down)
    linear = getattr(module, str(arch.ffn.gate_up or arch.ffn.up))
    for tensor in (linear.weight, linear.bias):
        if tensor is not None:
            rows = tensor[-len(signs) :]  # of gate and up in one, up is the second half
            rows *= signs.to(tensor).view(-1, *[1] * (tensor.dim() - 1))

"""What every key of a family costs at every density, measured block by block in one pass over a few windows.

A key's gates change the output of their own block by e. With the gradients g of `modeling/fisher.py` at that output the
divergence of the whole model is (g . e)^2 / 2, summed over the positions: no block after it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ..arch import Arch
from ..modeling.fisher import fisher_gradients
from ..modeling.gated import Gates, make_gates, switched
from ..modeling.taps import block_calls
from ..progress import track
from ..text.windows import Batches
from .allocation import GRID, Curves
from .families import Family

WINDOWS, DRAWS = 4, 4
"""Windows that sensitivities are measured on, and the labels that are drawn for every position."""


def few_windows(batches: Batches, count: int) -> Batches:
    """`count` windows from all over a text, fewer where there are not as many."""
    rows = torch.linspace(0, len(batches.tokens) - 1, min(count, len(batches.tokens))).long()
    return Batches(batches.tokens[rows], batches.mask[rows])


@torch.no_grad()
def sensitivities(model: Any, arch: Arch, activation: str, batches: Batches, family: Family) -> Curves:
    """Divergence from the ungated model (nats a token) with one key at each density of GRID and all others at 1, by
    key.

    Every block runs once a window with its graph, and once for each of its own keys and densities. Raises InputError
    where a divergence is no number.
    """
    gates = _gates(model, arch, activation, family)
    curves = {key: torch.zeros(len(GRID), dtype=torch.float64) for key in family.sites}
    blocks = list(model.get_decoder().layers)
    keys = [[key for key, site in family.sites.items() if site.layer == layer] for layer in range(len(blocks))]
    generator = torch.Generator(model.device).manual_seed(0)
    windows = [row[mask][None] for row, mask in zip(batches.tokens, batches.mask, strict=True) if int(mask.sum()) > 1]
    for window in track(windows, unit="window"):
        tokens = window.to(model.device)
        draws = list(fisher_gradients(model, blocks, tokens, DRAWS, generator))
        leaving = draws[0][0]
        calls = block_calls(model, blocks, tokens, torch.ones_like(tokens, dtype=torch.bool))
        entering = [calls.hidden, *leaving[:-1]]
        for layer in track(range(len(blocks)), unit="block"):
            gradients = torch.cat([gradient[layer] for _, gradient in draws]).float()
            for key in keys[layer]:
                for at, gated in enumerate(gates[key]):
                    with switched(blocks[layer], gated):
                        output = blocks[layer](entering[layer], **calls.keywords[layer])
                    change = (output[0] if isinstance(output, tuple) else output) - leaving[layer]
                    curves[key][at] += _divergence(gradients, change)
    tokens_seen = sum(window.numel() for window in windows)
    for key, sums in curves.items():
        if not bool(sums.isfinite().all()):
            raise InputError(f"The divergence with {key} gated must be a number, got NaN. Check the model's weights.")
    return {key: (sums / tokens_seen).tolist() for key, sums in curves.items()}


def _gates(model: Any, arch: Arch, activation: str, family: Family) -> dict[str, list[Gates]]:
    """The gates of every key alone at each density of GRID."""
    gates: dict[str, list[Gates]] = {key: [] for key in family.sites}
    for density in GRID:
        plan = family.make(dict.fromkeys(family.sites, density))
        for key, site in family.sites.items():
            gates[key].append(make_gates(model, {site: plan[site]}, arch, activation))
    return gates


def _divergence(gradients: Tensor, change: Tensor) -> float:
    """Sum over the positions of (g . e)^2 / 2, mean over the draws: gradients [D, S, d], change [1, S, d]."""
    return float((gradients * change.float()).sum(-1).square().sum()) / (2 * len(gradients))

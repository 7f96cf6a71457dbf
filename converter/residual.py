"""Residual heads in closed form: what a plan's masks skip, regressed on a hidden layer that is cheap to compute.

Ridge regression of the skipped neurons' summed output on relu(fc1 x), layer by layer on the sparse model's own inputs, so that a layer makes up for the layers
before it too. A predictor's fc1 is there already; gate thresholds get one: the directions of x that a linear map of low rank explains the skipped output
best by (reduced-rank regression, Izenman 1975), each with both signs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .arch import Arch, Site
from .blocks import down_rows, ffn_parts
from .data import Batches
from .linalg import Gram
from .plans import Plan, Predictor, Swap, activation_at, deciding
from .reference import EXECUTORS, apply_plan, remove_plan

WINDOWS = 64
COST = 0.05  # of the network's weights, for a residual with an fc1 of its own
_L2 = 1e-3  # relative to the mean square of the regressors
_TOGETHER = 8  # windows


def residual_rank(units: int, matrices: int) -> int:
    """The largest even r with 2 r d <= COST * m d n, m matrices of [n, d]; at least 2."""
    return max(2, int(COST * matrices * units / 2) // 2 * 2)


@torch.no_grad()
def add_residuals(model: Any, arch: Arch, activation: str, plan: Plan, batches: Batches, rank: int) -> Plan:
    """`plan` with a residual [r, d] for every feed-forward site that skips more than zeros, from at most WINDOWS full windows; `rank` (even) is that of fc1 for
    gate thresholds.
    """
    found = dict(plan)
    tokens = batches.tokens[batches.mask.all(1)][:WINDOWS]
    for site in sorted(site for site in plan if site.kind == "ffn"):
        entry = deciding(plan[site])
        if isinstance(entry, Swap):
            continue
        fc1 = entry.fc1
        if not isinstance(entry, Predictor) or fc1 is None:
            fc1 = _directions(_regressed(model, arch, activation, found, site, tokens, lambda x: x), rank)
        wide = fc1.to(model.device)
        gram = _regressed(model, arch, activation, found, site, tokens, lambda x, wide=wide: F.relu(x @ wide.T))
        residual = gram.solve(_L2 * float(gram.hidden.diagonal().mean())).float().contiguous()
        found[site] = [*plan[site][:-1], replace(entry, fc1=fc1, residual=residual)]
    return found


def _directions(gram: Gram, rank: int) -> Tensor:
    """fc1 [rank, d] from sums over x and the skipped output: the leading directions of the ridge regression's fitted values, and their negatives."""
    linear = gram.solve(_L2 * float(gram.hidden.diagonal().mean()))
    _, vectors = torch.linalg.eigh(linear.T @ gram.hidden @ linear)
    half = (linear @ vectors[:, -(rank // 2) :]).T.float()
    return torch.cat([half, -half])


def _regressed(model: Any, arch: Arch, base: str, plan: Plan, site: Site, tokens: Tensor, hidden: Callable[[Tensor], Tensor]) -> Gram:
    """Sums over the tokens [N, S] of hidden(x) and of the skipped output at one site of the model under `plan`."""
    module = model.get_submodule(arch.ffn_module(site.layer))
    entry, activation = deciding(plan[site]), activation_at(plan[site], base)
    assert not isinstance(entry, Swap)
    entry = replace(entry, **{name: t.to(model.device) for name, t in vars(entry).items() if isinstance(t, Tensor)})
    w_down = down_rows(module, arch).float()
    sums: list[Gram] = []

    def hook(_: Any, given: tuple[Tensor, ...]) -> None:
        x = given[0].flatten(0, -2)
        parts = ffn_parts(module, arch, activation, x)
        scores, _ = EXECUTORS[type(entry)](entry, parts.gate.float(), x.float())  # type: ignore[arg-type]
        inner = hidden(x.float())
        if not sums:
            sums.append(Gram.empty(inner.shape[1], w_down.shape[1]))
        sums[0].add(inner, torch.where(scores > entry.tau, 0.0, parts.z.float()) @ w_down)

    apply_plan(model, plan, arch, base)
    handle = module.register_forward_pre_hook(hook)
    try:
        for rows in tokens.split(_TOGETHER):
            model.get_decoder()(input_ids=rows.to(model.device), use_cache=False)
    finally:
        handle.remove()
        remove_plan(model)
    return sums[0]

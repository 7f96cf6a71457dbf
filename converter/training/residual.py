"""Residual heads in closed form: what a plan's masks skip, regressed on a hidden layer that is cheap to compute.

Ridge regression of the skipped neurons' summed output on relu(fc1 x), layer by layer on the sparse model's own inputs,
so that a layer makes up for the layers before it too. A predictor's fc1 is there already; gate thresholds get one: the
directions of x that a linear map of low rank explains the skipped output best by (reduced-rank regression, Izenman
1975), each with both signs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arch import Arch
from ..arch.site import Site
from ..checkpoint.plan import Plan, Predictor, Swap, Threshold, activation_at, deciding
from ..modeling.blocks import down_rows, ffn_parts
from ..modeling.gated import EXECUTORS, apply_plan, remove_plan
from ..modeling.linalg import Gram
from ..modeling.taps import block_calls, tapped_inputs
from ..text.windows import Batches
from .inputs import AT_ONCE

WINDOWS = 64
_L2 = 1e-3  # relative to the mean square of the regressors


@torch.no_grad()
def add_residuals(model: Any, arch: Arch, activation: str, plan: Plan, batches: Batches, rank: int) -> Plan:
    """`plan` with a residual [r, d] for every feed-forward site that skips more than zeros, from at most WINDOWS full
    windows; `rank` (even) is that of fc1 for gate thresholds.

    Hidden states advance block by block, so every block runs twice at most: to see its network's inputs, and with what
    was found for it.
    """
    completed = dict(plan)
    states = _HiddenStates(model, batches.tokens[batches.mask.all(1)][:WINDOWS])
    for layer in range(max((site.layer for site in plan), default=-1) + 1):
        site = Site(layer)
        entry = deciding(plan[site]) if site in plan else None
        if entry is not None and not isinstance(entry, Swap):
            apply_plan(model, completed, arch, activation)
            try:
                inputs = states.inputs(layer, model.get_submodule(arch.ffn_module(layer)))
            finally:
                remove_plan(model)
            completed[site] = [
                *plan[site][:-1],
                _with_residual(model, arch, activation_at(plan[site], activation), site, entry, inputs, rank),
            ]
        apply_plan(model, completed, arch, activation)
        try:
            states.advance(layer)
        finally:
            remove_plan(model)
    return completed


class _HiddenStates:
    """Hidden states [B, S, d] of windows [N, S], all of them full, on their way through a model's blocks."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.blocks = model.get_decoder().layers
        self.keywords: dict[
            int, list[dict[str, Any]]
        ] = {}  # by B: where nothing is padded they do not depend on the tokens
        self.hidden: list[Tensor] = []
        for rows in tokens.split(AT_ONCE):
            call = block_calls(model, self.blocks, rows.to(model.device), torch.ones_like(rows, dtype=torch.bool))
            self.hidden.append(call.hidden)
            self.keywords.setdefault(len(rows), call.keywords)

    def _run(self, layer: int) -> list[Tensor]:
        outputs = [self.blocks[layer](hidden, **self.keywords[len(hidden)][layer]) for hidden in self.hidden]
        return [out[0] if isinstance(out, tuple) else out for out in outputs]

    def inputs(self, layer: int, module: nn.Module) -> list[Tensor]:
        """What enters `module` [T, d] in a block; the hidden states stay before the block."""
        inputs: list[Tensor] = []
        with tapped_inputs({module: inputs.append}):
            self._run(layer)
        return [x.flatten(0, -2) for x in inputs]

    def advance(self, layer: int) -> None:
        """Run a block."""
        self.hidden = self._run(layer)


def _with_residual(
    model: Any, arch: Arch, activation: str, site: Site, entry: Threshold | Predictor, inputs: list[Tensor], rank: int
) -> Threshold | Predictor:
    """The entry with its residual, and gate thresholds with the fc1 of one."""
    module, fc1 = model.get_submodule(arch.ffn_module(site.layer)), entry.fc1
    if not isinstance(entry, Predictor) or fc1 is None:
        fc1 = _directions(_regressed(module, arch, activation, entry, inputs, lambda x: x), rank)
    wide = fc1.to(model.device)
    gram = _regressed(module, arch, activation, entry, inputs, lambda x: F.relu(x @ wide.T))
    residual = gram.solve(_L2 * float(gram.hidden.diagonal().mean())).float().contiguous()
    return replace(entry, fc1=fc1, residual=residual)


def _directions(gram: Gram, rank: int) -> Tensor:
    """fc1 [rank, d] from sums over x and the skipped output: the leading directions of the ridge regression's fitted
    values, and their negatives.
    """
    linear = gram.solve(_L2 * float(gram.hidden.diagonal().mean()))
    _, vectors = torch.linalg.eigh(linear.T @ gram.hidden @ linear)
    half = (linear @ vectors[:, -(rank // 2) :]).T.float()
    return torch.cat([half, -half])


def _regressed(
    module: nn.Module,
    arch: Arch,
    activation: str,
    entry: Threshold | Predictor,
    inputs: list[Tensor],
    hidden: Callable[[Tensor], Tensor],
) -> Gram:
    """Sums over the inputs, each [T, d], of hidden(x) and of the output that a network skips under its entry."""
    w_down = down_rows(module, arch).float()
    entry = replace(entry, **{name: t.to(w_down.device) for name, t in vars(entry).items() if isinstance(t, Tensor)})
    sums: Gram | None = None
    for x in inputs:
        parts = ffn_parts(module, arch, activation, x)
        scores, _ = EXECUTORS[type(entry)](entry, parts.gate.float(), x.float())  # type: ignore[arg-type]
        inner = hidden(x.float())
        sums = sums or Gram.empty(inner.shape[1], w_down.shape[1])
        sums.add(inner, torch.where(scores > entry.tau, 0.0, parts.z.float()) @ w_down)
    assert sums is not None
    return sums

"""Residual heads in closed form: what a plan's masks skip, regressed on a hidden layer that is cheap to compute.

Ridge regression of the skipped neurons' summed output on relu(fc1 x), layer by layer on the sparse model's own inputs,
so that a layer makes up for the layers before it too. A predictor's fc1 is there already; gate thresholds get one: the
directions of x that a linear map of low rank explains the skipped output best by (reduced-rank regression, Izenman
1975), each with both signs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arch import Arch
from ..arch.site import Site
from ..checkpoint.plan import Exact, Gate, Plan, Predictor, Residual, SitePlan, Threshold
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
        if site in plan and not isinstance(plan[site].gate, Exact):
            apply_plan(model, completed, arch, activation)
            try:
                inputs = states.inputs(layer, model.get_submodule(arch.ffn_module(layer)))
            finally:
                remove_plan(model)
            network = _Network(model.get_submodule(arch.ffn_module(layer)), arch, plan[site].activation(activation))
            completed[site] = _with_residual(network, plan[site], inputs, rank)
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


class _Network(NamedTuple):
    """A feed-forward module and the activation that it computes with."""

    module: nn.Module
    arch: Arch
    activation: str


def _with_residual(network: _Network, entry: SitePlan, inputs: list[Tensor], rank: int) -> SitePlan:
    """The site's plan with its residual; behind gate thresholds with a hidden layer of its own."""
    gate = entry.gating
    shared = gate.fc1 if isinstance(gate, Predictor) else None
    fc1 = _directions(_regressed(network, gate, inputs, lambda x: x), rank) if shared is None else shared
    wide = fc1.to(inputs[0].device)
    gram = _regressed(network, gate, inputs, lambda x: F.relu(x @ wide.T))
    weight = gram.solve(_L2 * float(gram.hidden.diagonal().mean())).float().contiguous()
    return replace(entry, residual=Residual(weight, fc1 if shared is None else None))


def _directions(gram: Gram, rank: int) -> Tensor:
    """fc1 [rank, d] from sums over x and the skipped output: the leading directions of the ridge regression's fitted
    values, and their negatives.
    """
    linear = gram.solve(_L2 * float(gram.hidden.diagonal().mean()))
    _, vectors = torch.linalg.eigh(linear.T @ gram.hidden @ linear)
    half = (linear @ vectors[:, -(rank // 2) :]).T.float()
    return torch.cat([half, -half])


def _regressed(network: _Network, gate: Gate, inputs: list[Tensor], hidden: Callable[[Tensor], Tensor]) -> Gram:
    """Sums over the inputs, each [T, d], of hidden(x) and of the output that a network skips under its gate."""
    w_down = down_rows(network.module, network.arch).float()
    gate = SitePlan(gate=gate).to(w_down.device, torch.float32).gating
    assert isinstance(gate, Threshold | Predictor)
    sums: Gram | None = None
    for x in inputs:
        parts = ffn_parts(network.module, network.arch, network.activation, x)
        scores, _ = EXECUTORS[type(gate)](gate, parts._replace(gate=parts.gate.float()), x.float())
        inner = hidden(x.float())
        sums = sums or Gram.empty(inner.shape[1], w_down.shape[1])
        sums.add(inner, torch.where(scores > gate.tau, 0.0, parts.z.float()) @ w_down)
    assert sums is not None
    return sums

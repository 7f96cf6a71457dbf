"""Residual heads in closed form: what a plan's masks skip, regressed on a hidden layer that the token computes anyway.

Ridge regression of the skipped neurons' summed output on relu(fc1 x), layer by layer on the sparse model's own inputs, so that a layer makes up for the layers
before it too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .arch import Arch, Site
from .blocks import down_rows, ffn_parts
from .data import Batches
from .linalg import Gram
from .plans import Plan, Predictor
from .reference import EXECUTORS, apply_plan, remove_plan

WINDOWS = 64
_L2 = 1e-3  # relative to the mean square of the hidden values
_TOGETHER = 8  # windows


@torch.no_grad()
def add_residuals(model: Any, arch: Arch, activation: str, plan: Plan, batches: Batches) -> Plan:
    """`plan` with a residual [r, d] for every predictor, from at most WINDOWS full windows; other entries stay as they are."""
    found = dict(plan)
    tokens = batches.tokens[batches.mask.all(1)][:WINDOWS]
    for site in sorted(plan):
        entry = plan[site][0]
        if isinstance(entry, Predictor):
            gram = _regressed(model, arch, activation, found, site, entry, tokens)
            l2 = _L2 * float(gram.hidden.diagonal().mean())
            found[site] = [replace(entry, residual=gram.solve(l2).float())]
    return found


def _regressed(model: Any, arch: Arch, activation: str, plan: Plan, site: Site, entry: Predictor, tokens: Tensor) -> Gram:
    """Sums over the tokens [N, S] of hidden and skipped output at one site of the model under `plan`."""
    module = model.get_submodule(arch.ffn_module(site.layer))
    gram = Gram.empty(entry.rank, arch.size(model.config, "hidden"))
    w_down = down_rows(module, arch)
    here = replace(entry, fc1=entry.fc1.to(model.device), fc2=entry.fc2.to(model.device), tau=entry.tau.to(model.device), residual=None)

    def hook(_: Any, given: tuple[Tensor, ...]) -> None:
        x = given[0].flatten(0, -2)
        parts = ffn_parts(module, arch, activation, x)
        scores, _ = EXECUTORS[Predictor](here, parts.gate.float(), x.float())  # type: ignore[arg-type]
        gram.add(F.relu(x.float() @ here.fc1.T), torch.where(scores > here.tau, 0.0, parts.z.float()) @ w_down.float())

    apply_plan(model, plan, arch, activation)
    handle = module.register_forward_pre_hook(hook)
    try:
        for rows in tokens.split(_TOGETHER):
            model.get_decoder()(input_ids=rows.to(model.device), use_cache=False)
    finally:
        handle.remove()
        remove_plan(model)
    return gram

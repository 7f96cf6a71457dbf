"""Shares of kept units as a model has them on text: what plans carry of gates whose density nothing sets."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from ..arch import Arch
from ..arch.site import Site
from ..checkpoint.plan import Exact, Plan, Predictor, SitePlan
from ..modeling.gated import Recorder, apply_plan, recording, remove_plan
from ..text.windows import Batches

_WINDOWS, _TOGETHER = 32, 4


@torch.no_grad()
def with_shares(
    model: Any, plan: Plan, arch: Arch, activation: str, batches: Batches, swapped: Collection[Site] = ()
) -> Plan:
    """The plan with the shares of non-zero and of open units at every exact site, and with the kept share of every
    Predictor where the plan swaps the activation or the model is `swapped`, on the first windows.

    `model` is left ungated. A plan with neither comes back as it is.
    """
    with_zeros = [site for site, entry in plan.items() if entry.edits or _is_exact(entry) or site in swapped]
    zeros = {site: replace(plan[site], gate=Exact(), residual=None) for site in with_zeros}
    exact = [site for site in zeros if _is_exact(plan[site])]
    predicted = {site: plan[site] for site in zeros if isinstance(plan[site].gate, Predictor)}
    whole = dict(plan)
    if exact:
        record = _recorded(model, zeros, arch, activation, batches)
        shares, opened = record.density(), record.opened_share()
        whole |= {site: replace(plan[site], gate=Exact(shares[site], opened[site])) for site in exact}
    if predicted:
        shares = _recorded(model, predicted, arch, activation, batches).density()
        for site, entry in predicted.items():
            whole[site] = replace(entry, gate=replace(entry.gating, density=shares[site]))
    return whole


def _is_exact(entry: SitePlan) -> bool:
    return isinstance(entry.gate, Exact)


def _recorded(model: Any, plan: Plan, arch: Arch, activation: str, batches: Batches) -> Recorder:
    """What the plan's gates keep on the first windows."""
    apply_plan(model, plan, arch, activation)
    with recording(model) as record:
        for rows in batches.tokens[batches.mask.all(1)][:_WINDOWS].split(_TOGETHER):
            model(input_ids=rows.to(model.device), use_cache=False)
    remove_plan(model)
    return record

"""Shares of kept units as a model has them on text: what plans carry of entries whose density nothing sets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..arch import Arch
from ..checkpoint.plan import Plan, Predictor, Swap, deciding
from ..modeling.gated import apply_plan, recording, remove_plan
from ..text.windows import Batches

_WINDOWS, _TOGETHER = 32, 4


@torch.no_grad()
def with_shares(model: Any, plan: Plan, arch: Arch, activation: str, batches: Batches) -> Plan:
    """The plan with the shares of non-zero and of open units in every Swap, and with the kept share in every Predictor
    behind one, on the first windows.

    `model` is left ungated. A plan without a Swap comes back as it is.
    """
    if not any(isinstance(entries[0], Swap) for entries in plan.values()):
        return plan
    found = dict(plan)
    swapped = [site for site, entries in plan.items() if isinstance(entries[0], Swap)]
    for looked in (
        {site: plan[site][:1] for site in swapped},
        {site: plan[site] for site in swapped if isinstance(deciding(plan[site]), Predictor)},
    ):
        if not looked:
            continue
        apply_plan(model, looked, arch, activation)
        with recording(model) as record:
            for rows in batches.tokens[batches.mask.all(1)][:_WINDOWS].split(_TOGETHER):
                model(input_ids=rows.to(model.device), use_cache=False)
        remove_plan(model)
        shares, opened = record.density(), record.opened_share()
        for site, entries in looked.items():
            first, rest = found[site][0], found[site][1:]
            if len(entries) == 1 and isinstance(first, Swap):
                found[site] = [replace(first, density=shares[site], opened=opened[site]), *rest]
            else:
                found[site] = [first, replace(rest[0], density=shares[site])]  # type: ignore[type-var]
    return found

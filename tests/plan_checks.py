"""What tests ask of plans."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Plan, SitePlan


def gates(plan: Plan) -> dict[Site, Any]:
    """The gate of every site."""
    return {site: entry.gating for site, entry in plan.items()}


def same(first: SitePlan, second: SitePlan, ignored: str = "") -> bool:
    """Whether two sites' plans are equal, their tensors bit for bit; the field `ignored` may differ."""
    if first.edits != second.edits or type(first.gate) is not type(second.gate):
        return False
    names = [field.name for field in fields(first.gating) if field.name not in (*first.gating.ROLES, ignored)]
    left, right = first.tensors(), second.tensors()
    plain = all(getattr(first.gate, name) == getattr(second.gate, name) for name in names)
    return plain and left.keys() == right.keys() and all(torch.equal(left[role], right[role]) for role in left)

"""Rank correlations between scores: how alike two scores order a layer's units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....runtime_onnx.errors import InputError
from ...arch import Arch
from ...arch.site import Site
from ...scores import load_score
from ...text.windows import Batches
from .executor import score_windows
from .setting import Setting


def ranks(values: Tensor) -> Tensor:
    """Ranks along the last axis from 1, equal values sharing their mean rank: [..., n] fp64."""
    values = values.contiguous()
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values, right=False)
    return (below + torch.searchsorted(ordered, values, right=True) + 1).double() / 2


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of every row: [..., n], [..., n] -> [...]; NaN where all of a row's
    values are equal.
    """
    return (_unit_ranks(a) * _unit_ranks(b)).sum(-1)


def _unit_ranks(values: Tensor) -> Tensor:
    """Ranks less their mean, of norm 1."""
    centred = ranks(values)
    centred = centred - centred.mean(-1, keepdim=True)
    return centred / centred.norm(dim=-1, keepdim=True)


def mean_spearman(a: Tensor, b: Tensor) -> float:
    """Mean over rows of `spearman`, rows without an order left out."""
    return float(spearman(a, b).nanmean())


def rank_correlations(
    model: Any,
    arch: Arch,
    batches: Batches,
    names: Sequence[str],
    kind: str = "ffn",
    label: str = "greedy",
    calibration: Batches | None = None,
    steps: int = 10,
) -> dict[Site, Tensor]:
    """Spearman correlations between scores `names` at every layer, each the mean over tokens of the correlation over
    units: {site: [K, K]} fp64.

    All scores are taken from the dense model. Raises InputError for scores of linears or of prompts.
    """
    for name in names:
        module = load_score(name)
        if getattr(module, "KIND", "ffn") == "linear" or module.PHASE == "prompt":
            raise InputError(f"Rank correlations compare scores of a token's {kind} units, got {name!r}. Leave it out.")
    settings = [Setting(name, 1.0, kinds=(kind,), label=label, masks="dense") for name in names]
    totals: dict[Site, Tensor] = {}
    counts: dict[Site, Tensor] = {}
    for scored, mask in score_windows(model, arch, batches, settings, calibration, steps):
        for site in scored[0]:
            rows = torch.stack([_unit_ranks(one[site][mask.to(one[site].device)]) for one in scored])
            correlations = torch.einsum("atn,btn->abt", rows, rows)
            totals[site] = totals.get(site, torch.zeros(())) + correlations.nansum(-1).cpu()
            counts[site] = counts.get(site, torch.zeros(())) + correlations.isfinite().sum(-1).cpu()
    return {site: totals[site] / counts[site] for site in totals}

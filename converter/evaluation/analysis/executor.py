"""The analysis executor: any score, any selector, any kind of unit, on token windows under teacher forcing, compared
with the dense model.

Every unit is computed and those that do not stay are zeroed. Masks come from one of two places. `dense`: the dense
model's own activations and gradients at that token, layer and site, which is how oracles are judged (every layer's mask
is fixed before any is applied). `own`: the sparse run's activations as they arise, which is what a deployed score sees.
The latter is the rule for scores that are known in time (phases pre, mid, in), the former for all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....runtime_onnx.errors import InputError
from ...arch import Arch
from ...arch.site import Site
from ...modeling.losses import expected_difference, token_nll
from ...modeling.taps import Fields, tapped
from ...scores import load_score
from ...text.windows import Batches
from ..quality import clustered_error
from .dense import DenseRun, groups, moments, score_site, taus
from .selectors import global_pool, nonzero, paper_cut, threshold, top_k, used_groups
from .setting import Outcome, Setting, check


def analyse(
    model: Any, arch: Arch, batches: Batches, setting: Setting, calibration: Batches | None = None, steps: int = 10
) -> Outcome:
    """`analyse_all` for one setting."""
    return analyse_all(model, arch, batches, [setting], calibration, steps)[0]


@torch.no_grad()
def analyse_all(
    model: Any,
    arch: Arch,
    batches: Batches,
    settings: Sequence[Setting],
    calibration: Batches | None = None,
    steps: int = 10,
) -> list[Outcome]:
    """The outcome of every setting on `batches`, the dense passes shared. `model` is a dense transformers model,
    `steps` the length of integrated gradients.

    `calibration` windows give the thresholds and E[up^2]; only settings with selector "threshold" and score "chess"
    need them. Raises InputError for settings that make no sense.
    """
    for setting in settings:
        check(setting, int(batches.tokens.shape[1]), calibration is not None)
    up_moments = moments(model, arch, settings, calibration)
    thresholds = taus(model, arch, settings, calibration, up_moments, steps)
    tallies = [_Tally() for _ in settings]
    for tokens, mask in groups(batches):
        dense = DenseRun(model, arch, tokens, mask, settings, up_moments, steps)
        scored = mask[:, :-1] & mask[:, 1:]
        for setting, tau, tally in zip(settings, thresholds, tallies, strict=True):
            where = mask & (
                torch.arange(mask.shape[1]) >= {"all": 0, "first": 1, "prefill": setting.prompt}[setting.positions]
            )
            masks = _Masks(model, arch, setting, tau, dense, where, tally)
            with tapped(model, arch, setting.kinds, masks.see):
                logits = model(input_ids=tokens.to(model.device), use_cache=False).logits
            _measure(tally, dense.logits, logits, tokens, scored & where[:, :-1])
            tally.sparse += int(where.sum())
            tally.positions += int(mask.sum())
    return [_outcome(setting, tally) for setting, tally in zip(settings, tallies, strict=True)]


def score_windows(
    model: Any, arch: Arch, batches: Batches, settings: Sequence[Setting], calibration: Batches | None, steps: int
) -> Iterator[tuple[list[dict[Site, Tensor]], Tensor]]:
    """For every group of windows the scores of each setting from dense activations, {site: [B, S, n]}, and the windows'
    mask [B, S].
    """
    for setting in settings:
        check(setting, int(batches.tokens.shape[1]), calibration is not None)
    up_moments = moments(model, arch, settings, calibration)
    for tokens, mask in groups(batches):
        with torch.no_grad():
            dense = DenseRun(model, arch, tokens, mask, settings, up_moments, steps)
            scores = [dense.scores(setting) for setting in settings]
        yield scores, mask


@dataclass
class _Tally:
    """Sums over groups of windows: quality by window, positions, and by site the kept units and key-value groups and
    what one of them weighs.
    """

    quality: Tensor = field(
        default_factory=lambda: torch.zeros((0, 6), dtype=torch.float64)
    )  # a window's tokens, nll dense, nll, kl, agreement, second choice
    sparse: int = 0
    positions: int = 0
    kept: dict[Site, int] = field(default_factory=dict)
    kept_groups: dict[Site, int] = field(default_factory=dict)
    units: dict[Site, int] = field(default_factory=dict)
    groups: dict[Site, int] = field(default_factory=dict)
    weight: dict[Site, int] = field(default_factory=dict)


class Choice:
    """A setting's selector with its thresholds: scores to masks."""

    def __init__(self, setting: Setting, tau: Mapping[Site, float]) -> None:
        self.setting, self.tau = setting, tau

    def all(self, scores: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """The units that stay at every site, {site: [B, S, n] bool}."""
        if self.setting.selector != "global_pool":
            return {site: self.one(site, values) for site, values in scores.items()}
        pools = [
            {site: values for site, values in scores.items() if site.kind.partition(":")[0] == kind}
            for kind in self.setting.kinds
        ]
        return {
            site: keep
            for pool in pools
            for site, keep in global_pool(pool, self.setting.density, self.setting.floor).items()
        }

    def one(self, site: Site, scores: Tensor) -> Tensor:
        """The units that stay at one site by its own scores alone."""
        selector, density = self.setting.selector, self.setting.density
        if selector == "threshold":
            return threshold(scores, self.tau[site])
        if selector == "paper_cut":
            return paper_cut(scores, round(1 - density, 9))  # .9999999 of a unit must not be one less
        return nonzero(scores) if selector == "nonzero" else top_k(scores, density)


class _Masks:
    """What one setting keeps at every site of one group of windows, counted as it is asked."""

    def __init__(
        self,
        model: Any,
        arch: Arch,
        setting: Setting,
        tau: Mapping[Site, float],
        dense: DenseRun,
        where: Tensor,
        tally: _Tally,
    ) -> None:
        self.choice, self.where, self.tally, self.moments = Choice(setting, tau), where, tally, dense.moments
        self.hidden, self.kv_heads = (
            arch.size(model.config, "hidden"),
            arch.size(model.config, "kv_heads"),
        )
        self.matrices = arch.matrices
        self.fixed = self.choice.all(dense.scores(setting)) if setting.source == "dense" else None

    def see(self, site: Site, fields: Fields) -> Tensor:
        """The units that stay at a site [B, S, n]; all of them at positions that are not masked."""
        keep = (
            self.fixed[site]
            if self.fixed is not None
            else self.choice.one(site, score_site(self.choice.setting.score, site, fields, self.moments))
        )
        where = self.where.to(keep.device)
        self._count(site, keep[where], fields)
        return keep | ~where.unsqueeze(-1)

    def _count(self, site: Site, stays: Tensor, fields: Fields) -> None:
        tally = self.tally
        tally.kept[site] = tally.kept.get(site, 0) + int(stays.sum())
        tally.units[site] = stays.shape[-1]
        if site.kind == "attn":
            tally.kept_groups[site] = tally.kept_groups.get(site, 0) + int(used_groups(stays, self.kv_heads).sum())
            tally.groups[site] = self.kv_heads
            tally.weight[site] = 2 * self.hidden * fields["o"].shape[-1]
        else:
            tally.weight[site] = self.matrices * self.hidden if site.kind == "ffn" else int(fields["w"].shape[0])


def _measure(tally: _Tally, dense: Tensor, sparse: Tensor, tokens: Tensor, scored: Tensor) -> None:
    rows = scored.to(dense.device)
    p, q = (logits[:, :-1][rows].float().log_softmax(-1) for logits in (dense, sparse))
    target = tokens[:, 1:][scored].to(p.device)
    first, second = p.topk(2, dim=-1).indices.unbind(-1)
    choice = q.argmax(-1)
    parts = (
        torch.ones_like(target),
        token_nll(p, target),
        token_nll(q, target),
        expected_difference(p.exp(), p, q),
        choice == first,
        choice == second,
    )
    by_token = torch.stack([part.double().cpu() for part in parts], dim=1)
    window = scored.nonzero()[:, 0]
    tally.quality = torch.cat([tally.quality, by_token.new_zeros((len(scored), 6)).index_add(0, window, by_token)])


def _outcome(setting: Setting, tally: _Tally) -> Outcome:
    sums = tally.quality[tally.quality[:, 0] > 0]
    if not len(sums):
        raise InputError(
            "Windows must hold a position that runs sparse and has a next token, got none. Give longer windows or a "
            "shorter prompt."
        )
    share = tally.sparse / tally.positions
    density = {
        kind: _ratio(tally, [site for site in tally.kept if site.kind.partition(":")[0] == kind])
        for kind in setting.kinds
    }
    kept = total = 0
    for site, count in tally.kept.items():
        kept += tally.weight[site] * (count + tally.kept_groups.get(site, 0))
        total += tally.weight[site] * tally.sparse * (tally.units[site] + tally.groups.get(site, 0))
    phase = load_score(setting.score).PHASE
    nll_dense, nll, kl, agreement, second = (sums[:, 1:].sum(0) / sums[:, 0].sum()).tolist()
    errors = [clustered_error(values, sums[:, 0]) for values in (sums[:, 2] - sums[:, 1], sums[:, 3])]
    nll_error, kl_error = (None if math.isinf(error) else error for error in errors)
    return Outcome(
        setting=setting,
        phase=phase,
        masks=setting.source,
        oracle=phase in ("oracle", "post"),
        tokens=int(sums[:, 0].sum()),
        nll_dense=nll_dense,
        nll=nll,
        nll_error=nll_error,
        kl=kl,
        kl_error=kl_error,
        agreement=agreement,
        second_choice=second,
        density=density,
        density_all={kind: 1 - share * (1 - value) for kind, value in density.items()},
        sparsity=1 - kept / total,
        sparsity_all=share * (1 - kept / total),
        sites={site.key: _ratio(tally, [site]) for site in sorted(tally.kept)},
    )


def _ratio(tally: _Tally, sites: Sequence[Site]) -> float:
    return sum(tally.kept[site] for site in sites) / (tally.sparse * sum(tally.units[site] for site in sites))

"""The dense side of an analysis: logits, activations, gradients and scores of the model with nothing masked, and what
calibration windows tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...arch import Arch
from ...arch.site import Site
from ...modeling.gradients import AttributionSettings, Gradients, attribute
from ...modeling.taps import Fields, tapped
from ...scores import Context, load_score
from ...scores.griffin import statistic
from ...text.windows import Batches
from .selectors import quantile_tau
from .setting import Setting

TOKENS_AT_ONCE = 1024


def groups(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and mask [B, S] of some windows at a time."""
    rows = max(1, TOKENS_AT_ONCE // batches.tokens.shape[1])
    yield from zip(batches.tokens.split(rows), batches.mask.split(rows), strict=True)


class DenseRun:
    """Logits [B, S, V] of the dense model on one group of windows, and the fields that the settings' dense
    masks need.
    """

    def __init__(
        self,
        model: Any,
        arch: Arch,
        tokens: Tensor,
        mask: Tensor,
        settings: Sequence[Setting],
        up_moments: Mapping[Site, Tensor],
        steps: int,
    ) -> None:
        self.moments = up_moments
        watched = [setting for setting in settings if setting.source == "dense"]
        kinds = {kind for setting in watched for kind in setting.kinds}
        needs = {need for setting in watched for kind in setting.kinds for need in _needs(setting.score, kind)}
        self.fields: dict[Site, Fields] = {}

        def see(site: Site, fields: Fields) -> None:
            self.fields[site] = {name: value for name, value in fields.items() if name in needs}

        tokens = tokens.to(model.device)
        with tapped(model, arch, sorted(kinds), see):
            self.logits = model(input_ids=tokens, use_cache=False).logits
        self.gradients: dict[str, dict[Site, Gradients]] = {}
        for label in sorted({setting.label for setting in watched if load_score(setting.score).PHASE == "oracle"}):
            oracles = [s for s in watched if s.label == label and load_score(s.score).PHASE == "oracle"]
            path = any(
                need.endswith("grad_path") for s in oracles for kind in s.kinds for need in _needs(s.score, kind)
            )
            labels = torch.where(mask.to(tokens.device), _labels(label, self.logits, tokens, mask), -100)
            attribution = attribute(
                model,
                arch,
                tokens,
                AttributionSettings(sorted({kind for s in oracles for kind in s.kinds}), steps=steps if path else 0),
                labels=labels,
            )
            self.gradients[label] = attribution.sites

    def scores(self, setting: Setting) -> dict[Site, Tensor]:
        """Scores of a setting at every site of its kinds: {site: [B, S, n]}."""
        scores = {}
        for site, fields in self.fields.items():
            kind = site.kind.partition(":")[0]
            if kind not in setting.kinds:
                continue
            if load_score(setting.score).PHASE == "oracle":
                value, grad, path = self.gradients[setting.label][site]
                names = ("o", "o_grad", "o_grad_path") if kind == "attn" else ("z", "grad", "grad_path")
                fields = fields | {name: t for name, t in zip(names, (value, grad, path), strict=True) if t is not None}
            if load_score(setting.score).PHASE == "prompt":
                # padding is on the right: a window that has some in its prompt has nothing after it
                fields = fields | {"prompt": statistic(fields["z"][:, : setting.prompt]).unsqueeze(1)}
            scores[site] = score_site(setting.score, site, fields, self.moments)
        return scores


def _needs(score: str, kind: str) -> tuple[str, ...]:
    return load_score(score).HEAD_NEEDS if kind == "attn" else load_score(score).NEEDS


def score_site(name: str, site: Site, fields: Fields, up_moments: Mapping[Site, Tensor]) -> Tensor:
    """Scores [B, S, n] of one site from its fields; a score gets what it names and no more."""
    module, needs = load_score(name), _needs(name, site.kind)
    known = fields | ({"up_moment": up_moments[site]} if site in up_moments else {})
    context = Context(**{need: known[need] for need in needs if need != "label"})
    return module.score_heads(context) if site.kind == "attn" else module.score(context)


def _labels(label: str, logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Labels [B, S]; -100 where there is no next token."""
    if label == "true":
        following = torch.where(mask[:, 1:].to(tokens.device), tokens[:, 1:], -100)
        return torch.cat([following, torch.full_like(tokens[:, :1], -100)], dim=1)
    return logits.topk(2, dim=-1).indices[..., 1 if label == "second" else 0]


def moments(model: Any, arch: Arch, settings: Sequence[Setting], calibration: Batches | None) -> dict[Site, Tensor]:
    """E[up^2] [n] by site over the calibration windows; ones for a plain network. Empty when no score needs it."""
    if calibration is None or not any("up_moment" in load_score(setting.score).NEEDS for setting in settings):
        return {}
    sums: dict[Site, Tensor] = {}
    for tokens, mask in groups(calibration):

        def see(site: Site, fields: Fields, mask: Tensor = mask) -> None:
            square = fields.get("up", torch.ones_like(fields["z"]))[mask.to(fields["z"].device)].double().square()
            sums[site] = sums.get(site, torch.zeros((), device=square.device)) + square.sum(0)

        with torch.no_grad(), tapped(model, arch, ["ffn"], see):
            model(input_ids=tokens.to(model.device), use_cache=False)
    return {site: (total / calibration.count).float() for site, total in sums.items()}


def taus(
    model: Any,
    arch: Arch,
    settings: Sequence[Setting],
    calibration: Batches | None,
    up_moments: Mapping[Site, Tensor],
    steps: int,
) -> list[dict[Site, float]]:
    """Thresholds by site of every setting, from dense activations on the calibration windows; empty for other
    selectors.
    """
    with_thresholds = [setting for setting in settings if setting.selector == "threshold"]
    names = list(dict.fromkeys((setting.score, setting.kinds, setting.label) for setting in with_thresholds))
    if calibration is None or not with_thresholds:
        return [{} for _ in settings]
    probes = [Setting(score, 1.0, kinds=kinds, label=label, masks="dense") for score, kinds, label in names]
    rows: list[dict[Site, list[Tensor]]] = [{} for _ in probes]
    for tokens, mask in groups(calibration):
        dense = DenseRun(model, arch, tokens, mask, probes, up_moments, steps)
        for by_site, probe in zip(rows, probes, strict=True):
            for site, scores in dense.scores(probe).items():
                by_site.setdefault(site, []).append(scores[mask.to(scores.device)])
    by_name = {
        name: {site: torch.cat(parts) for site, parts in by_site.items()}
        for name, by_site in zip(names, rows, strict=True)
    }
    return [
        {site: quantile_tau(scores, s.density) for site, scores in by_name[s.score, s.kinds, s.label].items()}
        if s.selector == "threshold"
        else {}
        for s in settings
    ]

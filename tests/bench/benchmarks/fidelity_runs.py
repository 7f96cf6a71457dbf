"""A causal model with masks in some of its blocks and at some positions, token by token beside the dense model.

What enters the blocks is kept, so that a run that differs from an earlier one only behind a block begins there; the
dense log-probabilities are computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsegate.converter.arch import Arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.evaluation.quality import Halves
from sparsegate.converter.modeling.losses import expected_difference, token_nll
from sparsegate.converter.modeling.taps import Fields, replaced, tapped, tapped_inputs

Taus = Mapping[Site, float]
"""Thresholds by site: of |act(gate)| at a feed-forward site, of |x_j| at a linear site; what is above stays."""


@dataclass
class Masks:
    """Thresholds, the positions [N, S] that they hold at (None: all), and how many units stayed of how many there."""

    taus: Taus
    where: Tensor | None = None
    kept: dict[Site, int] = field(default_factory=dict)
    seen: dict[Site, int] = field(default_factory=dict)

    def see(self, site: Site, fields: Fields) -> Tensor | None:
        """The units that stay at a site [N, S, n]; None for all."""
        if site not in self.taus:
            return None
        keep = (fields["gate"] if site.kind == "ffn" else fields["x"]).abs() > self.taus[site]
        counted = keep if self.where is None else keep[self.where]
        self.kept[site] = self.kept.get(site, 0) + int(counted.count_nonzero())
        self.seen[site] = self.seen.get(site, 0) + counted.numel()
        return keep if self.where is None else keep | ~self.where.unsqueeze(-1)

    def shares(self) -> dict[Site, float]:
        """The share of units that stayed by site."""
        return {site: self.kept[site] / self.seen[site] for site in self.seen}


@dataclass(frozen=True)
class States:
    """What enters every block [N, S, d] (none where it was not kept), and what enters the head of every window [S - 1,
    d].
    """

    entering: list[Tensor]
    last: list[Tensor]


class Runs:
    """Runs of a model on one group of windows [N, S] without padding.

    `peaks` [blocks, N, S] are the largest absolute values of what enters a block, `log_probs` the dense model's [S - 1,
    V] by window.
    """

    def __init__(self, model: Any, arch: Arch, tokens: Tensor) -> None:
        self.model, self.arch, self.tokens = model, arch, tokens
        self.blocks, self.halves = list(model.get_decoder().layers), Halves(model)
        self.dense = self.run(Masks({}), keep=True)
        with torch.no_grad():
            self.log_probs = [self.halves.logits(hidden).log_softmax(-1) for hidden in self.dense.last]
        self.chances = [p.exp() for p in self.log_probs]
        self.masked: dict[str, States] = {}
        self.peaks = torch.stack([hidden.abs().amax(-1) for hidden in self.dense.entering])

    @torch.no_grad()
    def run(self, masks: Masks, first: int = 0, before: States | None = None, keep: bool = False) -> States:
        """The model under masks. Blocks before `first` do not run: what they gave is taken from `before`. With `keep`
        what enters the blocks that ran is kept.
        """
        entering: list[Tensor] = []
        kinds = sorted({site.kind.partition(":")[0] for site in masks.taus})
        with ExitStack() as stack:
            if before is not None:
                stack.enter_context(replaced(dict.fromkeys(self.blocks[:first], _passes)))
                stack.enter_context(tapped_inputs({self.blocks[first]: lambda _: before.entering[first]}))
            if keep:
                stack.enter_context(tapped_inputs(dict.fromkeys(self.blocks, entering.append)))
            stack.enter_context(tapped(self.model, self.arch, kinds, masks.see))
            last = self.halves.hidden(list(self.tokens))
        return States(entering, last)

    @torch.no_grad()
    def losses(self, runs: Sequence[States]) -> Tensor:
        """NLL and KL from the dense model in nats, and whether the argmax is the dense one, of every token after the
        first: [runs, 3, N, S - 1] fp32.
        """
        found = torch.empty((len(runs), 3, *self.tokens[:, 1:].shape))
        for window, p in enumerate(self.log_probs):
            chances, best, target = self.chances[window], p.argmax(-1), self.tokens[window, 1:]
            for number, states in enumerate(runs):
                q = self.halves.logits(states.last[window]).log_softmax(-1)
                parts = (token_nll(q, target), expected_difference(chances, p, q), q.argmax(-1) == best)
                found[number, :, window] = torch.stack([part.float() for part in parts])
        return found

    def alone(self, taus: Taus, layer: int) -> States:
        """One block masked, the others dense."""
        return self.run(Masks({site: tau for site, tau in taus.items() if site.layer == layer}), layer, self.dense)

    def all_but(self, taus: Taus, layer: int, name: str) -> States:
        """All blocks masked but one. The run under all masks is kept by the `name` of the thresholds."""
        if name not in self.masked:
            self.masked[name] = self.run(Masks(taus), keep=True)
        masks = Masks({site: tau for site, tau in taus.items() if site.layer != layer})
        return self.run(masks, layer, self.masked[name])

    def dense_nll(self) -> Tensor:
        """NLL of the dense model in nats of every token after the first: [N, S - 1]."""
        return torch.stack([token_nll(p, row[1:]) for p, row in zip(self.log_probs, self.tokens, strict=True)])


def _passes(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


def touched(shares: Mapping[Site, float], layers: Sequence[int]) -> float:
    """Bytes of the networks' matrices touched per token, relative to dense, mean over `layers`.

    Gate: its kept input channels. Up: kept neurons times kept input channels. Down: the kept of its own inputs, which
    are the kept neurons or fewer. All are 1 where nothing is chosen.
    """
    total = 0.0
    for layer in layers:
        gate, up, down = (shares.get(Site(layer, kind=f"linear:{name}_proj")) for name in ("gate", "up", "down"))
        neurons = shares.get(Site(layer), 1.0)
        total += (1.0 if gate is None else gate) + neurons * (1.0 if up is None else up)
        total += neurons if down is None else down
    return total / (3 * len(layers))

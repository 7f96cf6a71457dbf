"""What the stored parts of the benchmark of where the loss sits say: means and standard errors over windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.fidelity_parts import CHUNK, COSTS, HUGE, KINDS, MIDDLE, SWEPT, WHOLE, Bench, huge, places
from records.fidelity_results import BandRow, BlockRow, Kind, KindRow, Loss, PeakRow, PositionRow
from sparsegate.converter.evaluation.quality import clustered_error
from sparsegate.runtime_onnx.errors import InputError

_BANDS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_COMMON = 8
"""Huge tokens that are named, the most frequent ones."""


class _Joined:
    """Losses of several groups of windows, one after the other."""

    def __init__(self, bench: Bench, numbers: Sequence[int]) -> None:
        self.bench, self.numbers = bench, numbers
        self.dense = self.tensors("dense", "nll", 0)

    def tensors(self, part: str, name: str, axis: int) -> Tensor:
        """A stored tensor of all groups, joined along the axis of the windows."""
        return torch.cat([self.bench.measured(part, number).losses[name] for number in self.numbers], dim=axis)

    def losses(self, part: str, name: str) -> Tensor:
        """Rise of NLL, KL and equal argmax of every token: [3, N, S - 1]."""
        losses = self.tensors(part, name, 1)
        dense = self.dense if part in WHOLE else self.short(self.dense)
        return torch.stack([losses[0] - dense[..., : losses.shape[-1]], losses[1], losses[2]])

    def short(self, values: Tensor) -> Tensor:
        """What of values [..., N, S or S - 1] lies in the few short windows of every group."""
        groups = values.split(CHUNK, dim=-2)
        return torch.cat([group[..., : self.bench.few, : self.bench.short] for group in groups], dim=-2)

    def cost(self, part: str, name: str) -> float:
        """The realised cost, mean over groups."""
        costs = [self.bench.measured(part, number).costs[name] for number in self.numbers]
        return sum(costs) / len(costs)


def mean_error(values: Tensor) -> tuple[float, float]:
    """Mean of values [N, T] and its standard error over the N windows; 0 for one window."""
    counts = torch.full((len(values),), float(values.shape[1]), dtype=torch.float64)
    error = clustered_error(values.double().sum(1), counts) if len(values) > 1 else 0.0
    return float(values.double().mean()), error


def loss_of(losses: Tensor) -> Loss:
    """Of the losses of every token [3, N, S - 1]."""
    (nll, nll_error), (kl, kl_error) = mean_error(losses[0]), mean_error(losses[1])
    agreement = float(losses[2].double().mean())
    return Loss(nll=nll, nll_error=nll_error, kl=kl, kl_error=kl_error, agreement=agreement)


def summary(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    """Fields of the record, and the names of what is not measured: a part counts where every group of windows has it.
    Raises InputError where the kinds of sparsity are not measured.
    """
    numbers = range(bench.chunks)
    done = {name for name in bench.names if all(bench.is_measured(name, number) for number in numbers)}
    if not done.issuperset(WHOLE):
        raise InputError(f"At least {' and '.join(WHOLE)} must be measured, got {', '.join(done) or 'none'}. Go on.")
    joined = _Joined(bench, numbers)
    found = {
        "dense_nll": float(joined.dense.double().mean()),
        "rows": _rows(joined),
        **_peaks(bench, joined),
        "kinds": [_kind(bench, joined, kind, done) for kind in SWEPT],
    }
    return found, [name for name in bench.names if name not in done]


def _rows(joined: _Joined) -> list[KindRow]:
    return [
        KindRow(
            kind=kind,
            shares=shares(aim),
            aim=aim,
            cost=joined.cost("kinds", f"{kind} {aim}"),
            loss=loss_of(joined.losses("kinds", f"{kind} {aim}")),
            windows=len(joined.dense),
        )
        for kind, shares in KINDS.items()
        for aim in COSTS
    ]


def _kind(bench: Bench, joined: _Joined, kind: str, done: set[str]) -> Kind:
    part = f"positions {kind}"
    whole, positions = None, []
    if part in done:
        whole = joined.losses(part, "all")
        measured = set.intersection(*(set(bench.measured(part, number).losses) for number in joined.numbers))
        groups = joined.short(joined.tensors("dense", "peaks", 1)).split(min(bench.few, CHUNK), dim=1)
        parts = [places(group) for group in groups]
        chosen = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        positions = [
            PositionRow(positions=name, share=float(at.double().mean()), loss=loss_of(joined.losses(part, name)))
            for name, at in chosen.items()
            if name in measured
        ]
    blocks = []
    for layer in range(bench.layers):
        alone, but = f"alone {kind} {layer}", f"but {kind} {layer}"
        if alone in done:
            gained = whole is not None and but in done
            gain = loss_of(whole - joined.losses(but, "losses")) if gained else None
            blocks.append(BlockRow(layer=layer, alone=loss_of(joined.losses(alone, "losses")), gain=gain))
    return Kind(
        kind=kind,
        aim=MIDDLE,
        windows=len(joined.short(joined.dense)),
        whole=None if whole is None else loss_of(whole),
        blocks=blocks,
        positions=positions,
        bands=_bands(joined.losses("kinds", f"{kind} {MIDDLE}")),
    )


def _bands(losses: Tensor) -> list[BandRow]:
    found = []
    for first, end in zip(_BANDS, _BANDS[1:], strict=False):
        part = losses[1, :, first:end]
        if part.shape[1]:
            kl, error = mean_error(part)
            found.append(BandRow(first=first, last=first + part.shape[1] - 1, kl=kl, kl_error=error))
    return found


def _peaks(bench: Bench, joined: _Joined) -> dict[str, Any]:
    """Where in a window, and at which tokens, hidden states have huge entries."""
    peaks, tokens = joined.tensors("dense", "peaks", 1), joined.tensors("dense", "tokens", 0)
    highest, layer = peaks.max(0)
    rows = []
    for first, end in zip(_BANDS, _BANDS[1:], strict=False):
        part = highest[:, first:end]
        if part.shape[1]:
            at = int(layer[:, first:end].flatten()[part.argmax()])
            last = first + part.shape[1] - 1
            rows.append(
                PeakRow(first=first, last=last, median=float(part.median()), largest=float(part.max()), layer=at)
            )
    large = huge(peaks)
    later = large.clone()
    later[:, 0] = False
    names = Counter(bench.study.tokenizer.decode([token]) for token in tokens[later].tolist())
    return {
        "peaks": rows,
        "huge": HUGE,
        "huge_share": float(large.double().mean()),
        "huge_first": float(large[:, 0].double().mean()),
        "huge_tokens": dict(names.most_common(_COMMON)),
    }

"""What gating loses over long windows, beside the dense model: by position, on repetitions and on needles.

Windows go through the decoder whole; of the positions that are scored, and of no others, the head and the softmax
follow in chunks. Continual LLM Upcycling (arXiv 2606.10722) saw single sparse layers break copying over long distances
that short windows do not show. Needles are passkeys (Mohtashami and Jaggi 2023, arXiv 2305.16300), repetitions of
random tokens the induction test of Olsson et al. 2022 (arXiv 2209.11895).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from ..arch import load_arch
from ..checkpoint.plan import Plan
from ..modeling.gated import Gates, gates_of, make_gates, switched
from ..progress import track
from ..text.windows import Batches, start_tokens
from .long_record import LongContext, Needle, PositionBin, Repetition
from .quality import GROUP_TOKENS, Halves, clustered_error, compare_rows, normalised

FIRST_BIN = 16
"""Tokens with fewer before them are one bin."""
SHORTEST = 64
"""Tokens of windows that are called long."""
DISTANCES = (64, 256, 1024, 4096, 16384)
"""Lengths of a copy, as far as two of them fit into a window."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_COPIES, LEAST_COPIES, NEEDLES = 8, 2, 2
"""Sequences of a distance, and prompts of a depth."""
_LOGITS_AT_ONCE = 1 << 24
_Copies = tuple[Literal["random", "text"], int]
"""Kind and distance."""
_FACT, _QUESTION, _END, _DIGITS = "\nThe pass key is", "\nWhat is the pass key? The pass key is", ".\n", 5


@dataclass(frozen=True)
class Scored:
    """A sequence of tokens [T], and the places [P] in it whose tokens are to be predicted, from 1 on."""

    tokens: Tensor
    places: Tensor


class Sequences:
    """Sequences that models are scored on beside the dense one, whose hidden states [P, d] at the scored places are
    kept. The dense one is `reference_model`, or None for `model` itself without gates.
    """

    def __init__(self, model: Any, sequences: Sequence[Scored], reference_model: Any | None = None) -> None:
        self.model, self.sequences = model, sequences
        self.reference = Halves(model if reference_model is None else reference_model)
        self._dense: list[Tensor] = []

    @torch.no_grad()
    def rows(self, gates: Gates) -> list[Tensor]:
        """Of every sequence what `quality.compare_rows` gives at its scored places [P, 6], under `gates`."""
        if not self._dense:
            self._dense = self._hidden(self.reference, {})
        sparse = Halves(self.model)
        hidden = self._hidden(sparse, gates)
        return [
            self._compared(scored, dense, states, sparse)
            for scored, dense, states in zip(self.sequences, self._dense, hidden, strict=True)
        ]

    def _hidden(self, halves: Halves, gates: Gates) -> list[Tensor]:
        """Hidden states [P, d] that predict the scored places of every sequence."""
        hidden: list[Tensor] = []
        with switched(halves.model, gates):
            for group in track(_grouped(self.sequences), unit="group"):
                states = halves.hidden([scored.tokens for scored in group])
                hidden += [part[scored.places.to(part.device) - 1] for part, scored in zip(states, group, strict=True)]
        return hidden

    def _compared(self, scored: Scored, dense: Tensor, sparse: Tensor, halves: Halves) -> Tensor:
        parts, target = [], scored.tokens[scored.places]
        at_once = max(1, _LOGITS_AT_ONCE // int(self.reference.model.config.vocab_size))
        for start in range(0, len(target), at_once):
            rows = slice(start, start + at_once)
            side = normalised(self.reference.logits(dense[rows]))
            device = side.logits.device
            logits = halves.logits(sparse[rows]).to(device)
            parts.append(compare_rows(side, side.logits.exp(), logits, target[rows].to(device)).cpu())
        return torch.cat(parts)


def _grouped(sequences: Sequence[Scored]) -> list[list[Scored]]:
    """Neighbours of one length that go through a decoder together."""
    groups: list[list[Scored]] = []
    for scored in sequences:
        length = len(scored.tokens)
        if groups and len(groups[-1][0].tokens) == length and (len(groups[-1]) + 1) * length <= GROUP_TOKENS:
            groups[-1].append(scored)
        else:
            groups.append([scored])
    return groups


# By position


def whole_windows(batches: Batches) -> list[Scored]:
    """Windows [N, L] without padding, of which every token but the first is scored."""
    return [Scored(tokens, torch.arange(1, len(tokens))) for tokens in batches.tokens]


def bin_edges(length: int) -> list[tuple[int, int]]:
    """Bins (first, last) of the tokens before a scored one in windows of `length`, a power of two: up to FIRST_BIN - 1,
    then from each power of two to the next.
    """
    first = min(FIRST_BIN, length)
    edges = [1, *(first << k for k in range(length.bit_length()) if first << k <= length)]
    return [(low, high - 1) for low, high in zip(edges, edges[1:], strict=False)]


def position_bins(rows: Sequence[Tensor], length: int) -> list[PositionBin]:
    """Bins of whole windows' rows, each [length - 1, 6]."""
    values = torch.stack(list(rows))
    return [_position_bin(values[:, low - 1 : high], low, high) for low, high in bin_edges(length)]


def _position_bin(values: Tensor, low: int, high: int) -> PositionBin:
    counts = torch.full((len(values),), values.shape[1], dtype=torch.float64)
    sums, means = values.sum(1), values.mean((0, 1)).tolist()
    nll_error, kl_error = (clustered_error(part, counts) for part in (sums[:, 1] - sums[:, 0], sums[:, 2]))
    return PositionBin(
        first=low,
        last=high,
        tokens=int(counts.sum()),
        nll_dense=means[0],
        nll=means[1],
        nll_error=None if math.isinf(nll_error) else nll_error,
        kl=means[2],
        kl_error=None if math.isinf(kl_error) else kl_error,
        agreement=means[3],
    )


def far_loss(rows: Sequence[Tensor]) -> tuple[float, float]:
    """KL in nats per token of the tokens of whole windows that have half a window or more before them, and its standard
    error (infinite of one window).
    """
    values = torch.stack([part[len(part) // 2 :, 2] for part in rows])
    counts = torch.full((len(values),), values.shape[1], dtype=torch.float64)
    return float(values.mean()), clustered_error(values.sum(1), counts)


def measure_positions(
    model: Any, plans: Mapping[str, Plan], batches: Batches, reference_model: Any | None = None
) -> dict[str, LongContext]:
    """Loss by position of an ungated model under each of `plans` beside the dense `reference_model` that it was made
    from (None: itself), over windows [N, L] without padding, L a power of two.
    """
    arch = load_arch(model.config.model_type)
    activation = arch.activation(model.config)
    sequences = Sequences(model, whole_windows(batches), reference_model)
    return {
        name: _of_positions(sequences, make_gates(model, plan, arch, activation), batches)
        for name, plan in plans.items()
    }


def _of_positions(sequences: Sequences, gates: Gates, batches: Batches) -> LongContext:
    windows, length = batches.tokens.shape
    return LongContext(length=length, windows=windows, positions=position_bins(sequences.rows(gates), length))


def measure_long(model: Any, batches: Batches, reference_model: Any | None = None) -> LongContext:
    """As `measure_positions` for a model that a plan gates already."""
    return _of_positions(Sequences(model, whole_windows(batches), reference_model), gates_of(model), batches)


# Repetitions


def repeated(
    kind: Literal["random", "text"], batches: Batches, distance: int, known: Tensor, start: int, seed: int
) -> list[Scored]:
    """Sequences of two equal copies of `distance` tokens behind the `start` tokens that every window begins with: drawn
    uniformly from the ids `known`, or from the begin of the windows [N, L]. Scored is the second copy but for its first
    token.
    """
    windows, length = batches.tokens.shape
    count = max(LEAST_COPIES, min(MOST_COPIES, length // (2 * distance)))
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        copies = known[torch.randint(len(known), (count, distance), generator=generator)]
    else:
        copies = batches.tokens[torch.arange(count) % windows, start : start + distance]
        copies = copies[: min(count, windows)]
    begins = batches.tokens[:1, :start].expand(len(copies), -1)
    places = start + distance + torch.arange(1, distance)
    return [Scored(row, places) for row in torch.cat([begins, copies, copies], dim=1)]


def _repetition(kind: Literal["random", "text"], distance: int, rows: Sequence[Tensor]) -> Repetition:
    values = torch.cat(list(rows))
    nll_dense, nll, kl, _, accuracy_dense, accuracy = values.mean(0).tolist()
    return Repetition(
        kind=kind,
        distance=distance,
        sequences=len(rows),
        tokens=len(values),
        nll_dense=nll_dense,
        nll=nll,
        kl=kl,
        accuracy_dense=accuracy_dense,
        accuracy=accuracy,
    )


# Needles


def needles(batches: Batches, tokenizer: Any, depth: float, start: int, seed: int) -> list[Scored]:
    """Windows [N, L] with a fact of `_DIGITS` digits at `depth` of the text and the question for it at the end, whose
    answer is scored; none where a window has no room for text between.
    """
    fact, question, end = (_ids(tokenizer, text) for text in (_FACT, _QUESTION, _END))
    generator, out = torch.Generator().manual_seed(seed), []
    for number in range(NEEDLES):
        digits = torch.randint(10, (_DIGITS,), generator=generator).tolist()
        answer = _ids(tokenizer, " " + "".join(map(str, digits)))
        window = batches.tokens[number % len(batches.tokens)]
        room = len(window) - start - sum(map(len, (fact, answer, end, question, answer)))
        if room < 1:
            return []
        text, cut = window[start : start + room], round(depth * room)
        tokens = torch.cat([window[:start], text[:cut], fact, answer, end, text[cut:], question, answer])
        out.append(Scored(tokens, torch.arange(len(tokens) - len(answer), len(tokens))))
    return out


def _ids(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def _needle(depth: float, rows: Sequence[Tensor]) -> Needle:
    def mean(value: Callable[[Tensor], Tensor]) -> float:
        return float(torch.stack([value(part) for part in rows]).mean())

    return Needle(
        depth=depth,
        prompts=len(rows),
        log_probability_dense=mean(lambda part: -part[:, 0].sum()),
        log_probability=mean(lambda part: -part[:, 1].sum()),
        exact_dense=mean(lambda part: part[:, 4].prod()),
        exact=mean(lambda part: part[:, 5].prod()),
    )


# All of it


class LongTests:
    """Windows [N, L] of held-out text, L a power of two, with the repetitions and needles that are made of them: what
    several gates of one model can be measured on, beside the dense one.
    """

    def __init__(
        self, model: Any, batches: Batches, tokenizer: Any, reference_model: Any | None = None, seed: int = 0
    ) -> None:
        self.batches, length = batches, batches.tokens.shape[1]
        start, known = len(start_tokens(tokenizer)), known_tokens(tokenizer, model)
        distances = [d for d in DISTANCES if start + 2 * d <= length] or [max(2, (length - start) // 2)]
        kinds: tuple[Literal["random", "text"], ...] = ("random", "text")
        self.copies: list[tuple[_Copies, list[Scored]]] = [
            ((kind, distance), repeated(kind, batches, distance, known, start, seed + distance))
            for kind in kinds
            for distance in distances
        ]
        prompts = [(depth, needles(batches, tokenizer, depth, start, seed)) for depth in DEPTHS]
        self.needles = [(depth, part) for depth, part in prompts if part]
        every = [scored for _, part in (*self.copies, *self.needles) for scored in part]
        self.sequences = Sequences(model, [*whole_windows(batches), *every], reference_model)

    def measured(self, gates: Gates) -> LongContext:
        """Loss by position, on repetitions and needles, under `gates`."""
        rows, (windows, length) = self.sequences.rows(gates), self.batches.tokens.shape
        rest = iter(rows[windows:])
        return LongContext(
            length=length,
            windows=windows,
            positions=position_bins(rows[:windows], length),
            repetitions=[_repetition(*what, list(islice(rest, len(part)))) for what, part in self.copies],
            needles=[_needle(depth, list(islice(rest, len(part)))) for depth, part in self.needles],
        )


def known_tokens(tokenizer: Any, model: Any) -> Tensor:
    """Ids that the tokenizer knows, without its special tokens, sorted: a vocabulary may be padded."""
    ids = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    known = torch.tensor(sorted(ids))
    return known[known < model.get_input_embeddings().weight.shape[0]]

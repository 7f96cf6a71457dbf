"""Conversations that a model writes itself in its own chat template, as MagPie does (Xu et al. 2024, arXiv 2406.08464):
behind what the template writes before a user's words, an instructed model writes such words itself, then the answer.

Deviations: a conversation goes on with further turns until its window is full; nothing is filtered; turns are cut at a
share of the window, so that every window holds both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ..progress import track
from .sampling import Sampler, sampled_together
from .windows import Batches

USER_SHARE, ANSWER_SHARE = 4, 2
"""A user's turn takes at most a fourth of a window, an answer half of it."""


@dataclass(frozen=True)
class ChatForm:
    """What a chat template writes around what is said: before the first user's words, between a user's and the answer,
    and between an answer and the user's next words.
    """

    opening: str
    answer: str
    following: str


def chat_windows(model: Any, tokenizer: Any, form: ChatForm, windows: int, length: int, seed: int) -> Batches:
    """Conversations between a user and a dense transformers model, both written by it: `windows` windows of `length`
    tokens, sampled at temperature 1 by `seed`, each a conversation from its begin.

    A turn ends where the model writes the first token of what the template writes after it, or an end token; other
    special tokens are never drawn.

    Raises InputError where a window has no room for a turn behind the template's beginning, and as `self_generated`.
    """
    sampler = Sampler(model, tokenizer, length, seed, 1.0)
    turns = _Turns(tokenizer, form, sampler.known, length)
    tokens = torch.empty((windows, length), dtype=torch.int64)
    for group in track(tokens.split(sampled_together(model, length)), unit="batch"):  # views of `tokens`
        _write(sampler, turns, group)
    return Batches(tokens, torch.ones_like(tokens, dtype=torch.bool))


class _Turns:
    """A template's tokens, and what may be drawn inside a turn of the user (0) and of the model (1)."""

    def __init__(self, tokenizer: Any, form: ChatForm, known: Tensor, length: int) -> None:
        parts = (form.opening, form.answer, form.following)
        self.opening, *after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in parts)
        self.after: list[list[int]] = after
        if len(self.opening) + len(self.after[0]) + 2 > length:
            raise InputError(
                f"Windows must have room for a turn behind the chat template's {len(self.opening)} tokens, got "
                f"{length} tokens. Take a larger calibration length."
            )
        self.most = (max(1, length // USER_SHARE), max(1, length // ANSWER_SHARE))
        ends = {tokenizer.eos_token_id} - {None}
        self.ends = [ends | {part[0]} for part in self.after]
        special = set(tokenizer.all_special_ids)
        self.allowed = [
            torch.tensor([int(token) not in special or int(token) in turn_ends for token in known])
            for turn_ends in self.ends
        ]
        self.inside = [
            torch.tensor([int(token) not in special | turn_ends for token in known]) for turn_ends in self.ends
        ]

    def drawable(self, role: int, spoken: int) -> Tensor:
        """Which of the known tokens [K] may be drawn: no end before anything is said."""
        return self.allowed[role] if spoken else self.inside[role]


@dataclass
class _Speaker:
    """Where one conversation is: whose turn, how many tokens of it are said, and what the template still writes."""

    pending: list[int]
    role: int = 0
    spoken: int = 0

    def said(self, token: int, turns: _Turns) -> int:
        """The next token of the window, when the model has drawn `token`."""
        if self.pending:
            return self.pending.pop(0)
        if token not in turns.ends[self.role] and self.spoken < turns.most[self.role]:
            self.spoken += 1
            return token
        self.pending, self.role, self.spoken = list(turns.after[self.role]), 1 - self.role, 0
        return self.pending.pop(0)


@torch.no_grad()
def _write(sampler: Sampler, turns: _Turns, tokens: Tensor) -> None:
    """Fill windows [B, S] with conversations."""
    opening = turns.opening or sampler.begin(1)[0].tolist()
    tokens[:, : len(opening)] = torch.tensor(opening)
    speakers: Sequence[_Speaker] = [_Speaker([]) for _ in tokens]
    ids, cache = tokens[:, : len(opening)], None
    for at in track(range(len(opening), tokens.shape[1]), unit="token"):
        output = sampler.model(input_ids=ids.to(sampler.model.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        drawable = torch.stack([turns.drawable(speaker.role, speaker.spoken) for speaker in speakers])
        drawn = sampler.draw(output.logits[:, -1], drawable).tolist()
        tokens[:, at] = torch.tensor(
            [speaker.said(token, turns) for speaker, token in zip(speakers, drawn, strict=True)]
        )
        ids = tokens[:, at : at + 1]

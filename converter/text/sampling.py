"""Text that a model writes itself, in windows or in streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ..progress import track
from .windows import Batches

_BATCH_WINDOWS = (32, 256)  # windows sampled at once
STREAM = 2
"""Windows of a text that a model writes to be trained on."""
_CACHE = 1 << 29  # bytes of key-value cache that more than the fewest may take


def self_generated(
    model: Any, tokenizer: Any, windows: int, length: int, seed: int, temperature: float = 1.0
) -> Batches:
    """Text that a dense transformers model in evaluation mode writes itself: `windows` windows of `length` tokens,
    sampled at `temperature` by `seed`.

    1. A window starts with the tokenizer's start token, else its end token, else a token drawn uniformly.
    2. Sampling goes on after an end token, into another document, so every window is full.
    3. Only tokens that the tokenizer knows are drawn: a vocabulary may be padded.

    Raises InputError when `length` exceeds the model's positions, `temperature` is not positive or the logits are not
    finite.
    """
    sampler = Sampler(model, tokenizer, length, seed, temperature)
    tokens = torch.empty((windows, length), dtype=torch.int64)
    at_once = sampled_together(model, length)
    for group in track(tokens.split(at_once), unit="batch"):  # views of `tokens`
        group[:, :1] = sampler.begin(len(group))
        group[:, 1:] = sampler.extend(group[:, :1], length - 1)
    return Batches(tokens, torch.ones_like(tokens, dtype=torch.bool))


def self_generated_streams(
    model: Any, tokenizer: Any, windows: int, length: int, seed: int, temperature: float = 1.0
) -> Batches:
    """As `self_generated`, but of texts of STREAM windows, each window continued from the last half of the one before,
    and seven of eight texts begin with a token drawn uniformly.

    A model's own texts reach little of what real ones are full of, the middle of a class or a table: it is put there by
    a token that stands there. So windows start anywhere, as those of a corpus do. Windows of a text are neighbours [N,
    S].
    """
    groups = range(stream_groups(model, windows, length)[0])
    tokens = torch.cat(
        [part for _, part in sampled_groups(model, tokenizer, windows, length, seed, temperature, groups)]
    )
    return Batches(tokens, torch.ones_like(tokens, dtype=torch.bool))


def sampled_groups(
    model: Any, tokenizer: Any, windows: int, length: int, seed: int, temperature: float, groups: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """The wanted of the `stream_groups` groups of texts that `self_generated_streams` consists of, each sampled by
    itself, with their windows [n, S].
    """
    at_once = stream_groups(model, windows, length)[1]
    for group in track(groups, unit="batch"):
        sampler = Sampler(model, tokenizer, length, seed * 1_000_003 + group, temperature)
        first = group * at_once * STREAM
        yield group, _streams(sampler, min(at_once * STREAM, windows - first), length)


def stream_groups(model: Any, windows: int, length: int) -> tuple[int, int]:
    """How many groups of texts give `windows` windows, and the texts of a group, the last of which may be smaller."""
    at_once = sampled_together(model, length + max(0, _context(model, length)))
    return -(-windows // (at_once * STREAM)), at_once


def _context(model: Any, length: int) -> int:
    """Tokens of a text that its next window is continued from."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(length // 2, length if positions is None else positions - length)


def _streams(sampler: Sampler, windows: int, length: int) -> Tensor:
    """`windows` windows [N, S] of texts that are sampled together."""
    context, streams = _context(sampler.model, length), -(-windows // STREAM)
    tokens = torch.empty((streams, STREAM * length), dtype=torch.int64)
    for start in track(range(0, STREAM * length, length), unit="window"):
        if start and context > 0:
            tokens[:, start : start + length] = sampler.extend(tokens[:, start - context : start], length)
        else:
            first = torch.where(
                torch.arange(streams)[:, None] % 8 == 0, sampler.begin(streams), sampler.anywhere(streams)
            )
            tokens[:, start : start + 1] = first
            tokens[:, start + 1 : start + length] = sampler.extend(first, length - 1)
    return tokens.view(streams * STREAM, length)[:windows].clone()


class Sampler:
    """Draws tokens of `known` ids [K] from a model's distribution; raises InputError as `self_generated` says."""

    def __init__(self, model: Any, tokenizer: Any, length: int, seed: int, temperature: float) -> None:
        self.positions = getattr(model.config, "max_position_embeddings", None)
        if self.positions is not None and length > self.positions:
            raise InputError(
                f"Windows must have at most {self.positions} tokens, the model's positions, got {length}. Take a "
                "smaller calibration length."
            )
        if not temperature > 0:
            raise InputError(
                f"The temperature must be positive, got {temperature}. Take 1 for the model's own distribution."
            )
        known = torch.tensor(sorted(set(tokenizer.get_vocab().values())))
        self.known = known[known < model.get_input_embeddings().weight.shape[0]]
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self.special = [token for token in special if token is not None and bool((self.known == token).any())]
        self.model, self.temperature, self.generator = model, temperature, torch.Generator().manual_seed(seed)

    def begin(self, count: int) -> Tensor:
        """First tokens [B, 1]."""
        return torch.full((count, 1), self.special[0]) if self.special else self.anywhere(count)

    def anywhere(self, count: int) -> Tensor:
        """Tokens [B, 1] drawn uniformly."""
        return self.known[torch.randint(len(self.known), (count,), generator=self.generator)][:, None]

    @torch.no_grad()
    def extend(self, context: Tensor, count: int) -> Tensor:
        """The `count` tokens [B, count] after a context [B, C]."""
        tokens = torch.empty((len(context), count), dtype=torch.int64)
        ids, cache = context, None
        for at in track(range(count), unit="token"):
            output = self.model(input_ids=ids.to(self.model.device), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            tokens[:, at] = self.draw(output.logits[:, -1])
            ids = tokens[:, at : at + 1]
        return tokens

    def draw(self, logits: Tensor, drawable: Tensor | None = None) -> Tensor:
        """A token [B] of each row of logits [B, V]; `drawable` [B, K] says which of the known ones may be drawn."""
        scores = logits.float().cpu()[:, self.known] / self.temperature
        chances = (scores if drawable is None else scores.masked_fill(~drawable, -torch.inf)).softmax(-1)
        if not bool(chances.isfinite().all()):
            raise InputError(
                "The model's logits must be finite, got others while text was sampled. Fetch the weights again, or "
                "give a text."
            )
        return self.known[torch.multinomial(chances, 1, generator=self.generator)[:, 0]]


def sampled_together(model: Any, length: int) -> int:
    """Windows whose key-value cache fits into _CACHE, within _BATCH_WINDOWS.

    The fewest where the configuration does not tell.
    """
    config, (fewest, most) = model.config, _BATCH_WINDOWS
    layers, hidden, queries = (
        getattr(config, name, 0) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    if not (layers and hidden and queries):
        return fewest
    width = getattr(config, "head_dim", None) or hidden // queries
    window = (
        2
        * layers
        * (getattr(config, "num_key_value_heads", None) or queries)
        * width
        * length
        * model.get_input_embeddings().weight.element_size()
    )
    return max(fewest, min(most, _CACHE // window))

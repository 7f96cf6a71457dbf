"""Text to token windows: seeded, hashed, padded, with the tokenizer's own start token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TEXT, VOCAB, make_tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from sparsegate.converter.bundled import CALIBRATION_TEXT, HELDOUT_TEXT
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.text.sampling import (
    STREAM,
    sampled_groups,
    self_generated,
    self_generated_streams,
    stream_groups,
)
from sparsegate.converter.text.windows import MINIMUM_TOKENS, Batches, make_batches, read_text
from sparsegate.runtime_onnx.errors import InputError

TOKENIZER = make_tokenizer()
BOS, EOS = 0, 1  # of TOKENIZER
LONG = TEXT * 4
IDS = TOKENIZER(LONG, add_special_tokens=False)["input_ids"]


def test_windows_are_the_text() -> None:
    length = 50
    found = make_batches(TOKENIZER, LONG, 10**6, length, seed=0)
    assert len(IDS) % length, "the text must end inside a window"
    assert found.tokens[found.mask].tolist() == IDS and found.count == len(IDS)
    assert found.mask[:-1].all() and found.mask[-1].tolist() == [k < len(IDS) % length for k in range(length)]
    assert (found.tokens[~found.mask] == 0).all(), "padding lies in every vocabulary"


def test_drawing_is_seeded_and_in_text_order() -> None:
    length, whole = 50, make_batches(TOKENIZER, LONG, 10**6, 50, seed=0).tokens.tolist()
    draws = [make_batches(TOKENIZER, LONG, 6, length, seed) for seed in range(6)]
    for seed, draw in enumerate(draws):
        again = make_batches(TOKENIZER, LONG, 6, length, seed)
        assert torch.equal(draw.tokens, again.tokens) and draw.sha256 == again.sha256
        at = [whole.index(row) for row in draw.tokens.tolist()]
        assert len(set(at)) == 6
    assert len({draw.sha256 for draw in draws}) > 3


def test_hash_covers_tokens_mask_and_shape() -> None:
    tokens, mask = torch.arange(12).view(3, 4), torch.ones(3, 4, dtype=torch.bool)
    hidden = mask.clone()
    hidden[2, 3] = False
    swapped = tokens.clone()
    swapped[0, 0], swapped[0, 1] = 1, 0
    variants = [
        Batches(tokens, mask),
        Batches(tokens, hidden),
        Batches(tokens.view(4, 3), mask.view(4, 3)),
        Batches(swapped, mask),
    ]
    assert len({batch.sha256 for batch in variants}) == 4
    assert Batches(tokens.T.contiguous().T, mask).sha256 == variants[0].sha256, "strides do not matter"


@pytest.mark.parametrize("starts", [False, True])
def test_every_window_starts_as_the_tokenizer_starts_a_text(starts: bool) -> None:
    tokenizer = make_tokenizer()
    if starts:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        assert tokenizer("a")["input_ids"][0] == 0
    found = make_batches(tokenizer, LONG, 10**6, 50, seed=0)
    assert bool((found.tokens[:, 0] == 0).all()) == starts
    body = found.tokens[:, 1:][found.mask[:, 1:]] if starts else found.tokens[found.mask]
    assert body.tolist() == IDS, "neither lost nor doubled, and no end token"


def test_a_bos_token_that_the_tokenizer_does_not_write_is_not_added() -> None:
    assert TOKENIZER.bos_token_id == 0 and TOKENIZER("a")["input_ids"][0] != 0
    assert not (make_batches(TOKENIZER, LONG, 5, 50, 0).tokens == 0)[:, 0].any()


@pytest.mark.parametrize(
    "special", [{"bos_token": None}, {"pad_token": None}, {"pad_token": "<a token beyond the vocabulary>"}]
)
def test_missing_or_foreign_special_tokens(special: dict[str, str | None]) -> None:
    tokenizer = make_tokenizer()
    for name, value in special.items():
        if value:
            tokenizer.add_special_tokens({name: value})
            assert tokenizer.pad_token_id >= 290
        else:
            setattr(tokenizer, name, None)
    assert torch.equal(
        make_batches(tokenizer, LONG, 10**6, 50, 0).tokens, make_batches(TOKENIZER, LONG, 10**6, 50, 0).tokens
    )


@given(st.integers(16, 300), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_shape_and_count(length: int, windows: int, seed: int) -> None:
    found = make_batches(TOKENIZER, LONG, windows, length, seed)
    assert found.tokens.shape == found.mask.shape == (min(windows, -(-len(IDS) // length)), length)
    assert found.tokens.dtype == torch.int64 and found.mask.any(1).all()


def test_short_text_names_both_counts() -> None:
    with pytest.raises(
        InputError, match=f"^Calibration text must hold at least {MINIMUM_TOKENS} tokens, got 1. Give more text.$"
    ):
        make_batches(TOKENIZER, "a", 4, 32, 0)
    words = TOKENIZER.decode(IDS[: MINIMUM_TOKENS + 20])
    make_batches(TOKENIZER, words, 4, 32, 0)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda p: None, "nothing"),
        (lambda p: p.mkdir(), "folder"),
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_text(" \n\t\n"), "empty"),
        (lambda p: p.write_bytes(b"\xff\xfe\x80"), "UTF-8"),
    ],
)
def test_text_that_is_none(tmp_path: Path, make: Callable[[Path], object], word: str) -> None:
    make(tmp_path / "text")
    with pytest.raises(InputError) as error:
        read_text(tmp_path / "text")
    assert "\n" not in str(error.value) and word in str(error.value) and str(tmp_path / "text") in str(error.value)


def test_bundled_texts_differ() -> None:
    calibration, heldout = read_text(CALIBRATION_TEXT), read_text(HELDOUT_TEXT)
    lines = {line for line in calibration.splitlines() if len(line) > 60}
    shared = [line for line in heldout.splitlines() if line in lines]
    assert len(shared) < 0.05 * len([line for line in heldout.splitlines() if len(line) > 60])


# Text that a model writes itself


class Chain:
    """A language model whose next token depends on the last one only: logits `table` [V, V]. The cache is a list of the
    batch sizes and lengths seen.
    """

    device, config = torch.device("cpu"), SimpleNamespace(max_position_embeddings=64)

    def __init__(self, table: Tensor) -> None:
        self.table, self.calls, self.contexts = table, [], []

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=self.table)

    def __call__(self, input_ids: Tensor, past_key_values: int | None, use_cache: bool) -> Any:
        assert use_cache and (input_ids.shape[1] == 1 or past_key_values is None), (
            "one token at a time after the first ones"
        )
        self.calls.append((len(input_ids), past_key_values or 0))
        self.contexts.append(input_ids.clone())
        return SimpleNamespace(
            logits=self.table[input_ids], past_key_values=(past_key_values or 0) + input_ids.shape[1]
        )


def make_chain(vocabulary: int = VOCAB, spread: float = 1.0) -> Chain:
    return Chain(spread * torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(4)))


def excess(counts: Tensor, chances: Tensor) -> float:
    """How many standard deviations Pearson's chi-squared of `counts` [V] against `chances` [V] lies above its mean;
    rare tokens are pooled.
    """
    expected = chances.double() * counts.sum()
    rare = expected < 5
    found, wanted = (torch.cat([v[~rare], v[rare].sum()[None]]) for v in (counts.double(), expected))
    freedom = len(found) - 1
    return (float(((found - wanted).square() / wanted.clamp_min(1e-9)).sum()) - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_token_follows_the_models_softmax(temperature: float, tiny_model: Callable[[str], Path]) -> None:
    model = load_dense(tiny_model("llama"))
    found = self_generated(model, TOKENIZER, 3000, 2, seed=0, temperature=temperature)
    assert (
        TOKENIZER.bos_token_id == BOS
        and bool((found.tokens[:, 0] == BOS).all())
        and found.tokens.shape == (3000, 2)
        and bool(found.mask.all())
    )
    counts = found.tokens[:, 1].bincount(minlength=VOCAB)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[BOS]])).logits[0, 0]
    assert excess(counts, (logits / temperature).softmax(0)) < 4
    assert excess(counts, (logits / (temperature * 1.3)).softmax(0)) > 10, "a control at another temperature"


def test_every_transition_follows_the_model_and_goes_on_after_an_end_token() -> None:
    chain = make_chain()
    chain.table[:, EOS] += 4.5  # about a fifth of all tokens
    found = self_generated(chain, TOKENIZER, 100, 64, seed=1)
    tokens = found.tokens
    last, following = tokens[:, :-1].flatten(), tokens[:, 1:].flatten()
    after = following[last == EOS]
    assert 500 < len(after) < 3000 and bool(found.mask.all())
    assert excess(after.bincount(minlength=VOCAB), chain.table[EOS].softmax(0)) < 4
    assert excess(following[last != EOS].bincount(minlength=VOCAB), chain.table[EOS].softmax(0)) > 10, (
        "a control: after other tokens others follow"
    )
    assert chain.calls == [(size, at) for size in (32, 32, 32, 4) for at in range(63)], (
        "in groups of 32, with a cache of their own each"
    )


def test_windows_of_texts_that_begin_anywhere() -> None:
    chain = make_chain()
    found = self_generated_streams(chain, TOKENIZER, 600, 40, seed=1)
    assert STREAM == 2 and found.tokens.shape == (600, 40) and bool(found.mask.all())
    first = found.tokens[::2, 0]
    groups = torch.cat([torch.arange(count) for count in [32] * 9 + [12]])
    assert bool((first[groups % 8 == 0] == BOS).all()), "every eighth text begins with the start token"
    assert len(first[groups % 8 != 0].unique()) > 120, "the others anywhere"
    tenths = first[groups % 8 != 0] * 10 // VOCAB
    assert excess(tenths.bincount(minlength=10), torch.full((10,), 0.1)) < 4
    joins = torch.stack([found.tokens[0::2, -1], found.tokens[1::2, 0]])
    likely, control = (chain.table.softmax(-1)[joins[0], after].log().mean() for after in (joins[1], joins[1].roll(1)))
    assert float(likely) > float(control) + 0.5, "the second window's first token follows the first one's last"
    assert torch.equal(chain.contexts[39], found.tokens[0:64:2, 20:40]), "and is continued from its last half"


def test_groups_of_texts_are_sampled_each_by_itself() -> None:
    every = self_generated_streams(make_chain(), TOKENIZER, 600, 40, seed=1).tokens
    assert stream_groups(make_chain(), 600, 40) == (10, 32)
    parts = dict(sampled_groups(make_chain(), TOKENIZER, 600, 40, 1, 1.0, list(range(9, -1, -1))))
    assert list(parts) == list(range(9, -1, -1)) and torch.equal(
        torch.cat([parts[group] for group in range(10)]), every
    )
    assert [len(part) for part in parts.values()] == [24] + [64] * 9 and not torch.equal(parts[0], parts[1]), (
        "each with a seed of its own"
    )
    other = dict(sampled_groups(make_chain(), TOKENIZER, 600, 40, 2, 1.0, [0]))[0]
    assert all(not torch.equal(other, parts[group]) for group in range(9))


def test_windows_that_fill_the_positions_start_anew() -> None:
    chain = make_chain()
    tokens = self_generated_streams(chain, TOKENIZER, 34, 64, seed=1).tokens
    assert (
        {context.shape[1] for context in chain.contexts} == {1}
        and max(at for _, at in chain.calls) < 64
        and len({tuple(row) for row in tokens.tolist()}) == 34
    )
    partly = make_chain()
    self_generated_streams(partly, TOKENIZER, 34, 60, seed=1)
    assert {context.shape[1] for context in partly.contexts} == {1, 4} and max(at for _, at in partly.calls) == 63 - 1


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "phi", "phi3", "smollm3", "gpt2"])
def test_the_cache_changes_nothing(model_type: str, tiny_model: Callable[[str], Path]) -> None:
    """The windows are those drawn from passes over the whole text so far; sliding windows (24) slide."""
    model, length = load_dense(tiny_model(model_type)), 40
    found = self_generated(model, TOKENIZER, 3, length, seed=5)
    generator, tokens = torch.Generator().manual_seed(5), torch.full((3, 1), BOS)
    with torch.no_grad():
        for _ in range(length - 1):
            chances = model(input_ids=tokens, use_cache=False).logits[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], dim=1)
    assert torch.equal(found.tokens, tokens)


def test_sampling_is_seeded() -> None:
    chain = make_chain()
    first = self_generated(chain, TOKENIZER, 40, 20, seed=2)
    torch.manual_seed(99)
    assert (
        self_generated(chain, TOKENIZER, 40, 20, seed=2).sha256
        == first.sha256
        != self_generated(chain, TOKENIZER, 40, 20, seed=3).sha256
    )
    assert len({tuple(row) for row in first.tokens.tolist()}) == 40, "groups do not repeat one another"


@pytest.mark.parametrize(("missing", "start"), [(("bos_token",), 1), (("bos_token", "eos_token"), None), ((), 0)])
def test_start_token(missing: tuple[str, ...], start: int | None) -> None:
    tokenizer = make_tokenizer()
    for name in missing:
        setattr(tokenizer, name, None)
    first = self_generated(make_chain(), tokenizer, 3000, 2, seed=0).tokens[:, 0]
    if start is None:
        assert excess(first.bincount(minlength=VOCAB), torch.full((VOCAB,), 1 / VOCAB)) < 4
    else:
        assert bool((first == start).all())


def test_tokens_lie_in_the_tokenizer_and_in_the_model() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<a token beyond the vocabulary>"})
    found = self_generated(make_chain(), tokenizer, 4, 64, seed=0).tokens
    assert (
        tokenizer.convert_tokens_to_ids("<a token beyond the vocabulary>") == VOCAB
        and int(found.max()) < VOCAB
        and bool((found[:, 0] == EOS).all())
    )
    padded = make_chain(VOCAB + 80)
    assert int(self_generated(padded, TOKENIZER, 40, 64, seed=0).tokens.max()) < VOCAB, (
        "rows that pad the vocabulary are no text"
    )
    assert int(self_generated(padded, tokenizer, 40, 64, seed=0).tokens.max()) == VOCAB, (
        "the added token, which the padded model has"
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_cannot_be_sampled(bad: float) -> None:
    chain = make_chain()
    chain.table[:, 7] = bad
    with pytest.raises(
        InputError, match=r"^The model's logits must be finite, got .*\. Fetch the weights again, or give a text\.$"
    ):
        self_generated(chain, TOKENIZER, 2, 8, seed=0)
    chain.table[:, 7] = -float("inf")
    assert not bool((self_generated(chain, TOKENIZER, 40, 64, seed=0).tokens == 7).any()), (
        "a token that the model rules out is no error"
    )


def test_windows_within_the_models_positions(tiny_model: Callable[[str], Path]) -> None:
    assert self_generated(make_chain(), TOKENIZER, 1, 64, seed=0).tokens.shape == (1, 64)
    for model, most in ((make_chain(), 64), (load_dense(tiny_model("gpt2")), 256)):
        with pytest.raises(
            InputError,
            match=f"^Windows must have at most {most} tokens, the model's positions, got {most + 1}. Take a smaller",
        ):
            self_generated(model, TOKENIZER, 1, most + 1, seed=0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_is_positive(temperature: float) -> None:
    with pytest.raises(InputError, match=f"^The temperature must be positive, got {temperature}. "):
        self_generated(make_chain(), TOKENIZER, 1, 8, seed=0, temperature=temperature)

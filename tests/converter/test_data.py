"""Text to token windows: seeded, hashed, padded, with the tokenizer's own start token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TEXT, make_tokenizer
from tokenizers.processors import TemplateProcessing

from sparsegate.converter.artifact import InputError
from sparsegate.converter.data import CALIBRATION_TEXT, HELDOUT_TEXT, MINIMUM_TOKENS, Batches, make_batches, read_text

TOKENIZER = make_tokenizer()
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
    variants = [Batches(tokens, mask), Batches(tokens, hidden), Batches(tokens.view(4, 3), mask.view(4, 3)), Batches(swapped, mask)]
    assert len({batch.sha256 for batch in variants}) == 4
    assert Batches(tokens.T.contiguous().T, mask).sha256 == variants[0].sha256, "strides do not matter"


@pytest.mark.parametrize("starts", [False, True])
def test_every_window_starts_as_the_tokenizer_starts_a_text(starts: bool) -> None:
    tokenizer = make_tokenizer()
    if starts:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
        assert tokenizer("a")["input_ids"][0] == 0
    found = make_batches(tokenizer, LONG, 10**6, 50, seed=0)
    assert bool((found.tokens[:, 0] == 0).all()) == starts
    body = found.tokens[:, 1:][found.mask[:, 1:]] if starts else found.tokens[found.mask]
    assert body.tolist() == IDS, "neither lost nor doubled, and no end token"


def test_a_bos_token_that_the_tokenizer_does_not_write_is_not_added() -> None:
    assert TOKENIZER.bos_token_id == 0 and TOKENIZER("a")["input_ids"][0] != 0
    assert not (make_batches(TOKENIZER, LONG, 5, 50, 0).tokens == 0)[:, 0].any()


@pytest.mark.parametrize("special", [{"bos_token": None}, {"pad_token": None}, {"pad_token": "<a token beyond the vocabulary>"}])
def test_missing_or_foreign_special_tokens(special: dict[str, str | None]) -> None:
    tokenizer = make_tokenizer()
    for name, value in special.items():
        if value:
            tokenizer.add_special_tokens({name: value})
            assert tokenizer.pad_token_id >= 290
        else:
            setattr(tokenizer, name, None)
    assert torch.equal(make_batches(tokenizer, LONG, 10**6, 50, 0).tokens, make_batches(TOKENIZER, LONG, 10**6, 50, 0).tokens)


@given(st.integers(16, 300), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_shape_and_count(length: int, windows: int, seed: int) -> None:
    found = make_batches(TOKENIZER, LONG, windows, length, seed)
    assert found.tokens.shape == found.mask.shape == (min(windows, -(-len(IDS) // length)), length)
    assert found.tokens.dtype == torch.int64 and found.mask.any(1).all()


def test_short_text_names_both_counts() -> None:
    with pytest.raises(InputError, match=f"^Calibration text must hold at least {MINIMUM_TOKENS} tokens, got 1. Give more text.$"):
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

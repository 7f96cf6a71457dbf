"""Conversations that a model writes itself, of a model whose every draw is scripted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import VOCAB, make_tokenizer
from torch import Tensor

from sparsegate.converter.text.chat import ChatForm, chat_windows
from sparsegate.runtime_onnx.errors import InputError

TOKENIZER = make_tokenizer()
FORM = ChatForm(opening="user: ", answer="\nself: ", following="\nuser: ")
EOS = TOKENIZER.eos_token_id
LETTER = TOKENIZER("x", add_special_tokens=False)["input_ids"][0]
OPENING, ANSWER, FOLLOWING = (
    TOKENIZER(part, add_special_tokens=False)["input_ids"] for part in (FORM.opening, FORM.answer, FORM.following)
)
NEWLINE = ANSWER[0]


class Scripted:
    """A model that draws the tokens of a script by position, and LETTER where that says none or may not be drawn."""

    def __init__(self, script: dict[int, int]) -> None:
        self.config = SimpleNamespace(max_position_embeddings=64)
        self.device, self.script, self.seen = torch.device("cpu"), script, 0

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.zeros(VOCAB, 1))

    def __call__(self, input_ids: Tensor, past_key_values: Any, use_cache: bool) -> Any:
        self.seen = (0 if past_key_values is None else self.seen) + input_ids.shape[1]
        logits = torch.zeros(len(input_ids), input_ids.shape[1], VOCAB)
        logits[:, -1, LETTER] = 1e4
        if self.seen in self.script:
            logits[:, -1, self.script[self.seen]] = 2e4
        return SimpleNamespace(logits=logits, past_key_values=True)


def window(script: dict[int, int], length: int) -> list[int]:
    first, second = chat_windows(Scripted(script), TOKENIZER, FORM, 2, length, seed=0).tokens.tolist()
    assert first == second
    return first


@pytest.mark.parametrize("end", [EOS, NEWLINE])
def test_a_turn_ends_where_the_model_ends_it(end: int) -> None:
    """The template's tokens follow in place of the end token, and the model's draws there do not count."""
    begin = len(OPENING)
    written = [*OPENING, LETTER, LETTER, *ANSWER, LETTER, *FOLLOWING]
    script = {begin + 2: end, begin + 3: end, begin + 2 + len(ANSWER) + 1: end}
    found = window(script, 40)
    assert found[: len(written)] == written and set(found[len(written) : len(written) + 5]) == {LETTER}


def test_a_turn_is_cut_at_its_share_and_none_is_empty() -> None:
    begin, length = len(OPENING), 40
    found = window({begin: EOS}, length)
    cut = [*OPENING, *[LETTER] * (length // 4), *ANSWER]
    assert found == [*cut, *[LETTER] * (length - len(cut))][:length] and length - len(cut) <= length // 2


def test_other_special_tokens_are_never_drawn() -> None:
    begin = len(OPENING)
    special = next(token for token in TOKENIZER.all_special_ids if token != EOS)
    assert window({begin + 1: special}, 40)[begin + 1] == LETTER


def test_a_window_without_room_for_a_turn_is_refused() -> None:
    with pytest.raises(InputError, match="Windows must have room for a turn behind the chat template's"):
        window({}, len(OPENING) + 2)

"""The token windows of a conversion: what is calibrated on, trained on, searched on and measured on."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...runtime_onnx.chat_template import render_all
from ...runtime_onnx.errors import InputError
from ..bundled import CALIBRATION_TEXT, HELDOUT_TEXT
from ..checkpoint.source import Source
from ..checkpoint.stage import hash_file, hash_json
from ..evaluation.quality import ERROR
from ..text.chat import ChatForm
from ..text.documents import JSON_LINES, Conversation, read_whole
from ..text.generated import chatted, generated
from ..text.windows import Batches, make_batches, make_long_batches, read_text
from .recipe import CHAT, Recipe

log = logging.getLogger("sparsegate")
HELDOUT_WINDOWS = 256
"""Windows to measure on, of which as many are taken as tell the loss."""
EARLIER_WINDOWS = {False: 64, True: 256}
"""What a checkpoint was measured on that does not say it: so many windows where a budget was not searched, and where it
was.
"""
SEARCH_WINDOWS, SEARCH_SHARE = 256, 0.3
"""Windows that a budget is searched on: so many, at most this share of a given text. They are never calibrated or
trained on.
"""
HELDOUT_SHARE = 0.2  # of a user's own calibration text, kept for measuring
ERROR_SHARE = 0.1  # of a searched budget: what the standard error of the loss may be
LONG = {"windows": 8, "length": 2048}
"""Windows for long context, and their most tokens: more where they are asked for, fewer where the model or the text has
fewer.
"""
LONG_SEARCH_WINDOWS, LONG_SEARCH_SHARE = 4, 0.1
"""Of them windows that a budget is searched on, from at most this share of a given text, which nothing else sees."""
_LONG_CHARACTERS = 8  # a token of text that long windows are cut from, so that whole ones are left
_EVERY = 1 << 30


@dataclass(frozen=True)
class Texts:
    """Token windows to calibrate on, to train on (those to calibrate on are among them), to measure on, and to search
    on where there is a search.

    No window that is searched or measured on is in another part. `long` and `search_long` are long windows of the
    held-out text and of text to search on, where a budget bounds long context.
    """

    calibration: Batches
    training: Batches
    heldout: Batches
    search: Batches | None
    name: str
    long: Batches | None = None
    search_long: Batches | None = None


def make_texts(
    source: Source,
    recipe: Recipe,
    training: int = 0,
    work: Path | None = None,
    temperature: float = 1.0,
    streams: bool = False,
) -> Texts:
    """The windows that a recipe means: of the bundled texts, of a user's file, whose last fifth is held out, or of text
    that the model writes itself, which is stored below `work` and sampled at `temperature`, in texts that begin
    anywhere where `streams`; conversations know neither. `training` is the most windows to train on.

    Raises InputError for a text that is too short.
    """
    calibration, length = recipe.calibration, _length(source, recipe)
    (text, _, said), name = _split(recipe, source), _name(recipe)
    if said:
        log.warning("%s", said)
    share, long = SEARCH_SHARE, recipe.budget.max_kl_long is not None
    text, search_long = _search_long(source, recipe, text) if long and recipe.searches else (text, None)
    if calibration.generated:
        wanted = max(calibration.windows, training) + (SEARCH_WINDOWS if recipe.searches else 0)
        form = chat_form(source.tokenizer()) if calibration.generated == CHAT else None
        heldout = make_heldout(source, recipe)  # which may be too short, before anything is sampled
        if form is None:
            every = generated(source, wanted, length, recipe.seed, work, temperature, streams)
        else:
            every = chatted(source, form, wanted, length, recipe.seed, work)
        name = "text sampled from the dense model" if form is None else "conversations sampled from the dense model"
        share = 1.0
    else:
        every, heldout = (
            make_batches(source.tokenizer(), text, _EVERY, length, recipe.seed),
            make_heldout(source, recipe),
        )
    order = torch.randperm(len(every.tokens), generator=torch.Generator().manual_seed(recipe.seed))
    aside = min(SEARCH_WINDOWS, int(len(order) * share)) if recipe.searches else 0
    if recipe.searches and not aside:
        raise InputError(
            f"A budget must have windows to search on, got {len(order)} windows of text in all. Give more calibration "
            "text."
        )
    pool = order[: len(order) - aside]
    return Texts(
        calibration=_rows(every, pool[: calibration.windows]),
        training=_rows(every, pool[: max(calibration.windows, training)]),
        heldout=heldout,
        search=_rows(every, order[len(pool) :], text_order=False) if aside else None,
        name=name,
        long=make_long(source, recipe) if long else None,
        search_long=search_long,
    )


def make_long(
    source: Source,
    recipe: Recipe,
    windows: int = LONG["windows"],
    most: int = LONG["length"],
    text: str | None = None,
) -> Batches:
    """Long windows without padding of the held-out `text` (None: the recipe's), in random order, of a power of two of
    tokens, `most` at most.
    """
    positions = int(getattr(source.config, "max_position_embeddings", None) or most)
    text = _split(recipe, source)[1] if text is None else text
    name = "Text for long windows"
    return make_long_batches(source.tokenizer(), text, windows, min(most, positions), recipe.seed + 1, name)


def _search_long(source: Source, recipe: Recipe, text: str) -> tuple[str, Batches]:
    """The calibration text without its end, and long windows of that end; of text that nothing is calibrated on the end
    may stay.
    """
    size = min(int(LONG_SEARCH_SHARE * len(text)), _LONG_CHARACTERS * LONG_SEARCH_WINDOWS * LONG["length"])
    rest, end = text[: len(text) - size], text[len(text) - size :]
    return rest, make_long(source, recipe, LONG_SEARCH_WINDOWS, text=end)


def make_heldout(source: Source, recipe: Recipe, windows: int = HELDOUT_WINDOWS) -> Batches:
    """The windows to measure on, in random order; fewer `windows` are the first of more."""
    name, most = "The last fifth of the calibration text", max(windows, HELDOUT_WINDOWS)
    every = make_batches(
        source.tokenizer(),
        _split(recipe, source)[1],
        most,
        _length(source, recipe),
        recipe.seed + 1,
        name,
        text_order=False,
    )
    kept = every.mask.sum(1) > 1  # a window of one token has nothing to predict
    return Batches(every.tokens[kept][:windows], every.mask[kept][:windows])


def quality_error(recipe: Recipe) -> float:
    """The standard error (nats per token) that a loss is to be measured with: less where a budget was searched, which
    it is judged on.
    """
    budget, bounds = recipe.budget, [ERROR]
    if recipe.searches:
        bounds += [] if budget.max_ppl_increase is None else [ERROR_SHARE * math.log1p(budget.max_ppl_increase)]
        bounds += [] if budget.max_kl is None else [ERROR_SHARE * budget.max_kl]
    return min(bounds)


def texts_hash(recipe: Recipe) -> str:
    """Sha256 (hex) of the texts that a recipe names. With the model and the recipe they decide every window, those that
    the model writes too.
    """
    file = recipe.calibration.file
    return hash_json(
        hash_file(Path(file)) if file is not None and Path(file).suffix.lower() in JSON_LINES else _split(recipe)[:2]
    )


def heldout_name(recipe: Recipe) -> str:
    """What the held-out text is called."""
    return f"{_name(recipe)}, held out"


def _length(source: Source, recipe: Recipe) -> int:
    return min(
        recipe.calibration.length, int(getattr(source.config, "max_position_embeddings", recipe.calibration.length))
    )


def _name(recipe: Recipe) -> str:
    """What the texts are called."""
    return "Python standard library modules" if recipe.calibration.file is None else Path(recipe.calibration.file).name


def _split(recipe: Recipe, source: Source | None = None) -> tuple[str, str, str]:
    """Calibration text, held-out text, and what was read of a file with documents, whose conversations the chat
    template of `source` writes out.
    """
    if recipe.calibration.file is None:
        return read_text(CALIBRATION_TEXT), read_text(HELDOUT_TEXT), ""
    whole, said = read_whole(
        Path(recipe.calibration.file),
        lambda conversations: write_out(None if source is None else source.tokenizer(), conversations),
    )
    cut = int(len(whole) * (1 - HELDOUT_SHARE))
    return whole[:cut], whole[cut:], said


def chat_form(tokenizer: Any) -> ChatForm:
    """What a tokenizer's chat template writes around what is said. Raises InputError where it has none, fails, or does
    not write what is said as it is.
    """
    user, answer, again = (f"sparsegate{word}turn" for word in ("first", "second", "third"))
    said = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    rendered = _rendered(tokenizer, [said[:1], [*said, {"role": "user", "content": again}]], ask=True)
    first, (_, _, rest), second = rendered[0].split(user), rendered[1].partition(answer), rendered[1].count(answer)
    following = rest.partition(again)[0]
    if len(first) != 2 or second != 1 or rest.count(again) != 1 or not (first[1] and following):
        raise InputError(
            "The chat template must write what a user and the model say as it is, and something between, got one that "
            "does not. Give a text, or --calibration self."
        )
    return ChatForm(opening=first[0], answer=first[1], following=following)


def write_out(tokenizer: Any, conversations: list[Conversation]) -> list[str]:
    """Conversations as texts in a tokenizer's chat template. Raises InputError where it has none or the
    template fails.
    """
    return _rendered(tokenizer, conversations, ask=False) if conversations else []


def _rendered(tokenizer: Any, conversations: list[Conversation], ask: bool) -> list[str]:
    """Conversations in the chat template, with the begin of the next answer where `ask`."""
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str):
        what, remedy = (
            ("--calibration chat", "Give a text, or --calibration self")
            if ask
            else ("Messages", "Give calibration text in the field text")
        )
        raise InputError(f"{what} must be of a model with a chat template, got none. {remedy}.")
    shared = {**tokenizer.special_tokens_map, "tools": None, "documents": None, "add_generation_prompt": ask}
    return render_all(template, shared, conversations)


def _rows(batches: Batches, rows: torch.Tensor, text_order: bool = True) -> Batches:
    rows = rows.sort().values if text_order else rows
    return Batches(batches.tokens[rows], batches.mask[rows])

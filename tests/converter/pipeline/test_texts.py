"""The token windows of a conversion: which parts share windows and which never do, and text that the model writes
itself.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsegate.converter.checkpoint.source import Source, open_source
from sparsegate.converter.pipeline import texts as module
from sparsegate.converter.pipeline.recipe import Budget, Recipe, make_recipe
from sparsegate.converter.pipeline.texts import (
    SEARCH_SHARE,
    SEARCH_WINDOWS,
    chat_form,
    heldout_name,
    make_heldout,
    make_texts,
    quality_error,
    texts_hash,
)
from sparsegate.converter.text import generated as generated_module
from sparsegate.converter.text.chat import ChatForm
from sparsegate.converter.text.windows import Batches, read_text
from sparsegate.runtime_onnx.errors import InputError

LENGTH = 24


@pytest.fixture(name="source")
def _source(tiny_model: Callable[[str], Path]) -> Source:
    return open_source(tiny_model("llama"))


@pytest.fixture(name="text")
def _text(tmp_path: Path) -> Path:
    """Text of which no two windows are equal."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"value_{k} = {k * k}\nname_{k} = {k % 7}\n" for k in range(300)), encoding="utf-8")
    return path


def recipe(
    text: Path | None,
    searches: bool = False,
    windows: int = 20,
    seed: int = 3,
    length: int = LENGTH,
    **calibration: Any,
) -> Recipe:
    values = {
        "model": "m",
        "calibration": {"file": None if text is None else str(text), "windows": windows, "length": length}
        | calibration,
        "seed": seed,
        "stages": [{"method": "gate"}],
        "budget": {"max_kl": 0.1} if searches else {},
    }
    return make_recipe(values)


def rows(batches: Batches | None) -> set[tuple[int, ...]]:
    assert batches is not None
    found = {tuple(row[mask].tolist()) for row, mask in zip(batches.tokens, batches.mask, strict=True)}
    assert len(found) == len(batches.tokens)
    return found


@pytest.mark.parametrize("seed", [0, 3])
def test_what_is_searched_or_measured_on_is_in_no_other_part(source: Source, text: Path, seed: int) -> None:
    found = make_texts(source, recipe(text, searches=True, seed=seed), training=60)
    calibration, training, heldout, search = (
        rows(part) for part in (found.calibration, found.training, found.heldout, found.search)
    )
    assert calibration < training and len(calibration) == 20 and len(training) == 60
    assert not search & training and not heldout & training and not heldout & search
    whole = rows(make_texts(source, recipe(text, windows=100000, seed=seed)).calibration)
    assert len(search) == int(SEARCH_SHARE * len(whole)) and search | training < whole
    assert found.name == "text.txt" and heldout_name(recipe(text)) == "text.txt, held out"
    assert heldout_name(recipe(None)) == "Python standard library modules, held out"


def test_a_search_leaves_the_calibration_as_it_was_where_text_suffices(source: Source, text: Path) -> None:
    plain, searched = (make_texts(source, recipe(text, searches), training=60) for searches in (False, True))
    assert plain.search is None
    assert plain.calibration.sha256 == searched.calibration.sha256 and plain.training.sha256 == searched.training.sha256
    assert rows(plain.heldout) == rows(searched.heldout), "as many windows are taken as tell the loss"
    everything, rest = (make_texts(source, recipe(text, searches, windows=100000)) for searches in (False, True))
    assert rows(rest.calibration) | rows(rest.search) == rows(everything.calibration), (
        "and takes from it where it does not"
    )


def test_the_seed_decides_the_windows(source: Source, text: Path) -> None:
    def hashes(seed: int) -> list[str]:
        found = make_texts(source, recipe(text, True, seed=seed), 40)
        assert found.search is not None
        return [part.sha256 for part in (found.calibration, found.training, found.search)]

    first, again, other = hashes(0), hashes(0), hashes(1)
    assert first == again and not set(first) & set(other)
    assert make_heldout(source, recipe(text, True)).sha256 == make_texts(source, recipe(text, True)).heldout.sha256


def test_the_heldout_text_is_the_last_fifth(source: Source, text: Path) -> None:
    whole = read_text(text)
    tail = source.tokenizer()(whole[int(0.8 * len(whole)) :], add_special_tokens=False)["input_ids"]
    assert rows(make_heldout(source, recipe(text))) <= {
        tuple(tail[k : k + LENGTH]) for k in range(0, len(tail), LENGTH)
    }


def test_windows_are_no_longer_than_the_model_reads(source: Source, text: Path) -> None:
    found = make_texts(source, recipe(text, windows=4, length=1000))
    assert found.calibration.tokens.shape == (4, 256) and found.heldout.tokens.shape[1] == 256


def test_the_hash_of_texts_covers_both_parts(text: Path) -> None:
    first = texts_hash(recipe(text))
    assert first == texts_hash(recipe(text, True, seed=9)) != texts_hash(recipe(None))
    content = text.read_text()
    for changed in (content[:5] + "X" + content[6:], content[:-3] + "X" + content[-2:]):
        text.write_text(changed)
        assert texts_hash(recipe(text)) != first


# Text that the model writes itself


@pytest.fixture(name="sampled")
def _sampled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(windows, length) of every sampling, which goes on as it is."""
    calls, plain = [], generated_module.self_generated
    monkeypatch.setattr(
        generated_module,
        "self_generated",
        lambda model, tokenizer, *rest: calls.append(rest[:2]) or plain(model, tokenizer, *rest),
    )
    return calls


def test_generated_text_is_stored_and_reused(
    source: Source, text: Path, tmp_path: Path, sampled: list[tuple[int, int]]
) -> None:
    asked = recipe(text, windows=6, length=16, generated=True)
    first = make_texts(source, asked, 10, tmp_path / "work")
    assert sampled == [(10, 16)] and first.name == "text sampled from the dense model"
    assert (
        len(first.calibration.tokens) == 6
        and len(first.training.tokens) == 10
        and rows(first.calibration) < rows(first.training)
    )
    again, elsewhere = make_texts(source, asked, 10, tmp_path / "work"), make_texts(source, asked, 10)
    assert len(sampled) == 2, "only where there is no folder to store it in"
    assert first.training.sha256 == again.training.sha256 == elsewhere.training.sha256
    assert first.heldout.sha256 == make_texts(source, recipe(text, windows=6, length=16)).heldout.sha256, (
        "measured on written text as ever"
    )
    for changed in (
        recipe(text, windows=6, length=16, seed=4, generated=True),
        recipe(text, windows=6, length=17, generated=True),
    ):
        assert make_texts(source, changed, 10, tmp_path / "work").training.sha256 != first.training.sha256
    assert len(sampled) == 4


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def with_template(folder: Path, source: Source, template: str | None) -> Source:
    shutil.copytree(source.folder, folder, ignore=shutil.ignore_patterns("chat_template*"))
    tokenizer = source.tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return open_source(folder)


def test_conversations_that_the_model_writes_are_stored_and_reused(
    source: Source, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of text that it writes; held-out text stays what it is."""
    chat = with_template(tmp_path / "chat", source, CHAT)
    calls, plain = [], generated_module.chat_windows
    monkeypatch.setattr(generated_module, "chat_windows", lambda *rest: calls.append(rest[2:5]) or plain(*rest))
    wanted = recipe(text, windows=3, length=40, generated="chat")
    form = ChatForm(opening="<user>", answer="\n<a>", following="\n<user>")
    assert chat_form(chat.tokenizer()) == form
    first = make_texts(chat, wanted, work=tmp_path / "work")
    again = make_texts(chat, wanted, work=tmp_path / "work")
    assert calls == [(form, 3, 40)] and first.name == "conversations sampled from the dense model"
    assert first.calibration.sha256 == again.calibration.sha256
    assert first.heldout.sha256 == make_texts(chat, recipe(text, windows=3, length=40)).heldout.sha256
    for row in first.calibration.tokens:
        said = chat.tokenizer().decode(row)
        assert said.startswith("<user>") and "\n<a>" in said
    plain_text = make_texts(chat, recipe(text, windows=3, length=40, generated=True), work=tmp_path / "work")
    assert plain_text.calibration.sha256 != first.calibration.sha256, "text of the other kind is no conversation"


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (None, r"^--calibration chat must be of a model with a chat template, got none\. Give a text, or"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "^The chat template must write what a user and"),
        ("{{ raise_exception('no') }}", "^The chat template must render the conversation, got: no"),
    ],
)
def test_a_model_that_cannot_chat_is_one_line(
    template: str | None, line: str, source: Source, text: Path, tmp_path: Path
) -> None:
    model = with_template(tmp_path / "chat", source, template)
    with pytest.raises(InputError, match=line):
        make_texts(model, recipe(text, windows=3, length=40, generated="chat"))


def test_generated_text_has_windows_to_search_on(source: Source, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEARCH_WINDOWS", 8)
    found = make_texts(source, recipe(text, True, windows=6, length=16, generated=True), 10)
    assert found.search is not None and [
        len(part.tokens) for part in (found.calibration, found.training, found.search)
    ] == [6, 10, 8]
    assert not rows(found.search) & rows(found.training)
    assert SEARCH_WINDOWS == 256


def too_short(source: Source, asked: Recipe) -> str:
    with pytest.raises(InputError) as error:
        make_texts(source, asked)
    return str(error.value)


def test_too_short_text_is_one_line(
    source: Source, text: Path, sampled: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, whole = source.tokenizer()(read_text(text))["input_ids"], text.with_name("short.txt")
    whole.write_text(source.tokenizer().decode(ids[:300]))
    assert too_short(source, recipe(whole)).startswith("Calibration text must hold at least 512 tokens, got ")
    whole.write_text(source.tokenizer().decode(ids[:1200]))
    for generated in (False, True):
        line = too_short(source, recipe(whole, generated=generated))
        assert (
            line.startswith("The last fifth of the calibration text must hold at least 512 tokens, got ")
            and "\n" not in line
        )
    assert not sampled, "found before anything is sampled"
    monkeypatch.setattr(module, "SEARCH_SHARE", 0.01)
    line = too_short(source, recipe(text, searches=True, length=256))
    assert line.startswith("A budget must have windows to search on, got ") and "\n" not in line


def test_the_first_heldout_windows_are_those_of_fewer(source: Source, text: Path) -> None:
    """So a checkpoint's number of windows says which they were; they are spread over the text."""
    whole = make_heldout(source, recipe(text)).tokens
    for count in (1, 3, len(whole) - 1):
        assert torch.equal(make_heldout(source, recipe(text), count).tokens, whole[:count])
    tail = make_heldout(source, recipe(text, seed=4)).tokens
    assert rows(make_heldout(source, recipe(text, seed=4))) == rows(
        make_heldout(source, recipe(text))
    ) and not torch.equal(tail, whole)


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [
        ({}, 0.005),
        ({"max_ppl_increase": 0.01}, 0.1 * math.log(1.01)),
        ({"max_kl": 0.02}, 0.002),
        ({"max_ppl_increase": 0.5, "max_kl": 0.3}, 0.005),
    ],
)
def test_a_searched_budget_is_measured_more_exactly(budget: dict[str, float], wanted: float) -> None:
    asked = recipe(None).model_copy(update={"budget": Budget(**budget)})
    assert quality_error(asked) == pytest.approx(wanted)

"""Mixtures of texts: windows against brute force, shares, seeds, independence of parts, streams, and what
goes wrong.
"""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import VOCAB, make_tokenizer
from tokenizers.processors import TemplateProcessing

from sparsegate.converter.checkpoint.stage import RECORD, write_json
from sparsegate.converter.text import mixture as mixtures
from sparsegate.converter.text import windows as data_module
from sparsegate.converter.text.mixture import Data, Mix, counts, mixture_batches
from sparsegate.runtime_onnx.errors import InputError

END = 1
LOADERS = ("fake", *(("real",) if find_spec("datasets") else ()))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def words(stem: str, lines: int, end: str = "\n") -> str:
    """Lines that tell their stem and number in every few tokens."""
    return "".join(f"{stem}{k}={37 * k + 11}{end}" for k in range(lines))


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def make(*parts: Mix, windows: int = 12, length: int = 16) -> Data:
    return Data(windows=windows, length=length, mixture=parts)


def part(name: str, share: float, *files: str) -> Mix:
    return Mix(name=name, share=share, files=files)


def rows(batches: Any) -> set[tuple[int, ...]]:
    found = {tuple(row) for row in batches.tokens.tolist()}
    assert len(found) == len(batches.tokens)  # texts of the tests repeat nothing, so rows can tell where they are from
    return found


def packed(tokenizer: Any, documents: list[str], body: int) -> list[tuple[int, ...]]:
    """Brute force: all documents at once, each with the end token."""
    ids = [token for text in documents for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], END]]
    return [tuple(ids[at : at + body]) for at in range(0, len(ids) - body + 1, body)]


@pytest.mark.parametrize(
    ("shares", "windows", "expected"),
    [
        ((1, 1), 10, [5, 5]),
        (
            (73.55, 7.83, 6.54, 2.69, 1.73, 1.46, 1.41, 0.77, 0.76, 0.74, 0.65, 0.54, 0.52, 0.44, 0.37),
            1000,
            [736, 78, 65, 27, 17, 15, 14, 8, 8, 7, 7, 5, 5, 4, 4],
        ),
        ((1, 1, 1), 10, [4, 3, 3]),
        ((0.999, 0.001), 10, [10, 0]),
        ((0.3, 0.6, 0.1), 10, [3, 6, 1]),
        ((0.54, 6.54, 2.92), 10, [1, 6, 3]),
        ((7, 2, 1), 4096, [2867, 819, 410]),
    ],
)
def test_counts_are_within_one_window_of_the_shares(
    shares: tuple[float, ...], windows: int, expected: list[int]
) -> None:
    found = counts(shares, windows)
    assert found == expected and sum(found) == windows
    assert all(abs(count - windows * share / sum(shares)) < 1 for count, share in zip(found, shares, strict=True))


def test_one_small_file_is_one_document_packed_whole(tokenizer: Any, tmp_path: Path) -> None:
    text = words("a", 30)
    expected = packed(tokenizer, [text], 16)
    found = mixture_batches(
        tokenizer, make(part("a", 1, write(tmp_path / "a.txt", text)), windows=len(expected)), 0, tmp_path / "work"
    )
    assert (
        found.tokens.dtype == torch.int64
        and found.tokens.shape == found.mask.shape == (len(expected), 16)
        and bool(found.mask.all())
    )
    assert [tuple(row) for row in found.tokens.tolist()] == expected
    assert found.count == len(expected) * 16


def test_documents_are_joined_by_the_end_token(tokenizer: Any, tmp_path: Path) -> None:
    texts = [words("a", 15), words("b", 16), words("c", 17)]
    files = [write(tmp_path / f"{k}.txt", text) for k, text in enumerate(texts)]
    orders = [
        packed(tokenizer, [texts[k] for k in order], 16)
        for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    ]
    seen = set()
    for seed in range(6):
        found = rows(
            mixture_batches(tokenizer, make(part("a", 1, *files), windows=len(orders[0])), seed, tmp_path / "work")
        )
        (order,) = [k for k, expected in enumerate(orders) if set(expected) == found]
        seen.add(order)
    assert len(seen) > 1  # the seed draws the order of documents
    empty = write(tmp_path / "empty.txt", "")
    again = rows(mixture_batches(tokenizer, make(part("a", 1, files[0], empty), windows=5), 0, tmp_path / "work"))
    assert again == set(packed(tokenizer, texts[:1], 16)[:5])


def test_windows_start_with_the_start_token_where_texts_do(tmp_path: Path) -> None:
    starting = make_tokenizer()
    starting._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # type: ignore[attr-defined]
    text = words("a", 30)
    found = mixture_batches(
        starting, make(part("a", 1, write(tmp_path / "a.txt", text)), windows=10), 0, tmp_path / "work"
    )
    assert rows(found) == {(0, *window) for window in packed(starting, [text], 15)[:10]}


@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_long_files_are_read_in_blocks_that_lose_nothing(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, tmp_path: Path, end: str
) -> None:
    monkeypatch.setattr(mixtures, "BLOCK", 257)
    monkeypatch.setattr(mixtures, "_CUT", 40)
    text = "".join(f"prüfe_{k} = '–{'…' * (k % 7)}𝔘' + {k}{end}" for k in range(120))
    path = tmp_path / "long.txt"
    write(path, text)
    sizes = []
    monkeypatch.setattr(mixtures, "open", lambda *given: Counting(open(*given), sizes), raising=False)
    blocks = list(mixtures._blocks([path], "long", 3))
    assert max(sizes) <= 257 + 40 and len(blocks) == -(
        -path.stat().st_size // 257
    )  # no more than a block is read at once
    clean = text.replace("\r\n", "\n")
    starts = [clean.index(block) for block in blocks if block]
    assert starts != sorted(starts)
    assert (
        "".join(block for _, block in sorted(zip(starts, [block for block in blocks if block], strict=True))) == clean
    )
    if end != " ":
        assert all(block.endswith("\n") for block in blocks if block)
    expected = packed(tokenizer, blocks, 16)
    monkeypatch.undo()
    monkeypatch.setattr(mixtures, "BLOCK", 257)
    monkeypatch.setattr(mixtures, "_CUT", 40)
    assert list(mixtures._windows(blocks, tokenizer, 16)) == [list(window) for window in expected]


class Counting:
    """A file that notes how many bytes each read asks for."""

    def __init__(self, file: Any, sizes: list[int]) -> None:
        self.file, self.sizes = file, sizes

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def seek(self, at: int) -> None:
        self.file.seek(at)

    def read(self, size: int = -1) -> bytes:
        assert size >= 0
        self.sizes.append(size)
        return self.file.read(size)


@pytest.fixture
def three(tmp_path: Path) -> list[Mix]:
    """Parts whose tokens tell them apart."""
    return [
        part(name, share, write(tmp_path / f"{name}.txt", words(name, 60)))
        for name, share in (("left", 6), ("middle", 3), ("right", 1.2))
    ]


def of_part(tokenizer: Any, found: set[tuple[int, ...]], three: list[Mix]) -> dict[str, set[tuple[int, ...]]]:
    every = {mix.name: set(packed(tokenizer, [Path(mix.files[0]).read_text()], 16)) for mix in three}
    return {name: found & windows for name, windows in every.items()}


def test_shares_hold_and_parts_do_not_depend_on_each_other(tokenizer: Any, three: list[Mix], tmp_path: Path) -> None:
    first = mixture_batches(tokenizer, make(*three, windows=40), 5, tmp_path / "work")
    found = of_part(tokenizer, rows(first), three)
    assert [len(found[mix.name]) for mix in three] == counts([6, 3, 1.2], 40) == [23, 12, 5]
    assert sum(map(len, found.values())) == 40  # every window is of one part
    turned = mixture_batches(tokenizer, make(*reversed(three), windows=40), 5, tmp_path / "turned")
    assert turned.sha256 == first.sha256 and torch.equal(turned.tokens, first.tokens)
    alone = of_part(
        tokenizer, rows(mixture_batches(tokenizer, make(three[1], windows=12), 5, tmp_path / "alone")), three
    )
    assert alone["middle"] == found["middle"]


def test_the_seed_decides_everything(
    tokenizer: Any, three: list[Mix], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixtures, "BLOCK", 300)
    data = make(*three, windows=20)
    found = [mixture_batches(tokenizer, data, seed, tmp_path / f"{k}").sha256 for k, seed in enumerate((1, 1, 2))]
    assert found[0] == found[1] != found[2]


def test_windows_are_made_once_and_again_when_anything_changes(
    tokenizer: Any, three: list[Mix], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    kept = mixtures._write
    monkeypatch.setattr(mixtures, "_write", lambda *given: made.append(1) or kept(*given))
    data, work = make(*three), tmp_path / "work"
    first = mixture_batches(tokenizer, data, 0, work).sha256
    assert mixture_batches(tokenizer, data, 0, work).sha256 == first and len(made) == 1
    assert json.loads((work / "mixture" / "seconds.json").read_text())["seconds"] > 0
    assert (
        mixture_batches(tokenizer, data.model_copy(update={"temperature": 2.0}), 0, work).sha256 == first
        and len(made) == 1
    )  # nothing is sampled
    write(Path(three[0].files[0]), words("other", 60))
    assert mixture_batches(tokenizer, data, 0, work).sha256 != first and len(made) == 2
    other = make_tokenizer()
    other.add_tokens(["return"])
    mixture_batches(other, data, 0, work)
    mixture_batches(other, data, 1, work)
    mixture_batches(other, make(*three, windows=13), 1, work)
    assert len(made) == 5
    write_json(work / RECORD, {"kind": "sparsegate folder", "version": 1})  # a work folder of ours
    (work / "mixture" / "header.json").unlink()
    mixture_batches(other, make(*three, windows=13), 1, work)
    assert len(made) == 6


def test_windows_are_hashed_in_pieces_to_the_hash_of_the_whole(
    tokenizer: Any, three: list[Mix], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "_HASHED", 5)
    found = mixture_batches(tokenizer, make(*three, windows=12), 0, tmp_path / "work")
    whole = sha256(b"(12, 16)" + found.tokens.numpy().tobytes() + b"\1" * 12 * 16)
    assert found.sha256 == whole.hexdigest()


def test_what_is_wrong_is_said(
    tokenizer: Any, three: list[Mix], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*parts: Mix, by: Any = tokenizer, **fields: int) -> str:
        with pytest.raises(InputError) as error:
            mixture_batches(by, make(*parts, **fields), 0, tmp_path / "work")
        assert not (tmp_path / "work" / "mixture").exists()
        return str(error.value)

    left = len(packed(tokenizer, [words("left", 60)], 16))
    message = said(*three, windows=2 * left)  # of which left needs 2 * 6 / 10.2
    assert (
        "part left" in message
        and f"got {left * 16} in full windows" in message
        and f"must give {round(2 * left * 6 / 10.2) * 16} tokens" in message
    )
    assert "at least one part" in said()
    assert "names of their own, got left, left" in said(three[0], three[0])
    assert "no file at" in said(part("gone", 1, str(tmp_path / "gone.txt")))
    (tmp_path / "latin.txt").write_bytes(words("a", 60).encode() + b"\xe9t\xe9 = 1\n" * 9)
    message = said(part("latin", 1, str(tmp_path / "latin.txt")))
    assert "must be UTF-8" in message and f"byte {len(words('a', 60))}." in message
    endless = make_tokenizer()
    endless.eos_token = None
    assert "end token" in said(*three, by=endless)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the package datasets" in said(Mix(name="web", share=1, dataset="some/web"))


class Fake:
    """The parts of `datasets` that are used, over rows in memory. `calls` are the arguments of load_dataset."""

    def __init__(self, texts: list[str], field: str = "text", error: Exception | None = None) -> None:
        self.texts, self.field, self.error, self.calls, self.given = texts, field, error, [], 0

    def load_dataset(self, path: str, **options: Any) -> Any:
        self.calls.append((path, options))
        if self.error is not None:
            raise self.error
        return SimpleNamespace(shuffle=self.shuffle)

    def shuffle(self, seed: int, buffer_size: int) -> Any:
        assert buffer_size > 1
        for k in torch.randperm(len(self.texts), generator=torch.Generator().manual_seed(seed)).tolist():
            self.given += 1
            yield {"id": k, self.field: self.texts[k]}


def use(monkeypatch: pytest.MonkeyPatch, fake: Fake) -> Fake:
    monkeypatch.setitem(sys.modules, "datasets", fake)  # type: ignore[arg-type]
    return fake


@pytest.mark.parametrize("loader", LOADERS)
def test_a_streamed_part_is_packed_like_files(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, tmp_path: Path, loader: str
) -> None:
    texts = [words(f"w{k}x", 2) for k in range(30)]
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for half in range(2):
        lines = "".join(
            json.dumps({"id": k, "content": text}) + "\n" for k, text in enumerate(texts[15 * half : 15 * half + 15])
        )
        write(folder / "data" / f"train-{half}.jsonl", lines)
    if loader == "fake":
        use(monkeypatch, Fake(texts, "content"))
    mix = Mix(name="web", share=2, dataset=str(folder), subset="data/train-*.jsonl", field="content")
    files = part("file", 1, write(tmp_path / "file.txt", words("file", 60)))
    foreign = set(packed(tokenizer, [words("file", 60)], 16))
    known = [[*tokenizer(text, add_special_tokens=False)["input_ids"], END] for text in texts]

    def drawn(seed: int, work: str) -> list[int]:
        found = mixture_batches(tokenizer, make(mix, files, windows=24), seed, tmp_path / work)
        own = [
            row for row in map(tuple, found.tokens.tolist()) if row not in foreign
        ]  # a part's windows stand in the order of its text
        assert len(own) == 16
        pieces = pieces_of([token for row in own for token in row])
        order = [next(k for k, whole in enumerate(known) if whole[: len(piece)] == piece) for piece in pieces]
        assert all(piece == known[k] for piece, k in zip(pieces[:-1], order, strict=False))
        assert len(set(order)) == len(order) and order != sorted(order)
        return order

    assert drawn(0, "work") == drawn(0, "again") != drawn(1, "other")


def pieces_of(tokens: list[int]) -> list[list[int]]:
    """Documents of a token sequence, each with its end token; the last may be unfinished."""
    found: list[list[int]] = [[]]
    for token in tokens:
        found[-1].append(token)
        if token == END:
            found.append([])
    return [piece for piece in found if piece]


@pytest.mark.parametrize(
    ("fields", "path", "options"),
    [
        ({"dataset": "some/web"}, "some/web", {"name": None, "split": "train"}),
        ({"dataset": "some/web", "subset": "en", "split": "valid"}, "some/web", {"name": "en", "split": "valid"}),
        (
            {"dataset": "some/code", "subset": "java/train-*.parquet", "field": "content"},
            "parquet",
            {
                "data_files": {"train": "hf://datasets/some/code/java/train-*.parquet"},
                "split": "train",
                "columns": ["content"],
            },
        ),
        (
            {"dataset": "some/papers", "subset": "data/v2/*.json.gz"},
            "json",
            {"data_files": {"train": "hf://datasets/some/papers/data/v2/*.json.gz"}, "split": "train"},
        ),
    ],
)
def test_how_datasets_are_opened(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, tmp_path: Path, fields: Any, path: str, options: Any
) -> None:
    fake = use(monkeypatch, Fake([words(f"w{k}x", 2) for k in range(500)], fields.get("field", "text")))
    found = mixture_batches(tokenizer, make(Mix(name="web", share=1, **fields)), 0, tmp_path / "work")
    assert fake.calls == [(path, options | {"streaming": True})] and found.tokens.max() < VOCAB
    assert fake.given <= 2 * mixtures._BATCH_DOCUMENTS  # a stream stops when there is enough


@pytest.mark.parametrize(
    ("fields", "fake", "sign"),
    [
        ({}, Fake(["short"]), "before it ran dry"),
        ({}, Fake(["x"], "content"), "text in its field text, got id, content"),
        ({"field": "id"}, Fake(["x"]), "got int in it"),
        ({"subset": "data/*.csv"}, Fake(["x"]), r"must name .parquet, .json, .*got data/\*.csv"),
        (
            {},
            Fake([], error=RuntimeError("Dataset scripts are no longer supported, but found web.py")),
            "some/web: RuntimeError Dataset scripts",
        ),
        ({}, Fake([], error=FileNotFoundError("no such dataset\nmore")), "no such dataset. Check its id"),
    ],
)
def test_what_is_wrong_with_a_stream_is_said(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, tmp_path: Path, fields: Any, fake: Fake, sign: str
) -> None:
    use(monkeypatch, fake)
    with pytest.raises(InputError, match=sign):
        mixture_batches(
            tokenizer, make(Mix(name="web", share=1, **{"dataset": "some/web", **fields})), 0, tmp_path / "work"
        )


def test_a_part_whose_share_is_no_window_is_not_opened(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, three: list[Mix], tmp_path: Path
) -> None:
    fake = use(monkeypatch, Fake([], error=RuntimeError("opened")))
    found = mixture_batches(
        tokenizer, make(three[0], Mix(name="rare", share=0.01, dataset="some/web")), 0, tmp_path / "work"
    )
    assert len(rows(found)) == 12 and not fake.calls

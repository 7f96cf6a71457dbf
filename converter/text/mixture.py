"""A mixture of texts to token windows [N, S]: files read in blocks and datasets streamed, documents joined by the end
token and packed without padding.

A window holds text of one part. Every part gets the whole number of windows next below or above its share, so its
tokens are within one window's of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file

from ...runtime_onnx.errors import InputError
from ..checkpoint.fields import LONGEST, MOST_WINDOWS, Strict
from ..checkpoint.stage import Header, atomic_folder, hash_file, hash_json, is_finished, write_header, write_json
from ..progress import update
from ..progress.libraries import datasets_silenced
from .windows import Batches

BLOCK = 1 << 16  # bytes of a file that make a document
_CUT = 1 << 12  # bytes in which a block's end looks for the end of a line
_BATCH_DOCUMENTS = 16  # documents tokenised in one call
_EPSILON = 1e-6  # of a window: 2.9999999 is 3
_SHUFFLED = 1000  # documents of a stream held to draw the next from
FOLDER, SECONDS, _TOKENS = "mixture", "seconds.json", "tokens.safetensors"
_PACKED = (".gz", ".zst", ".bz2", ".xz")
_LOADERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".txt": "text"}


def mixture_batches(tokenizer: Any, data: Data, seed: int, work: Path) -> Batches:
    """`data.windows` windows of `data.length` tokens of a mixture, drawn by `seed`.

    They are made once below `work` and read from there through a memory map.

    1. The order of the parts does not matter, and one part's tokens do not depend on the others.
    2. Where the tokenizer starts a text with a special token, every window does.
    3. A file of up to BLOCK bytes is one document. A longer one is cut at line ends into documents of about that size.
    4. What has changed in a streamed dataset since the windows were made is not noticed.

    Raises InputError when a part cannot be read or gives too few tokens, when parts share a name, or the tokenizer has
    no end token.
    """
    if not data.mixture:
        raise InputError(
            "A mixture must have at least one part, got none. Add parts with a name, a share, and files or a dataset."
        )
    names = [part.name for part in data.mixture]
    if len(set(names)) < len(names):
        raise InputError(f"The parts of a mixture must have names of their own, got {', '.join(names)}. Rename one.")
    if tokenizer.eos_token_id is None:
        raise InputError("The tokenizer must have an end token to join documents by, got none. Set its eos_token.")
    folder, header = Path(work) / FOLDER, _header(tokenizer, data, seed)
    if not is_finished(folder, header):
        began = time.monotonic()
        with atomic_folder(folder) as partial:
            _write(partial / _TOKENS, tokenizer, data, seed)
            write_json(partial / SECONDS, {"seconds": time.monotonic() - began})
            write_header(partial, header)
    tokens = load_file(folder / _TOKENS)["tokens"]
    return Batches(tokens, torch.ones((1, 1), dtype=torch.bool).expand(tokens.shape))


def files_hash(data: Data) -> str | None:
    """Sha256 (hex) over the bytes of a mixture's files; None where none is named. Raises InputError for a file that is
    absent.
    """
    hashes = {part.name: [hash_file(path) for path in _paths(part)] for part in _sorted(data) if part.files}
    return hash_json(hashes) if hashes else None


def counts(shares: Sequence[float], windows: int) -> list[int]:
    """Whole windows [P] that sum to `windows`, each less than one from its share: of equal remainders the first is
    rounded up.
    """
    exact = [windows * share / sum(shares) for share in shares]
    whole = [int(value + _EPSILON) for value in exact]
    for k in sorted(range(len(shares)), key=lambda k: round((whole[k] - exact[k]) / _EPSILON))[: windows - sum(whole)]:
        whole[k] += 1
    return whole


def _header(tokenizer: Any, data: Data, seed: int) -> Header:
    parts = [
        part.model_dump(mode="json") | {"files": [hash_file(path) for path in _paths(part)]} for part in _sorted(data)
    ]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else tokenizer.get_vocab()
    config = {"windows": data.windows, "length": data.length, "parts": parts, "block": BLOCK}
    return Header(
        format="mixture",
        parents={"tokenizer": hash_json([words, _start(tokenizer), tokenizer.eos_token_id])},
        config=config,
        seed=seed,
    )


def _sorted(data: Data) -> list[Mix]:
    return sorted(data.mixture, key=lambda part: part.name)


def _start(tokenizer: Any) -> list[int]:
    """What every window starts with."""
    probe = tokenizer("a")["input_ids"]
    return (
        [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and probe[:1] == [tokenizer.bos_token_id] else []
    )


def _write(path: Path, tokenizer: Any, data: Data, seed: int) -> None:
    """The windows of all parts, in an order drawn by `seed`, as a safetensors file with one tensor "tokens" [N, S]
    int64. Memory holds a few documents, never the whole.
    """
    parts, shape, start = _sorted(data), (data.windows, data.length), _start(tokenizer)
    about = json.dumps(
        {"tokens": {"dtype": "I64", "shape": shape, "data_offsets": [0, 8 * data.windows * data.length]}}
    ).encode()
    about += b" " * (-len(about) % 8)  # safetensors aligns the data to 8 bytes
    base, size, body = 8 + len(about), 8 * data.length, data.length - len(start)
    order, done, written = torch.randperm(data.windows, generator=torch.Generator().manual_seed(seed)), 0, 0
    with open(path, "wb") as file:
        file.write(len(about).to_bytes(8, "little") + about)
        for part, count in zip(parts, counts([part.share for part in parts], data.windows), strict=True):
            rows = order[done : done + count].sort().values.tolist()
            done += count
            full = 0
            if count:
                for row, window in zip(rows, _windows(_documents(part, seed), tokenizer, body), strict=False):
                    file.seek(base + row * size)
                    file.write(np.asarray([*start, *window], dtype="<i8").tobytes())
                    full += 1
                    written += 1
                    update(written, data.windows, part.name, "window")
            if full < count:
                raise InputError(
                    f"The part {part.name} of the mixture must give {count * body} tokens, got {full * body} in full "
                    "windows before it ran dry. "
                    "Add text, lower its share, or ask for fewer windows."
                )


def _windows(documents: Iterable[str], tokenizer: Any, body: int) -> Iterator[list[int]]:
    """Documents as tokens, each followed by the end token, cut into windows of `body` tokens; an unfinished last one is
    left out.
    """
    pending: list[int] = []
    texts = iter(documents)
    while group := list(islice(texts, _BATCH_DOCUMENTS)):
        for ids in tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]:
            if not ids:
                continue
            pending += [*ids, tokenizer.eos_token_id]
            whole = len(pending) // body * body
            yield from (pending[at : at + body] for at in range(0, whole, body))
            del pending[:whole]


def _documents(part: Mix, seed: int) -> Iterator[str]:
    return _blocks(_paths(part), part.name, seed) if part.files else _stream(part, seed)


def _paths(part: Mix) -> list[Path]:
    """The files of a part. Raises InputError for the first that is none."""
    paths = [Path(file) for file in part.files]
    for path in paths:
        if not path.is_file():
            raise InputError(
                f"The part {part.name} of the mixture must be UTF-8 text files, got no file at {path}. Check the path."
            )
    return paths


def _blocks(paths: Sequence[Path], name: str, seed: int) -> Iterator[str]:
    """Blocks of the files in an order drawn by `seed`; no more than one is in memory."""
    places = [(path, at) for path in paths for at in range(0, path.stat().st_size, BLOCK)]
    for k in torch.randperm(len(places), generator=torch.Generator().manual_seed(seed)).tolist():
        path, at = places[k]
        first, last = _boundary(path, at), _boundary(path, at + BLOCK)
        with open(path, "rb") as file:
            file.seek(first)
            piece = file.read(last - first)
        try:
            yield piece.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise InputError(
                f"The part {name} of the mixture must be UTF-8, got other bytes in {path} near byte "
                f"{first + error.start}. Convert the file."
            ) from None


def _boundary(path: Path, at: int) -> int:
    """Where the block that starts at byte `at` or a little later starts: behind the next line's end, or, in long lines,
    at the next character.
    """
    size = path.stat().st_size
    if at == 0 or at >= size:
        return min(at, size)
    with open(path, "rb") as file:
        file.seek(at)
        near = file.read(_CUT)
    line = near.find(b"\n")
    if line >= 0:
        return at + line + 1
    return at + next(
        (k for k, byte in enumerate(near) if byte & 0xC0 != 0x80), len(near)
    )  # 10xxxxxx continues a character


def _stream(part: Mix, seed: int) -> Iterator[str]:
    """The texts of a dataset, in an order drawn by `seed`. A subset with a slash in it is a pattern of files in the
    repository or folder, which are read without its configuration, as repositories with a loading script need.
    """
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError:
        raise InputError(
            f"The part {part.name} of the mixture needs the package datasets, got none. Run pip install "
            '"sparsegate[eval]".'
        ) from None
    assert part.dataset is not None
    try:
        with datasets_silenced():
            if part.subset is None or "/" not in part.subset:
                rows = load_dataset(part.dataset, name=part.subset, split=part.split, streaming=True)
            else:
                loader = _loader(part.subset, part.name)
                root = part.dataset if Path(part.dataset).is_dir() else f"hf://datasets/{part.dataset}"
                columns = {"columns": [part.field]} if loader == "parquet" else {}
                rows = load_dataset(
                    loader,
                    data_files={part.split: f"{root}/{part.subset}"},
                    split=part.split,
                    streaming=True,
                    **columns,
                )
        rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLED)
        for row in rows:
            text = row.get(part.field)
            if not isinstance(text, str):
                got = ", ".join(row) if part.field not in row else f"{type(text).__name__} in it"
                raise InputError(
                    f"The part {part.name} of the mixture must have text in its field {part.field}, got {got}. Name "
                    "another field."
                )
            yield text
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise InputError(
            f"The part {part.name} of the mixture must be a dataset that can be streamed, got {part.dataset}: "
            f"{type(error).__name__} {lines[0]}. "
            "Check its id, subset and split, its terms, and the network."
        ) from error


def _loader(pattern: str, name: str) -> str:
    suffixes = [suffix for suffix in Path(pattern).suffixes if suffix not in _PACKED]
    if not suffixes or suffixes[-1] not in _LOADERS:
        raise InputError(
            f"The part {name} of the mixture must name {', '.join(_LOADERS)} files, got {pattern}. Correct its subset."
        )
    return _LOADERS[suffixes[-1]]


class Mix(Strict):
    """A part of a mixture: UTF-8 text `files`, or a Hub `dataset` (with its `subset`, `split` and text `field`) that is
    streamed; `share` of the tokens, in any unit that all parts share.
    """

    name: str
    share: float = Field(gt=0)
    files: tuple[str, ...] = ()
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    field: str = "text"

    @model_validator(mode="after")
    def _check(self) -> Mix:
        if bool(self.files) == (self.dataset is not None):
            raise ValueError("a part must have either files or a dataset")
        return self


class Data(Strict):
    """What weights are trained on: `windows` of `length` tokens, of a mixture, or, without one, sampled from the dense
    source itself at `temperature`.
    """

    windows: int = Field(default=4096, ge=2, le=MOST_WINDOWS)
    length: int = Field(default=256, ge=16, le=LONGEST)
    temperature: float = Field(default=1.0, gt=0)
    mixture: tuple[Mix, ...] = ()

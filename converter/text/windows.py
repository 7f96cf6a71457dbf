"""Text to token batches [N, S]: seeded, hashed, padding masked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import read_bytes

MINIMUM_TOKENS = 512
LARGEST_TEXT = 1 << 30
"""Bytes of a text file: it is held in memory whole, with its tokens."""
_HASHED = 1 << 12  # windows hashed at once: they may be mapped from a file larger than memory


@dataclass(frozen=True)
class Batches:
    """Token windows: `tokens` [N, S] int64, `mask` [N, S] bool (False is padding), `sha256` of both."""

    tokens: Tensor
    mask: Tensor

    @property
    def sha256(self) -> str:
        """Hash (hex) of tokens, mask and their shape."""
        digest = hashlib.sha256(repr(tuple(self.tokens.shape)).encode())
        for part in (*self.tokens.split(_HASHED), *self.mask.split(_HASHED)):
            digest.update(part.contiguous().flatten().numpy().data)
        return digest.hexdigest()

    @property
    def count(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask.sum())


def read_text(path: Path) -> str:
    """The text of a UTF-8 file of at most LARGEST_TEXT bytes, with newlines as line ends and without a byte order mark.

    Raises InputError when it is missing, empty, larger, no regular file or no text.
    """
    try:
        text = read_bytes(path, LARGEST_TEXT).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise InputError(f"Calibration text must be a UTF-8 file, got nothing at {path}. Check the path.") from None
    except UnicodeDecodeError:
        raise InputError(f"Calibration text must be UTF-8, got other bytes in {path}. Convert the file.") from None
    except ValueError as error:  # also of a path with a zero byte
        raise InputError(
            f"Calibration text must be a regular UTF-8 file of at most {LARGEST_TEXT >> 20} MiB, got {path} ({error}). "
            "Give another file."
        ) from None
    if not text.strip():
        raise InputError(
            f"Calibration text must hold at least {MINIMUM_TOKENS} tokens, got an empty file {path}. Give more text."
        )
    return text


def make_batches(
    tokenizer: Any,
    text: str,
    windows: int,
    length: int,
    seed: int,
    name: str = "Calibration text",
    text_order: bool = True,
) -> Batches:
    """Cut `text` into windows of `length` tokens and draw `windows` of them by `seed`, in text order or as they were
    drawn: then the first of many windows are those that fewer would have been.

    Where the tokenizer starts a text with a special token, every window does. The last window of a text may be padded.
    Raises InputError when the text has fewer than MINIMUM_TOKENS tokens.
    """
    ids = _token_ids(tokenizer, text, name)
    return _windows(ids, start_tokens(tokenizer), windows, length, seed, text_order)


def make_long_batches(
    tokenizer: Any, text: str, windows: int, longest: int, seed: int, name: str = "Held-out text"
) -> Batches:
    """Up to `windows` windows without padding, drawn by `seed`, of the largest power of two of at most `longest` tokens
    that the text has two of. Raises InputError as `make_batches` does.
    """
    ids, start = _token_ids(tokenizer, text, name), start_tokens(tokenizer)
    length = 1 << (min(longest, len(ids) // 2).bit_length() - 1)
    every = _windows(ids, start, len(ids), length, seed, text_order=False)
    whole = every.mask.all(1)
    return Batches(every.tokens[whole][:windows], every.mask[whole][:windows])


def start_tokens(tokenizer: Any) -> list[int]:
    """The special token that the tokenizer starts a text with, where it does."""
    first = tokenizer.bos_token_id
    return [first] if first is not None and tokenizer("a")["input_ids"][:1] == [first] else []


def _token_ids(tokenizer: Any, text: str, name: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < MINIMUM_TOKENS:
        raise InputError(f"{name} must hold at least {MINIMUM_TOKENS} tokens, got {len(ids)}. Give more text.")
    return ids


def _windows(ids: list[int], start: list[int], windows: int, length: int, seed: int, text_order: bool) -> Batches:
    body = length - len(start)
    cut = [ids[k : k + body] for k in range(0, len(ids), body)]
    picked = torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed))[:windows]
    picked = (picked.sort().values if text_order else picked).tolist()
    tokens = torch.zeros(
        (len(picked), length), dtype=torch.int64
    )  # padding is masked; 0 is in every vocabulary, a tokenizer's padding token need not be
    mask = torch.zeros((len(picked), length), dtype=torch.bool)
    for row, k in enumerate(picked):
        window = [*start, *cut[k]]
        tokens[row, : len(window)] = torch.tensor(window)
        mask[row, : len(window)] = True
    return Batches(tokens, mask)

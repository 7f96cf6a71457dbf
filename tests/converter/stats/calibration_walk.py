"""Batches for the calibration pass, and what it wrote."""

from __future__ import annotations

from pathlib import Path

import torch
from models import VOCAB

from sparsegate.converter.text.windows import Batches

BOTH = ["histogram:gate", "samples:magnitude"]


def make_batches(windows: int = 11, length: int = 40, padded: bool = True, seed: int = 0) -> Batches:
    tokens = torch.randint(3, VOCAB, (windows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if padded:
        mask[2, 30:] = False
        mask[-1, 23:] = False
        tokens[~mask] = 0
    return Batches(tokens, mask)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.safetensors")}


def times(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}

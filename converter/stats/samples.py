"""Inputs and scores of a sample of tokens, for predictors: the only statistic that stores activations.

Tokens are chosen by a hash of (seed, position), so the choice depends neither on batches nor on workers; at most CAP
tokens a site are kept, in fp16 on disk. Scores are stored as a share of the token's largest, which keeps their order
within fp16's range.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import StatSetup, file_name

CAP = 65536
_FP16_MAX = 65504.0


def mix(positions: Tensor, seed: int) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014) on positions [T] int64: uniform hashes, int64 [T]."""
    value = positions.numpy().astype(np.uint64) + np.uint64((0x9E3779B97F4A7C15 * (seed + 1)) % 2**64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((value ^ (value >> np.uint64(31))).view(np.int64))


def init(setup: StatSetup) -> dict[str, Any]:
    """Lay out `x` [K, d] and `score` [K, n] fp16 in a safetensors file; K is at most CAP and the tokens to come.

    Rows are written, not mapped: a map would count as resident memory, and a full disk would kill the process instead
    of raising OSError.
    """
    rows = min(CAP, setup.tokens)
    shapes = {"x": (rows, setup.hidden), "score": (rows, setup.units)}
    header, offset = {}, 0
    for name, (height, width) in shapes.items():
        size = 2 * height * width
        header[name] = {"dtype": "F16", "shape": [height, width], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = setup.folder / file_name(setup.name)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    hashes = mix(torch.arange(setup.tokens), setup.seed)
    starts = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in shapes}
    return {
        "filled": 0,
        "rows": rows,
        "seed": setup.seed,
        "last": hashes.kthvalue(rows).values,
        "path": path,
        "starts": starts,
    }


def update(state: dict[str, Any], x: Tensor, score: Tensor, positions: Tensor) -> None:
    """Keep the tokens of this batch that the hash picks; x [T, d], score [T, n], positions [T] count tokens over all
    windows.
    """
    kept = (mix(positions, state["seed"]) <= state["last"]).nonzero().flatten()
    if len(kept) == 0:
        return
    picked = score[kept.to(score.device)]
    share = picked / picked.amax(dim=1, keepdim=True).clamp_min(1e-30)
    _write(state, "x", x[kept.to(x.device)].clamp(-_FP16_MAX, _FP16_MAX).half())
    _write(state, "score", share.half())
    state["filled"] += len(kept)


def finish(state: dict[str, Any]) -> dict[str, Tensor]:
    """Nothing is left to store: the rows are in the file."""
    assert state["filled"] == state["rows"]
    return {}


def _write(state: dict[str, Any], name: str, rows: Tensor) -> None:
    path: Path = state["path"]
    with open(path, "r+b") as file:
        file.seek(state["starts"][name] + state["filled"] * rows.shape[1] * rows.element_size())
        file.write(rows.cpu().contiguous().numpy().data)

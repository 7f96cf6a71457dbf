"""Inputs and scores of a sample of tokens, for predictors: the only statistic that stores activations.

Tokens are chosen by a hash of (seed, position), so the choice depends neither on batches nor on workers; at most CAP tokens a site are kept, in fp16 on disk.
Scores are stored as a share of the token's largest, which keeps their order within fp16's range.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import Setting, file_name

CAP = 65536
_FP16_MAX = 65504.0


def mix(positions: Tensor, seed: int) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014) on positions [T] int64: uniform hashes, int64 [T]."""
    value = positions.numpy().astype(np.uint64) + np.uint64((0x9E3779B97F4A7C15 * (seed + 1)) % 2**64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((value ^ (value >> np.uint64(31))).view(np.int64))


def init(setting: Setting) -> dict[str, Any]:
    """Allocate `x` [K, d] and `score` [K, n] fp16 in a safetensors file; K is at most CAP and the tokens to come."""
    rows = min(CAP, setting.tokens)
    shapes = {"x": (rows, setting.hidden), "score": (rows, setting.units)}
    header, offset = {}, 0
    for name, (height, width) in shapes.items():
        size = 2 * height * width
        header[name] = {"dtype": "F16", "shape": [height, width], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = setting.folder / file_name(setting.name)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    hashes = mix(torch.arange(setting.tokens), setting.seed)
    state: dict[str, Any] = {"filled": 0, "seed": setting.seed, "last": hashes.kthvalue(rows).values}
    for name, shape in shapes.items():
        start = 8 + len(text) + header[name]["data_offsets"][0]
        state[name] = np.memmap(path, dtype=np.float16, mode="r+", offset=start, shape=shape)
    return state


def update(state: dict[str, Any], x: Tensor, score: Tensor, positions: Tensor) -> None:
    """Keep the tokens of this batch that the hash picks; x [T, d], score [T, n], positions [T] count tokens over all windows."""
    kept = (mix(positions, state["seed"]) <= state["last"]).nonzero().flatten()
    at = slice(state["filled"], state["filled"] + len(kept))
    state["x"][at] = x[kept].clamp(-_FP16_MAX, _FP16_MAX).half().cpu().numpy()
    picked = score[kept]
    state["score"][at] = (picked / picked.amax(dim=1, keepdim=True).clamp_min(1e-30)).half().cpu().numpy()
    state["filled"] += len(kept)


def finish(state: dict[str, Any]) -> dict[str, Tensor]:
    """Write the mapped file out; nothing is left to store."""
    for name in ("x", "score"):
        state[name].flush()
    return {}

"""How near a value lies to where an integer kernel rounds it up or down.

Kernels compute the values that they round in float32, the emulation in float64. Within this margin the two may take neighbouring integers, which says
nothing about either; tokens that hold such a value are not compared.
"""

from __future__ import annotations

import numpy as np

from sparsegate.runtime_onnx.ops.quantisation import GROUP

MARGIN = 3e-5
"""In units of the step: 127 times the relative rounding errors of float32 sums."""
TAU_MARGIN = 1e-5
"""Of scores, relative to |tau| + rms of the scores."""


def off_boundary(values: np.ndarray) -> np.ndarray:
    """bool [T]: no value of [T, m, ...], rounded in groups of 32 along the second axis, lies within MARGIN of a boundary."""
    tokens, m = values.shape[:2]
    pad = -m % GROUP
    padded = np.concatenate([values, np.zeros((tokens, pad, *values.shape[2:]))], 1).reshape(tokens, -1, GROUP, *values.shape[2:])
    largest = np.abs(padded).max(2, keepdims=True)
    steps = np.divide(padded * 127.0, largest, out=np.zeros_like(padded), where=largest > 0)
    gap = np.abs(steps - np.floor(steps) - 0.5)
    return (gap > MARGIN).reshape(tokens, -1).all(1)


def off_threshold(scores: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """bool [T]: no score [T, n] lies within TAU_MARGIN of its threshold [n]; zero, of a ReLU, is exact and may."""
    scale = np.abs(tau) + np.sqrt((scores**2).mean())
    return ((np.abs(scores - tau) > TAU_MARGIN * scale) | ((scores == 0) & (tau >= 0))).all(1)


def between(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Thresholds [n] that about `kept` [n] of the values [T, n] exceed, all or none exactly: the middle of the widest gap within two ranks."""
    tokens, n = values.shape
    ranked = np.sort(values, axis=0)
    edges = np.concatenate([ranked[:1] - 1, ranked, ranked[-1:] + 1])
    columns = np.arange(n)
    best, width = tokens - kept, np.full(n, -1.0)
    for shift in (0, -1, 1, -2, 2):
        rank = tokens - kept + (shift if shift == 0 else np.where((kept > 0) & (kept < tokens), shift, 0))
        rank = np.where((rank < 1) | (rank > tokens - 1), tokens - kept, rank)
        gap = edges[rank + 1, columns] - edges[rank, columns]
        best, width = np.where(gap > width, rank, best), np.maximum(gap, width)
    return ((edges[best, columns] + edges[best + 1, columns]) / 2).astype(np.float32)

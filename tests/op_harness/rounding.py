"""Thresholds that lie off the scores."""

from __future__ import annotations

import numpy as np


def between(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Thresholds [n] that about `kept` [n] of the values [T, n] exceed, all or none exactly: the middle of the widest
    gap within two ranks.
    """
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

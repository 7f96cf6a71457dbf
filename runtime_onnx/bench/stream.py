"""Reads memory as fast as this process can: makes caches cold, and says how many GB/s a kernel could have had at that
moment.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

BYTES = 128 << 20
"""Larger than the last-level caches that a process of a few threads can fill."""

_READS: dict[str, tuple[str, Callable[[NDArray], object]]] = {  # dtype of the view, one pass over a part
    "or": ("int64", np.bitwise_or.reduce),
    "max": ("uint8", np.maximum.reduce),
    "sum": ("float32", np.add.reduce),
    "dot": ("float32", lambda part: np.dot(part, part)),
}
_QUIET = ("or", "max", "sum")
"""Ways whose threads sleep at once afterwards, which those of numpy's BLAS do not."""


class MemoryStream:
    """A buffer that is read with all threads, one contiguous part each."""

    def __init__(self, threads: int, size: int = BYTES) -> None:
        """`size` in bytes, at least one word of 8 per thread."""
        buffer = np.ones(size // 8 * 2, np.float32).view(
            np.int64
        )  # ones, so that no way of reading meets subnormal numbers
        self._size, self._pool = buffer.nbytes, ThreadPoolExecutor(threads)
        self._noted: dict[str, list[float]] = {kind: [] for kind in _QUIET}
        self._parts = {
            kind: [part.view(dtype) for part in np.array_split(buffer, threads)] for kind, (dtype, _) in _READS.items()
        }

    def evict(self) -> None:
        """One pass, after which the caches hold this buffer and nothing else; its speed is noted, the ways take turns.
        The threads do not spin afterwards.
        """
        kind = _QUIET[sum(map(len, self._noted.values())) % len(_QUIET)]
        start = time.perf_counter()
        self._read(kind)
        self._noted[kind].append(time.perf_counter() - start)

    def noted(self) -> dict[str, float]:
        """GB/s of the passes of `evict` since the last call, by way of reading: the median of each."""
        speeds = {
            kind: self._size / statistics.median(seconds) / 1e9 for kind, seconds in self._noted.items() if seconds
        }
        self._noted = {kind: [] for kind in _QUIET}
        return speeds

    def bandwidth(self, passes: int = 5) -> dict[str, float]:
        """GB/s by way of reading, each the median of `passes` taken in turns; a kernel is to be judged by the highest
        (`best`).
        """
        seconds: dict[str, list[float]] = {kind: [] for kind in _READS}
        for _ in range(passes):
            for kind, samples in seconds.items():
                start = time.perf_counter()
                self._read(kind)
                samples.append(time.perf_counter() - start)
        time.sleep(0.2)  # the threads of numpy's BLAS spin for a while after a dot
        return {kind: self._size / statistics.median(samples) / 1e9 for kind, samples in seconds.items()}

    def _read(self, kind: str) -> None:
        list(self._pool.map(_READS[kind][1], self._parts[kind]))


def best(*measured: dict[str, float]) -> float:
    """The fastest way's GB/s: the mean over the measurements, so that one lucky moment does not count for all."""
    return max(sum(speeds[kind] for speeds in measured) / len(measured) for kind in measured[0])

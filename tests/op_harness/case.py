"""What a kernel is run on, and choices of cases in which every pair of values occurs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ISAS = ("avx512vnni", "avx512", "avx2", "portable")
TOKENS = (1, 2, 3, 4, 5, 6, 7, 12, 64, 130)
KEEP: tuple[float | str, ...] = (0.0, "one", 0.2, 0.5, 1.0)
STORED = ("float32", "float16", "bfloat16", "int8_row", "int4_g32")
"""How weights are stored: a dtype of float weights, or an integer format."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One run of one kernel.

    Attributes:
        variant: The op's Variant.
        sizes: Of the tensors: (d, n, r) of gated_mlp, (d_in, d_out) of sparse_linear.
        tokens: Tokens in one call.
        keep: Share of the (token, unit) pairs that are kept, or "one" unit.
        isa: One of ISAS.
        seed: Of all random numbers.
    """

    variant: Any
    sizes: tuple[int, ...]
    tokens: int
    keep: float | str
    isa: str
    seed: int = 0

    @property
    def name(self) -> str:
        """One line without spaces."""
        return f"{self.variant.name}:{'x'.join(map(str, self.sizes))}:tokens={self.tokens}:keep={self.keep}:{self.isa}"


def formats(stored: str) -> tuple[str, str]:
    """Weight format and dtype of float weights that STORED's value means."""
    return ("float", stored) if stored in STORED[:3] else (stored, "float32")


def pairwise(
    axes: Mapping[str, Sequence[Any]], valid: Callable[[Row], bool], seed: int = 0, tries: int = 30
) -> list[Row]:
    """Rows with one value per axis such that every pair of values of two axes that some valid row holds occurs in one;
    the same rows in every call.
    """
    rng = random.Random(seed)
    names = list(axes)

    def draw(fixed: Row) -> Row | None:
        for _ in range(400):
            row = {name: fixed.get(name, rng.choice(axes[name])) for name in names}
            if valid(row):
                return row
        return None

    def pairs(row: Row) -> set[tuple]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)}

    missing = [(a, u, b, v) for a, b in itertools.combinations(names, 2) for u in axes[a] for v in axes[b]]
    rng.shuffle(missing)
    open_pairs, rows = set(missing), []
    for pair in missing:
        if pair not in open_pairs:
            continue
        a, u, b, v = pair
        candidates = [row for row in (draw({a: u, b: v}) for _ in range(tries)) if row]
        if not candidates:
            open_pairs.discard(pair)
            continue
        best = max(candidates, key=lambda row: len(pairs(row) & open_pairs))
        open_pairs -= pairs(best)
        rows.append(best)
    return rows

"""How the kept bytes are shared among the layers and matrices of a family of plans.

- `uniform`: every key keeps the same share.
- `greedy`: from what each key costs alone (`sensitivities`), as far as divergences add up.
- `evolution`: from there bytes are moved between pairs of blocks, then between the matrices inside blocks; what lowers
  the measured divergence of the whole model stays.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from ..progress import track
from .families import Densities, Family

SOURCE = (
    "TEAL, arXiv 2408.14690, section 4.3, for greedy shares; WiSparse, arXiv 2602.14452, for budgets of blocks by "
    "evolution and the split inside a block",
    "min over densities of KL(dense || sparse) at a mean of the kept bytes",
    "one hull over the keys of all blocks in place of steps inside each; mutations move bytes between pairs: the mean "
    "always holds",
)
GRID = (0.9, 0.75, 0.6, 0.45, 0.3, 0.2, 0.1)
"""Densities at which every key is tried alone."""
Curves = Mapping[str, Sequence[float]]
"""Divergence (nats a token) at every density of GRID, by key."""
EVALUATIONS = 60
"""Whole-model measurements of an evolution."""
_PAIRS = 3  # that a mutation moves bytes between
_FIRST, _LAST = 0.1, 0.02  # of the density, that the first and the last mutation move


def allocate(curves: Curves, weights: Mapping[str, float], mean: float) -> dict[str, float]:
    """Densities by key with the given mean, weighted by the bytes that each key's density governs: every key goes down
    the convex hull of its curve over GRID as long as a byte saved there costs less divergence than elsewhere.

    The sum of the keys' divergences is the least for that mean, as far as divergences add up.
    """
    steps = sorted(
        (rate / weights[key], order, high - low, key)
        for key, values in curves.items()
        for order, (high, low, rate) in enumerate(_hull(values))
    )
    densities, left = dict.fromkeys(curves, 1.0), (1.0 - mean) * sum(weights[key] for key in curves)
    for _, _, width, key in steps:
        taken = min(width, left / weights[key])
        densities[key] = max(0.0, densities[key] - taken)
        left -= taken * weights[key]
        if left <= 0:
            break
    return densities


def _hull(values: Sequence[float]) -> list[tuple[float, float, float]]:
    """The lower convex hull of (density, divergence) from (1, 0) down to (0, beyond the last): (from, to, nats per unit
    of density), rates rising.
    """
    beyond = values[-1] + GRID[-1] * 4 * max(values[-1] - values[-2], 1e-9) / (GRID[-2] - GRID[-1])
    points = [(1.0, 0.0), *zip(GRID, values, strict=True), (0.0, beyond)]
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and _rate(hull[-2], hull[-1]) >= _rate(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(a[0], b[0], _rate(a, b)) for a, b in zip(hull, hull[1:], strict=False)]


def _rate(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (a[0] - b[0])


def evolve(
    family: Family, start: Densities, loss: Callable[[Densities], float], seed: int, evaluations: int = EVALUATIONS
) -> dict[str, float]:
    """Densities of the same mean as `start` whose `loss`, measured `evaluations` times, is the least that was met.

    A mutation moves bytes between random pairs of blocks; in the last third of the measurements, where blocks have
    several keys, between two keys of a block. The moves become smaller. The same seed gives the same densities.
    """
    rng = random.Random(seed)
    blocks: dict[int, list[str]] = {}
    for key, site in family.sites.items():
        blocks.setdefault(site.layer, []).append(key)
    best, least = dict(start), loss(start)
    splits = evaluations // 3 if any(len(keys) > 1 for keys in blocks.values()) else 0
    for number in track(range(evaluations - 1), unit="mutation"):
        size = _FIRST + (_LAST - _FIRST) * number / max(1, evaluations - 2)
        pairs = _split_pairs if number >= evaluations - 1 - splits else _block_pairs
        child = dict(best)
        for gains, loses in pairs(rng, list(blocks.values())):
            _move(child, family.weights, gains, loses, size)
        measured = loss(child)
        if measured < least:
            best, least = child, measured
    return best


Pair = tuple[list[str], list[str]]
"""Keys that gain bytes and keys that lose them."""


def _block_pairs(rng: random.Random, blocks: Sequence[list[str]]) -> list[Pair]:
    chosen = rng.sample(range(len(blocks)), min(2 * _PAIRS, len(blocks) // 2 * 2))
    return [(blocks[a], blocks[b]) for a, b in zip(chosen[::2], chosen[1::2], strict=True)]


def _split_pairs(rng: random.Random, blocks: Sequence[list[str]]) -> list[Pair]:
    several = [keys for keys in blocks if len(keys) > 1]
    chosen = rng.sample(several, min(_PAIRS, len(several)))
    return [([a], [b]) for a, b in (rng.sample(keys, 2) for keys in chosen)]


def _move(
    densities: dict[str, float], weights: Mapping[str, float], gains: list[str], loses: list[str], size: float
) -> None:
    """Move what a change of `size` in the density of the smaller side touches, as far as there is room. The keys of a
    side share it by the room that each has, to 1 or to 0.
    """
    room = sum(weights[key] * (1.0 - densities[key]) for key in gains)
    stock = sum(weights[key] * densities[key] for key in loses)
    wanted = size * min(sum(weights[key] for key in side) for side in (gains, loses))
    moved = min(wanted, room, stock)
    if moved <= 0:
        return
    for key in gains:
        densities[key] = min(1.0, densities[key] + moved / room * (1.0 - densities[key]))
    for key in loses:
        densities[key] = max(0.0, densities[key] - moved / stock * densities[key])

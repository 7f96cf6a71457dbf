"""Statistics of random scores, as the calibration pass would store them, for tests of methods."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparsegate.converter.arch import load_arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.stats import StatSetup, histogram, unit_histogram

D, N, TOKENS = 16, 48, 3000
LLAMA, PHI = load_arch("llama"), load_arch("phi")
SHAPES = {
    "q_proj": (16, 16),
    "k_proj": (4, 16),
    "v_proj": (4, 16),
    "o_proj": (16, 16),
    "gate_proj": (48, 16),
    "up_proj": (48, 16),
    "down_proj": (16, 48),
}


def gate_stats(*scores: Tensor) -> dict[Site, dict[str, Tensor]]:
    found = {}
    for layer, score in enumerate(scores):
        state = histogram.init(StatSetup(D, score.shape[1], len(score), 0, Path(), "histogram:gate"))
        histogram.update(state, torch.empty(0), score, torch.arange(len(score)))
        found[Site(layer)] = {f"histogram:gate.{name}": t for name, t in histogram.finish(state).items()}
    return found


def chess_stats(gates: list[Tensor], ups: list[Tensor]) -> dict[Site, dict[str, Tensor]]:
    found = {}
    for layer, (score, up) in enumerate(zip(gates, ups, strict=True)):
        state = unit_histogram.init(StatSetup(D, N, len(score), 0, Path(), "unit_histogram:gate"))
        state["fields"] = {"up": up}
        unit_histogram.update(state, torch.empty(0), score, torch.arange(len(score)))
        found[Site(layer)] = {f"unit_histogram:gate.{name}": t for name, t in unit_histogram.finish(state).items()}
    return found


def linear_stats(
    score: str, layers: int = 2, seed: int = 0
) -> tuple[dict[Site, dict[str, Tensor]], dict[Site, Tensor]]:
    """(Statistics with a straight greedy path that spares down_proj, |x| of every site)."""
    g, stats, inputs = torch.Generator().manual_seed(seed), {}, {}
    for layer in range(layers):
        for name, (outputs, width) in SHAPES.items():
            site = Site(layer, kind=f"linear:{name}")
            inputs[site] = (torch.randn(TOKENS, width, generator=g) * (1 + layer)).abs()
            scale = torch.rand(width, generator=g) + 0.1 if score == "wina" else torch.ones(width)
            state = histogram.init(StatSetup(width, width, TOKENS, 0, Path(), f"histogram:{score}", outputs))
            histogram.update(state, torch.empty(0), inputs[site] * scale, torch.arange(TOKENS))
            path = torch.linspace(0, 0.9, 10) * (0.5 if name == "down_proj" else 1.0)
            stats[site] = {f"histogram:{score}.{key}": t for key, t in histogram.finish(state).items()} | {
                f"scale:{score}.scale": scale,
                f"greedy:{score}.path": path,
            }
    return stats, inputs

"""Analysis: what a score and a selector would cost in quality, oracles included. Torch and reports only; nothing here
makes a checkpoint.
"""

from __future__ import annotations

from .answers import sparse_answers
from .executor import analyse, analyse_all
from .ranks import mean_spearman, rank_correlations, ranks, spearman
from .setting import LABELS, POSITIONS, SELECTORS, Outcome, Setting

__all__ = [
    "LABELS",
    "POSITIONS",
    "SELECTORS",
    "Outcome",
    "Setting",
    "analyse",
    "analyse_all",
    "mean_spearman",
    "rank_correlations",
    "ranks",
    "sparse_answers",
    "spearman",
]

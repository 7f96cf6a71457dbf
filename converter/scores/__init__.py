"""Neuron scores: how much a unit matters for a token. One file per score, one row per file.

A score module exports SOURCE (paper, equation, deviations), NEEDS (fields of Context), PHASE and `score(context) -> [T, n]`. PHASE says when the score is
known, hence which weights an executor may skip: pre (from x alone), mid (after the gate), post (after everything), oracle (sees a label or the future).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor

from ..artifact import InputError

SCORES = {
    "gate": ".gate",
    "magnitude": ".magnitude",
}


@dataclass(frozen=True)
class Context:
    """What a score may look at, for T tokens of one site; a field is None unless the score's NEEDS names it.

    x [T, d]; gate = act(gate x), up, z [T, n]; w_gate, w_up, w_down [n, d]; grad [T, n] of the loss by z; label [T]. For a plain network gate = act(up x).
    """

    x: Tensor | None = None
    gate: Tensor | None = None
    up: Tensor | None = None
    z: Tensor | None = None
    w_gate: Tensor | None = None
    w_up: Tensor | None = None
    w_down: Tensor | None = None
    grad: Tensor | None = None
    label: Tensor | None = None


def load_score(name: str) -> Any:
    """The module of a score. Raises InputError for an unknown name."""
    if name not in SCORES:
        raise InputError(f"score must be one of {', '.join(SCORES)}, got {name!r}. Choose one of these.")
    return import_module(SCORES[name], __name__)

"""Scores: how much a unit matters for a token. One file per score, one row per file.

A score module exports SOURCE (paper, equation, deviations), NEEDS (fields of Context), PHASE and `score(context) -> [T,
n]`. PHASE says when the score is known, hence which weights an executor may skip: pre (from x alone), mid (after the
gate), post (after everything), in (at the input of one linear), prompt (after the prompt, then fixed), oracle (sees a
label or the future; its NEEDS name `label`). KIND "linear" scores the input channels of a linear instead of neurons. A
module that also scores attention heads exports HEAD_NEEDS and `score_heads(context) -> [T, H]`. Larger always means
keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor

from ...runtime_onnx.errors import InputError

SCORES = {
    "gate": ".gate",
    "chess": ".chess",
    "magnitude": ".magnitude",
    "abs_z": ".abs_z",
    "signs": ".signs",
    "griffin": ".griffin",
    "input": ".input",
    "wina": ".wina",
    "gradient": ".gradient",
    "gxo": ".gxo",
    "snip": ".snip",
    "fisher": ".fisher",
    "integrated_gradients": ".integrated_gradients",
    "corrected_gxo": ".corrected_gxo",
}
"""CETT's criterion (norm of a neuron's contribution) is `magnitude`."""

TITLES = {
    "abs_z": "magnitude |x|",
    "magnitude": "magnitude |x| |w_down|",
    "gxo": "GxO",
    "snip": "SNIP",
    "corrected_gxo": "Corrected GxO",
    "chess": "CHESS",
}
"""What papers call a score, where it is not its name here."""


@dataclass(frozen=True)
class Context:
    """What a score may look at, for T tokens of one site; a field is None unless the score's NEEDS (or HEAD_NEEDS)
    names it.

    Neurons: x [T, d]; gate = act(gate x), up, z [T, n]; w_gate, w_up, w_down [n, d]; up_moment [n] = E[up^2]; prompt
    [n], the statistic of the prompt's tokens. A plain network has gate = act(up x), and w_gate = w_up. Linears: x [T,
    d_in] is the linear's own input, w [d_out, d_in] its weight. Heads: o [T, H, d_h], before the output projection.
    Gradients of the loss -log p(label): grad [T, n] by z, o_grad [T, H, d_h] by o; grad_path [K, T, n] by z and
    o_grad_path [K, T, H, d_h] by o, both with z or o scaled by k/K, k = 1..K; label [T].
    """

    x: Tensor | None = None
    gate: Tensor | None = None
    up: Tensor | None = None
    z: Tensor | None = None
    w_gate: Tensor | None = None
    w_up: Tensor | None = None
    w_down: Tensor | None = None
    w: Tensor | None = None
    up_moment: Tensor | None = None
    prompt: Tensor | None = None
    o: Tensor | None = None
    grad: Tensor | None = None
    grad_path: Tensor | None = None
    o_grad: Tensor | None = None
    o_grad_path: Tensor | None = None
    label: Tensor | None = None


def load_score(name: str) -> Any:
    """The module of a score. Raises InputError for an unknown name."""
    if name not in SCORES:
        raise InputError(f"score must be one of {', '.join(SCORES)}, got {name!r}. Choose one of these.")
    return import_module(SCORES[name], __name__)


def score_title(name: str) -> str:
    """A score for people; one that no executor can know says so by its phase. Raises InputError for an unknown name."""
    phase, title = load_score(name).PHASE, TITLES.get(name, name.replace("_", " "))
    return f"{title} ({phase})" if phase in ("oracle", "post") else title

"""Words of the ops' variants that help and checks of recipes need, too: no numpy, so that help stays quick."""

from __future__ import annotations

from collections.abc import Iterable

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "drelu", "identity")
"""Without a parameter."""
PARAMETRIC = ("fatrelu", "shifted_relu")
"""With one: fatrelu(b) is v where v > b, else 0 (ProSparse, arXiv 2402.13516); shifted_relu(b) is relu(v - b) ("ReLU
strikes back", arXiv 2310.04564).
"""
RELUS = ("relu", "relu2", "drelu", *PARAMETRIC)
"""Kinds that give exact zeros, so that whatever multiplies one need not be computed."""

WEIGHTS = ("float", "int8_row", "int4_g32")
"""Formats of weights; `quantisation` describes the integer ones."""
GROUP = 32
"""Values per scale: columns of int4_g32, and of activations."""


def forms(kinds: Iterable[str], parameter: str = "b") -> list[str]:
    """How messages and help spell kinds: those with a parameter as in fatrelu(b)."""
    return [f"{kind}({parameter})" if kind in PARAMETRIC else kind for kind in kinds]

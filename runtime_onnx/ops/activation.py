"""Activations that GatedMLP names, and how they are spelled: a kind, or a kind with one float32 parameter as in
fatrelu(0.01).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .vocabulary import ACTIVATIONS, PARAMETRIC, RELUS, forms

_MOST = 1e6
_SPELLING = re.compile(r"([a-z0-9_]+)\((-?[0-9]+\.[0-9]+)\)")


def split_activation(text: str) -> tuple[str, float]:
    """The kind and the parameter that `text` spells: "fatrelu(0.01)" is ("fatrelu", 0.01), "relu" is ("relu", 0.0).

    The parameter means the nearest float32. One value has one spelling (`spell_activation`), so that equal variants
    have equal names.

    Raises:
        InputError: Another kind, a parameter that is missing, superfluous, no number, out of range or spelled in
        another way.
    """
    if text in ACTIVATIONS:
        return text, 0.0
    match = _SPELLING.fullmatch(text)
    if match is None or match[1] not in PARAMETRIC:
        names = ", ".join(forms([*ACTIVATIONS, *PARAMETRIC]))
        raise InputError(
            f"activation must be one of {names} with b in decimals such as 0.01, got {text}. Choose one of them."
        )
    right = spell_activation(match[1], float(match[2]))
    if text != right:
        raise InputError(f"activation must be spelled {right}, got {text}. One value has one spelling.")
    return match[1], float(match[2])


def spell_activation(kind: str, parameter: float = 0.0) -> str:
    """The one text of an activation: the parameter in the fewest decimals, at least one, that give its float32. Raises
    InputError as `split_activation`.
    """
    if kind not in PARAMETRIC:
        return split_activation(kind)[0]
    value = np.float32(parameter) + np.float32(0)  # no negative zero
    low = 0.0 if kind == "fatrelu" else -_MOST
    if not low <= value <= _MOST:
        raise InputError(
            f"activation's parameter must lie in {low:g} to {_MOST:g} for {kind}, got {parameter:g}. Choose another."
        )
    decimals = next(count for count in range(1, 200) if np.float32(float(f"{value:.{count}f}")) == value)
    return f"{kind}({value:.{decimals}f})"


def jump(text: str) -> float | None:
    """Where the activation jumps, as fatrelu does at its parameter, from 0 to it; None where it is continuous."""
    kind, parameter = split_activation(text)
    return parameter if kind == "fatrelu" else None


def is_relu(text: str) -> bool:
    """Whether the activation gives exact zeros."""
    return split_activation(text)[0] in RELUS


def cuts_up(text: str) -> bool:
    """Whether up is cut at zero as the gate is: dReLU is relu(gate) * relu(up). A plain network, which has no gate,
    cannot compute it.
    """
    return text == "drelu"


# float64


def relu(v: NDArray) -> NDArray:
    """max(v, 0), NaN kept."""
    return np.maximum(v, 0.0)


def _silu(v: NDArray) -> NDArray:
    e = np.exp(-np.abs(v))
    return v * np.where(v >= 0, 1.0, e) / (1.0 + e)


_erf = np.vectorize(math.erf, otypes=[np.float64])

_ACTIVATE: dict[str, Callable[[NDArray, float], NDArray]] = {
    "silu": lambda v, _: _silu(v),
    "gelu": lambda v, _: 0.5 * v * (1.0 + _erf(v / math.sqrt(2.0))),
    "gelu_tanh": lambda v, _: 0.5 * v * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (v + 0.044715 * v**3))),
    "relu": lambda v, _: relu(v),
    "relu2": lambda v, _: relu(v) ** 2,
    "drelu": lambda v, _: relu(v),
    "identity": lambda v, _: v,
    "fatrelu": lambda v, b: np.where(v <= b, 0.0, v),
    "shifted_relu": lambda v, b: relu(v - b),
}


def activate(text: str, v: NDArray) -> NDArray:
    """The activation of v in float64; dReLU's is the gate's, relu. NaN stays NaN."""
    kind, parameter = split_activation(text)
    return _ACTIVATE[kind](v, float(np.float32(parameter)))

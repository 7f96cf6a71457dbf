"""Op ai.sparsegate:GatedMLP, version 1: an MLP that computes only the neurons which a score keeps.

For every token row x [d] of x [..., d], with weights [n, d] (one row per neuron, also for w_down):

    s = score(x) in R^n,   keep = {i : s_i > tau_i}
    y = sum_{i in keep} act(w_gate_i . x + b_gate_i) * (w_up_i . x + b_up_i) * w_down_i  +  b_down  +  res^T relu(P1 x)

A plain MLP has no w_gate: act(w_up_i . x + b_up_i) * w_down_i. Scores:

predictor  s = P2 relu(P1 x), P1 [r, d], P2 [n, r]
    gate       s = |act(gate)|, or |act(up)| of a plain MLP: that product is computed in full, the others are skipped
    exact      ReLU activations: keeps what is not zero, so nothing is lost and no tau is needed; the gate is computed
    in full, up where act(gate) is not 0
    all        keeps everything, no tau

A NaN score is not kept; score exact keeps NaN. Activation dReLU is relu(gate) * relu(up); the others are described in
`activation`. A neuron whose act(gate) is exactly 0 adds nothing, whatever its up is. Nothing here needs more than numpy
and onnx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from ..errors import InputError
from .activation import activate, cuts_up, is_relu, relu, spell_activation, split_activation
from .gated_mlp_body import body
from .quantisation import dequantise, integer_product, integer_sum
from .vocabulary import ACTIVATIONS, GROUP, PARAMETRIC, RELUS, WEIGHTS

__all__ = [
    "ACTIVATIONS",
    "BOUNDS",
    "DOMAIN",
    "FLOATS",
    "NAME",
    "PARAMETRIC",
    "RELUS",
    "ROLES",
    "SCORES",
    "VERSION",
    "WEIGHTS",
    "Variant",
    "active",
    "before_activation",
    "emulate",
    "function",
    "hidden",
    "is_relu",
    "opened",
    "parts",
    "product",
    "reference",
    "scores",
    "spell_activation",
    "split_activation",
    "traffic",
]

DOMAIN = "ai.sparsegate"
NAME = "GatedMLP"
VERSION = 1

ROLES = (
    "w_gate",
    "w_up",
    "w_down",
    "s_gate",
    "s_up",
    "s_down",
    "b_gate",
    "b_up",
    "b_down",
    "tau",
    "p1",
    "p2",
    "s_p1",
    "s_p2",
    "res",
)
"""Inputs after x, in this order: [n, d] weights (int4_g32: [n, d / 2]), [n] scales (int4_g32: [n, d / 32]) and biases
(b_down [d]), tau [n], p1 [r, d], p2 [n, r], s_p1 [r], s_p2 [n], res [r, d].
"""
SCORES = ("predictor", "gate", "exact", "all")
FLOATS = ("float32", "float16", "bfloat16")

BOUNDS = {"float32": 1e-12, "float16": 1.5e-7, "bfloat16": 1e-5, "int8_row": 1e-10, "int4_g32": 1e-10}
"""Largest NMSE of a kernel: float weights, by dtype of x, against `reference` on the same rounded inputs; quantised
weights and x float32 against `emulate`.
"""

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Variant:
    """One combination of activation, score, weight format, inputs and dtypes; a kernel either supports a variant or it
    does not.

    Attributes:
        activation: One of ACTIVATIONS, or of PARAMETRIC with its parameter as `split_activation` reads it.
        score: One of SCORES.
        weights: One of WEIGHTS; the integer formats, with scales in s_gate, s_up, s_down, are described in
        `quantisation`.
        inputs: Roles that are present, in the order of ROLES; x is not among them.
        x: dtype of x and y.
        w: dtype of float weights; float32 for integer weights.
        p: dtype of p1, p2 and res; int8 takes scales s_p1, s_p2 and no res. float32 without p1.

    Biases, tau and the scales of rows are float32 always, the scales of groups float16.

    Raises:
        InputError: The combination has no meaning or is not part of the vocabulary.
    """

    activation: str
    score: str
    weights: str
    inputs: tuple[str, ...]
    x: str = "float32"
    w: str = "float32"
    p: str = "float32"

    def __post_init__(self) -> None:
        split_activation(self.activation)
        _one_of("score", self.score, SCORES)
        _one_of("weights", self.weights, WEIGHTS)
        _one_of("x", self.x, FLOATS)
        _one_of("w", self.w, FLOATS)
        _one_of("p", self.p, (*FLOATS, "int8"))
        if tuple(r for r in ROLES if r in self.inputs) != self.inputs:
            raise InputError(
                f"inputs must be roles in the order {' '.join(ROLES)}, each once, got {' '.join(self.inputs)}. Sort "
                "them by ROLES."
            )
        wrong = " ".join(r for r in ROLES if self._allows(r) is not None and self._allows(r) != (r in self.inputs))
        if wrong:
            raise InputError(
                f"inputs of {self.activation}/{self.score}/{self.weights} must hold what these need and nothing else, "
                f"got {' '.join(self.inputs)}."
                f" Add or remove {wrong}."
            )
        if self.weights != "float" and self.w != "float32":
            raise InputError(
                f"w must be float32 with weights {self.weights}, got {self.w}. It is the dtype of float weights only."
            )
        if "p1" not in self.inputs and self.p != "float32":
            raise InputError(f"p must be float32 without p1, got {self.p}. It is the dtype of the predictor only.")
        if cuts_up(self.activation) and self.plain:
            raise InputError("activation must not be drelu without w_gate: it is relu(gate) * relu(up). Use relu.")
        if self.exact and not is_relu(self.activation):
            raise InputError(
                f"activation must be one of {', '.join(RELUS)} with score exact, got {self.activation}. Use score gate."
            )

    def _allows(self, role: str) -> bool | None:
        """True: the role must be there, False: it must not, None: both are right."""
        quantised = self.weights != "float"
        rules: dict[str, bool | None] = {
            "w_gate": None,
            "w_up": True,
            "w_down": True,
            "s_gate": quantised and not self.plain,
            "s_up": quantised,
            "s_down": quantised,
            "b_gate": False if self.plain else None,
            "tau": self.score in ("predictor", "gate"),
            "p1": self.score == "predictor" or "res" in self.inputs,
            "p2": self.score == "predictor",
            "s_p1": self.p == "int8",
            "s_p2": self.p == "int8" and "p2" in self.inputs,
            "res": False if self.p == "int8" else None,
        }
        return rules.get(role)

    @property
    def exact(self) -> bool:
        """Whether what is not zero is kept, and nothing is compared."""
        return self.score == "exact"

    @property
    def plain(self) -> bool:
        """True for a two-matrix MLP (no w_gate)."""
        return "w_gate" not in self.inputs

    @property
    def name(self) -> str:
        """Closed spelling, e.g. GatedMLP.1/silu/gate/float/x=float32,w=float32,p=float32/w_gate+w_up+w_down+tau;
        `parse` inverts it.
        """
        dtypes = f"x={self.x},w={self.w},p={self.p}"
        return "/".join((f"{NAME}.{VERSION}", self.activation, self.score, self.weights, dtypes, "+".join(self.inputs)))

    @staticmethod
    def parse(name: str) -> Variant:
        """Returns the variant that `name` spells; InputError if it is spelled in any other way."""
        parts = name.split("/")
        dtypes = parts[4].split(",") if len(parts) == 6 else []
        if len(dtypes) == 3 and parts[0] == f"{NAME}.{VERSION}":
            x, w, p = (text.partition("=")[2] for text in dtypes)
            variant = Variant(parts[1], parts[2], parts[3], tuple(parts[5].split("+")), x, w, p)
            if variant.name == name:
                return variant
        grammar = f"{NAME}.{VERSION}/<activation>/<score>/<weights>/x=<dtype>,w=<dtype>,p=<dtype>/<roles>"
        raise InputError(f"variant must be {grammar}, got {name}. Update sparsegate.")

    def attributes(self) -> dict[str, str]:
        """String attributes of the node."""
        return {
            "inputs": " ".join(self.inputs),
            "activation": self.activation,
            "score": self.score,
            "weights": self.weights,
        }


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{what} must be one of {', '.join(allowed)}, got {value}. Choose one of them.")


def function(variant: Variant, overload: str = "", opset: int = 21) -> onnx.FunctionProto:
    """Returns the model-local function of the op's own domain and name: its body in standard ops, formal inputs x and
    the variant's roles, output y.

    A file with one variant leaves the overload empty; opset is the version of the standard ops, at least 20.
    """
    return body(variant, DOMAIN, NAME, overload, opset)


# float64 reference


def _rows(x: NDArray) -> NDArray:
    return np.asarray(x).astype(np.float64).reshape(-1, np.shape(x)[-1])


def _tensor(tensors: Mapping[str, NDArray], role: str) -> NDArray:
    return np.asarray(tensors[role]).astype(np.float64)


_SCALES = {"w_gate": "s_gate", "w_up": "s_up", "w_down": "s_down", "p1": "s_p1", "p2": "s_p2"}


def _format(variant: Variant, role: str) -> str:
    """Format of a matrix of the variant."""
    return variant.weights if role[0] == "w" else "int8_row" if variant.p == "int8" else "float"


def _matrix(variant: Variant, tensors: Mapping[str, NDArray], role: str) -> NDArray[np.float64]:
    """A matrix in float64, dequantised."""
    stored = _format(variant, role)
    return _tensor(tensors, role) if stored == "float" else dequantise(tensors[role], tensors[_SCALES[role]], stored)


def _product(
    variant: Variant, x: NDArray, tensors: Mapping[str, NDArray], role: str, bias: str, integer: bool
) -> NDArray:
    """Rows [T, d] times the transpose of a matrix [n, d], plus a bias [n] where it exists -> [T, n]."""
    stored = _format(variant, role)
    if integer and stored != "float":
        out = integer_product(x, tensors[role], tensors[_SCALES[role]], stored)
    else:
        out = x @ _matrix(variant, tensors, role).T
    return out + _tensor(tensors, bias) if bias in tensors else out


def _hidden(variant: Variant, x: NDArray, tensors: Mapping[str, NDArray], integer: bool) -> NDArray:
    return relu(_product(variant, x, tensors, "p1", "", integer))


def _activated(
    variant: Variant, x: NDArray, tensors: Mapping[str, NDArray], integer: bool = False
) -> tuple[NDArray, NDArray]:
    """Rows x [T, d] -> (act of the gate, or of up in a plain MLP; what w_down is multiplied by), both [T, n]."""
    up = _product(variant, x, tensors, "w_up", "b_up", integer)
    if variant.plain:
        z = activate(variant.activation, up)
        return z, z
    gate = activate(variant.activation, _product(variant, x, tensors, "w_gate", "b_gate", integer))
    z = gate * (relu(up) if cuts_up(variant.activation) else up)
    return gate, np.where(gate == 0, 0.0, z) if is_relu(variant.activation) else z


def _present(variant: Variant, tensors: Mapping[str, NDArray]) -> Mapping[str, NDArray]:
    missing = [role for role in variant.inputs if role not in tensors]
    if missing:
        raise InputError(
            f"tensors must hold {' '.join(variant.inputs)}, got {' '.join(tensors)}. Add {' '.join(missing)}."
        )
    return {role: tensors[role] for role in variant.inputs}


def scores(variant: Variant, x: NDArray, tensors: Mapping[str, NDArray], integer: bool = False) -> NDArray[np.float64]:
    """Scores [T, n] in float64 of x [..., d]; infinite for score all, |z| (what would be lost) for score exact.
    `integer` as in `reference`.
    """
    tensors = _present(variant, tensors)
    rows = _rows(x)
    if variant.score == "predictor":
        return _product(variant, _hidden(variant, rows, tensors, integer), tensors, "p2", "", integer)
    if variant.score == "all":
        return np.full((rows.shape[0], tensors["w_up"].shape[0]), np.inf)
    if variant.score == "gate":
        return np.abs(activate(variant.activation, before_activation(variant, x, tensors, integer)))
    return np.abs(_activated(variant, rows, tensors, integer)[1])


def active(variant: Variant, x: NDArray, tensors: Mapping[str, NDArray], integer: bool = False) -> NDArray[np.bool_]:
    """Kept neurons bool [T, n] of x [..., d]: score > tau, or z not zero (NaN neither) for score exact. `integer` as in
    `reference`.
    """
    s = scores(variant, x, tensors, integer)
    return s > _tensor(tensors, "tau") if "tau" in variant.inputs else s != 0


def parts(
    variant: Variant, x: NDArray, tensors: Mapping[str, NDArray], integer: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(act(gate), or act(up) of a plain MLP; z, what w_down is multiplied by where it is kept), [T, n] each, of x [...,
    d]. `integer` as in `reference`.
    """
    return _activated(variant, _rows(x), _present(variant, tensors), integer)


def product(variant: Variant, x: NDArray, tensors: Mapping[str, NDArray], role: str) -> NDArray[np.float64]:
    """Products [T, rows] of x [..., d] with the rows of a matrix that reads x (w_gate, w_up, p1), without a bias."""
    return _product(variant, _rows(x), tensors, role, "", False)


def hidden(variant: Variant, x: NDArray, tensors: Mapping[str, NDArray], integer: bool = False) -> NDArray[np.float64]:
    """relu(P1 x) [T, r] of x [..., d], of a variant with p1. `integer` as in `reference`."""
    return _hidden(variant, _rows(x), _present(variant, tensors), integer)


def before_activation(
    variant: Variant, x: NDArray, tensors: Mapping[str, NDArray], integer: bool = False
) -> NDArray[np.float64]:
    """What the activation is applied to [T, n], of x [..., d]: the gate's product, or up's of a plain MLP. `integer` as
    in `reference`.
    """
    part = "up" if variant.plain else "gate"
    return _product(variant, _rows(x), _present(variant, tensors), f"w_{part}", f"b_{part}", integer)


def opened(variant: Variant, x: NDArray, tensors: Mapping[str, NDArray], integer: bool = False) -> NDArray[np.bool_]:
    """Neurons bool [T, n] whose act(gate), or act(up) of a plain MLP, is not zero: where score exact needs up.
    `integer` as in `reference`.
    """
    return parts(variant, x, tensors, integer)[0] != 0


def reference(
    variant: Variant, x: NDArray, tensors: Mapping[str, NDArray], integer: bool = False
) -> NDArray[np.float64]:
    """The op in float64 on the inputs as they are stored, so as the executors see them.

    Args:
        variant: Which variant.
        x: [..., d], any float dtype.
        tensors: One array per role of the variant, in the stored dtype (int8 weights as int8).
        integer: Round activations to int8 wherever they meet integer weights, as the CPU kernels do; see
        `quantisation`.

    Returns:
        y [..., d].
    """
    tensors = _present(variant, tensors)
    rows = _rows(x)
    gate, z = _activated(variant, rows, tensors, integer)
    keep = np.abs(gate) > _tensor(tensors, "tau") if variant.score == "gate" else active(variant, x, tensors, integer)
    if is_relu(variant.activation):
        keep &= z != 0  # NaN stays
    if integer and variant.weights != "float":
        y = integer_sum(z, keep, tensors["w_down"], tensors["s_down"], variant.weights)
    else:
        y = np.where(keep, z, 0.0) @ _matrix(variant, tensors, "w_down")
    if "b_down" in tensors:
        y = y + _tensor(tensors, "b_down")
    if "res" in tensors:
        y = y + _hidden(variant, rows, tensors, integer) @ _tensor(tensors, "res")
    return y.reshape(np.shape(x))


def emulate(
    variant: Variant, x: NDArray, tensors: Mapping[str, NDArray], provider: str = "CPUExecutionProvider"
) -> NDArray[np.float64]:
    """What the kernels of an execution provider compute, before float32 rounding: y [..., d].

    The CPU's round activations to int8 where weights or predictor are integers; CUDA's widen the integers and keep the
    activations in floating point.
    """
    return reference(variant, x, tensors, integer=provider == "CPUExecutionProvider")


def traffic(
    variant: Variant, d: int, n: int, r: int, density: float, opened: float | None = None, nonzero: float | None = None
) -> float:
    """Bytes that one token must read: weights, scales, biases, tau, predictor (rank r, 0 without) and residual.

    density is the kept share of the n neurons. Of a gated MLP with a ReLU activation, `opened` is the share whose up is
    needed, those scored high enough whose act(gate) is not 0, and `nonzero` the share whose w_down is, those whose z is
    not; both are `density` where they are not given. The product behind score gate or exact is read in full, so these
    cost 1/3 + 1/3 opened + 1/3 nonzero of a gated MLP.
    """
    full = {"all": ("gate", "up", "down"), "predictor": ()}.get(variant.score, ("up",) if variant.plain else ("gate",))
    shares = {
        "up": density if opened is None or variant.plain else opened,
        "down": density if nonzero is None else nonzero,
    }
    row = d * {"int8_row": 1.0, "int4_g32": 0.5}.get(variant.weights, float(_BYTES[variant.w]))
    scale = d // GROUP * 2.0 if variant.weights == "int4_g32" else 4.0
    total = 0.0
    for role in variant.inputs:
        kind, _, part = role.partition("_")
        share = 1.0 if part in full else shares.get(part, density)
        total += {
            "w": share * n * row,
            "s": r * 4.0 if role == "s_p1" else n * 4.0 if role == "s_p2" else share * n * scale,
            "b": (d if role == "b_down" else share * n) * 4.0,
            "tau": n * 4.0,
            "p1": float(r * d * _BYTES[variant.p]),
            "p2": float(n * r * _BYTES[variant.p]),
            "res": float(r * d * _BYTES[variant.p]),
        }[kind]
    return total

"""Op ai.sparsegate:SparseLinear, version 1: a linear layer that reads only the input channels whose value exceeds a
threshold.

For every token row x [d_in] of x [..., d_in], with the weight stored input-major [d_in, d_out], so that an active
channel is one contiguous row:

    keep = {j : |x_j| > tau_j}
    y = sum_{j in keep} x_j * w_j  +  b

tau [d_in] is float32 always: TEAL (arXiv 2408.14690) repeats one value for all channels, WINA (arXiv 2505.19427)
divides one value by the norm of each channel's weights. |x_j| is compared in float32. A NaN is not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray

from ..errors import InputError
from .gated_mlp_body import unpack_int4
from .quantisation import dequantise, integer_sum
from .vocabulary import GROUP, WEIGHTS

DOMAIN = "ai.sparsegate"
NAME = "SparseLinear"
VERSION = 1

ROLES = ("w", "s_w", "b", "tau")
"""Inputs after x, in this order: w [d_in, d_out] (int4_g32: [d_in, d_out / 2]), s_w [d_in] (int4_g32: [d_in, d_out /
32]) scales of an integer w, b [d_out], tau [d_in].
"""
FLOATS = ("float32", "float16", "bfloat16")

BOUNDS = {"float32": 1e-12, "float16": 1.5e-7, "bfloat16": 1e-5, "int8_row": 1e-10, "int4_g32": 1e-10}
"""Largest NMSE of a kernel: float weights, by dtype of x, against `reference` on the same rounded inputs; quantised
weights and x float32 against `emulate`.
"""

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Variant:
    """One combination of weight format, inputs and dtypes; a kernel either supports a variant or it does not.

    Attributes:
        weights: One of WEIGHTS; the integer formats, with scales in s_w, are described in `quantisation`. A row is an
        input channel.
        inputs: Roles that are present, in the order of ROLES; x is not among them.
        x: dtype of x and y.
        w: dtype of float weights; float32 for integer weights.

    Bias, tau and the scales of rows are float32 always, the scales of groups float16.

    Raises:
        InputError: The combination has no meaning or is not part of the vocabulary.
    """

    weights: str
    inputs: tuple[str, ...]
    x: str = "float32"
    w: str = "float32"

    def __post_init__(self) -> None:
        for what, value, allowed in (("weights", self.weights, WEIGHTS), ("x", self.x, FLOATS), ("w", self.w, FLOATS)):
            if value not in allowed:
                raise InputError(f"{what} must be one of {', '.join(allowed)}, got {value}. Choose one of them.")
        if tuple(role for role in ROLES if role in self.inputs) != self.inputs:
            raise InputError(
                f"inputs must be roles in the order {' '.join(ROLES)}, each once, got {' '.join(self.inputs)}. Sort "
                "them by ROLES."
            )
        needed = {"w": True, "s_w": self.weights != "float", "tau": True}
        wrong = " ".join(role for role, need in needed.items() if need != (role in self.inputs))
        if wrong:
            raise InputError(
                f"inputs of weights {self.weights} must hold what these need and nothing else, got "
                f"{' '.join(self.inputs)}. Add or remove {wrong}."
            )
        if self.weights != "float" and self.w != "float32":
            raise InputError(
                f"w must be float32 with weights {self.weights}, got {self.w}. It is the dtype of float weights only."
            )

    @property
    def name(self) -> str:
        """Closed spelling, e.g. SparseLinear.1/float/x=float32,w=float32/w+tau; `parse` inverts it."""
        return "/".join((f"{NAME}.{VERSION}", self.weights, f"x={self.x},w={self.w}", "+".join(self.inputs)))

    @staticmethod
    def parse(name: str) -> Variant:
        """Returns the variant that `name` spells; InputError if it is spelled in any other way."""
        parts = name.split("/")
        dtypes = parts[2].split(",") if len(parts) == 4 else []
        if len(dtypes) == 2 and parts[0] == f"{NAME}.{VERSION}":
            x, w = (text.partition("=")[2] for text in dtypes)
            variant = Variant(parts[1], tuple(parts[3].split("+")), x, w)
            if variant.name == name:
                return variant
        raise InputError(
            f"variant must be {NAME}.{VERSION}/<weights>/x=<dtype>,w=<dtype>/<roles>, got {name}. Update sparsegate."
        )

    def attributes(self) -> dict[str, str]:
        """String attributes of the node."""
        return {"inputs": " ".join(self.inputs), "weights": self.weights}


def function(variant: Variant, overload: str = "", opset: int = 21) -> onnx.FunctionProto:
    """Returns the model-local function of the op's own domain and name: its body in standard ops, formal inputs x and
    the variant's roles, output y.

    It computes in float32: weights that are not float32 pass through Cast, which ORT folds at load into a float32 copy,
    as it folds the unpacking of int4_g32; row scales multiply the input channels, not the weights. A file with one
    variant leaves the overload empty; opset is the version of the standard ops, at least 18.
    """
    if opset < 18:
        raise InputError(
            f"opset must be at least 18, got {opset}: BitwiseAnd is younger than that. Export with a newer opset."
        )
    lines: list[str] = []
    x, w, y = "x", "w", "product"
    if variant.x != "float32":
        lines.append("rows = Cast<to=1>(x)")
        x = "rows"
    # Where, not Mul: a NaN or inf in a channel that is not kept must not reach y
    lines += [
        f"size = Abs({x})",
        "keep = Greater(size, tau)",
        "zero = Constant<value_float=0.0>()",
        f"kept = Where(keep, {x}, zero)",
    ]
    x = "kept"
    if variant.weights == "int8_row":
        lines.append("scaled = Mul(kept, s_w)")
        x = "scaled"
    if variant.weights == "int4_g32":
        lines += unpack_int4("w", "s_w", "w_float")
        w = "w_float"
    elif variant.weights == "int8_row" or variant.w != "float32":
        lines.append("w_float = Cast<to=1>(w)")
        w = "w_float"
    lines.append(f"product = MatMul({x}, {w})")
    if "b" in variant.inputs:
        lines.append("biased = Add(product, b)")
        y = "biased"
    if variant.x == "float32":
        lines.append(f"y = Identity({y})")
    else:
        code = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}[variant.x]
        lines.append(f"y = Cast<to={code}>({y})")
    formal, attributes = ", ".join(("x", *variant.inputs)), ", ".join(variant.attributes())
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{NAME} <{attributes}> ({formal}) => (y) {{\n '
        + "\n ".join(lines)
        + "\n}"
    )
    built = onnx.parser.parse_function(text)
    built.overload = overload
    return built


# float64 reference


def _rows(x: NDArray) -> NDArray:
    return np.asarray(x).astype(np.float64).reshape(-1, np.shape(x)[-1])


def _present(variant: Variant, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
    missing = [role for role in variant.inputs if role not in tensors]
    if missing:
        raise InputError(
            f"tensors must hold {' '.join(variant.inputs)}, got {' '.join(tensors)}. Add {' '.join(missing)}."
        )
    return {role: np.asarray(tensors[role]) for role in variant.inputs}


def scores(variant: Variant, x: NDArray, tensors: Mapping[str, NDArray]) -> NDArray[np.float64]:
    """|x| [T, d_in] in float64 of x [..., d_in]."""
    _present(variant, tensors)
    return np.abs(_rows(x))


def active(variant: Variant, x: NDArray, tensors: Mapping[str, NDArray]) -> NDArray[np.bool_]:
    """Kept input channels bool [T, d_in] of x [..., d_in]: |x| > tau."""
    return scores(variant, x, tensors) > _present(variant, tensors)["tau"].astype(np.float64)


def reference(
    variant: Variant, x: NDArray, tensors: Mapping[str, NDArray], integer: bool = False
) -> NDArray[np.float64]:
    """The op in float64 on the inputs as they are stored, so as the executors see them.

    Args:
        variant: Which variant.
        x: [..., d_in], any float dtype.
        tensors: One array per role of the variant, in the stored dtype (an int8 weight as int8).
        integer: Round x to int8 where it meets an integer weight, as the CPU kernels do; see `quantisation`.

    Returns:
        y [..., d_out].
    """
    stored = _present(variant, tensors)
    keep, rows = active(variant, x, tensors), _rows(x)
    if integer and variant.weights != "float":
        y = integer_sum(rows, keep, stored["w"], stored["s_w"], variant.weights)
    else:
        w = (
            stored["w"].astype(np.float64)
            if variant.weights == "float"
            else dequantise(stored["w"], stored["s_w"], variant.weights)
        )
        y = np.where(keep, rows, 0.0) @ w
    if "b" in stored:
        y = y + stored["b"].astype(np.float64)
    return y.reshape(*np.shape(x)[:-1], y.shape[1])


def emulate(
    variant: Variant, x: NDArray, tensors: Mapping[str, NDArray], provider: str = "CPUExecutionProvider"
) -> NDArray[np.float64]:
    """What the kernels of an execution provider compute, before float32 rounding: y [..., d_out].

    The CPU's round x to int8 where the weight is an integer; CUDA's widen the integers and keep x in floating point.
    """
    return reference(variant, x, tensors, integer=provider == "CPUExecutionProvider")


def traffic(variant: Variant, d_in: int, d_out: int, density: float) -> float:
    """Bytes that one token must read: the rows of the kept share `density` of the d_in channels, their scales, the bias
    and tau.
    """
    row = {"int8_row": d_out + 4.0, "int4_g32": d_out / 2 + d_out // GROUP * 2.0}.get(
        variant.weights, float(d_out * _BYTES[variant.w])
    )
    return density * d_in * row + (d_out * 4.0 if "b" in variant.inputs else 0.0) + d_in * 4.0

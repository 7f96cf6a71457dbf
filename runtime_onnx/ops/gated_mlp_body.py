"""The body of GatedMLP in standard ONNX ops: what runs where the native library is not registered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.parser

from ..errors import InputError
from .activation import cuts_up, split_activation

if TYPE_CHECKING:
    from .gated_mlp import Variant

_ACTIVATE = {
    "silu": "{out}_sigmoid = Sigmoid({v})\n {out} = Mul({v}, {out}_sigmoid)",
    "gelu": "{out} = Gelu({v})",
    "gelu_tanh": '{out} = Gelu<approximate="tanh">({v})',
    "relu": "{out} = Relu({v})",
    "relu2": "{out}_relu = Relu({v})\n {out} = Mul({out}_relu, {out}_relu)",
    "drelu": "{out} = Relu({v})",
    "identity": "{out} = Identity({v})",
    # NaN stays NaN
    "fatrelu": "{out}_bound = {b}\n {out}_off = {zero}\n {out}_closed = LessOrEqual({v}, {out}_bound)\n {out} = "
    "Where({out}_closed, {out}_off, {v})",
    "shifted_relu": "{out}_shift = {b}\n {out}_shifted = Sub({v}, {out}_shift)\n {out} = Relu({out}_shifted)",
}


def _activation(text: str, out: str, v: str) -> str:
    """Lines that make `out` the activation of `v`."""
    kind, parameter = split_activation(text)
    return _ACTIVATE[kind].format(out=out, v=v, b=_constant(parameter), zero=_constant(0.0))


def _constant(value: float) -> str:
    return f"Constant<value_float={float(np.float32(value))!r}>()"


_SCALES = {"w_gate": "s_gate", "w_up": "s_up", "w_down": "s_down"}


def unpack_int4(stored: str, scale: str, out: str) -> list[str]:
    """Lines that make float32 `out` [rows, columns] of an int4_g32 matrix: uint8 `stored` [rows, columns / 2], float16
    `scale` [rows, columns / 32].
    """
    o = out
    return [
        f"{o}_mask = Constant<value = uint8[1] {{15}}>()",
        f"{o}_four = Constant<value = uint8[1] {{4}}>()",
        f"{o}_last = Constant<value_ints=[-1]>()",
        f"{o}_low = BitwiseAnd({stored}, {o}_mask)",
        f'{o}_high = BitShift<direction="RIGHT">({stored}, {o}_four)',
        f"{o}_low_column = Unsqueeze({o}_low, {o}_last)",
        f"{o}_high_column = Unsqueeze({o}_high, {o}_last)",
        f"{o}_pairs = Concat<axis=-1>({o}_low_column, {o}_high_column)",
        f"{o}_integers = Cast<to=1>({o}_pairs)",
        f"{o}_zero = Constant<value_float=8.0>()",
        f"{o}_signed = Sub({o}_integers, {o}_zero)",
        f"{o}_by_group = Constant<value_ints=[0, -1, 32]>()",
        f"{o}_grouped = Reshape({o}_signed, {o}_by_group)",
        f"{o}_scale = Cast<to=1>({scale})",
        f"{o}_scale_column = Unsqueeze({o}_scale, {o}_last)",
        f"{o}_values = Mul({o}_grouped, {o}_scale_column)",
        f"{o}_flat = Constant<value_ints=[0, -1]>()",
        f"{o} = Reshape({o}_values, {o}_flat)",
    ]


class _Lines:
    """Lines of a body, step after step; a step returns the name of what it computed, [rows, ...] float32."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.roles = set(variant.inputs)
        self.stored = {"float": variant.w, "int8_row": "int8", "int4_g32": "int4_g32"}[variant.weights]
        self.lines: list[str] = []
        self._widened: set[str] = set()

    def weight(self, role: str, stored: str) -> str:
        """Name of the role's tensor as float32."""
        if stored == "float32":
            return role
        wide = f"{role}_float"
        if role not in self._widened:
            self._widened.add(role)
            self.lines += (
                unpack_int4(role, _SCALES[role], wide) if stored == "int4_g32" else [f"{wide} = Cast<to=1>({role})"]
            )
        return wide

    def product(self, out: str, rows: str, role: str, stored: str, scale: str = "", bias: str = "") -> None:
        """`out` = rows times role^T, scaled and shifted per column where scale and bias exist."""
        w = self.weight(role, stored)
        if scale in self.roles and stored == "int8":
            self.lines.append(f"{out}_raw = Gemm<transB=1>({rows}, {w})")
            self.lines.append(f"{out}{'_scaled' if bias in self.roles else ''} = Mul({out}_raw, {scale})")
            if bias in self.roles:
                self.lines.append(f"{out} = Add({out}_scaled, {bias})")
        else:
            self.lines.append(f"{out} = Gemm<transB=1>({rows}, {w}{', ' + bias if bias in self.roles else ''})")

    def rows(self) -> str:
        """The rows [T, d] of x [..., d]."""
        self.lines += [
            "x_shape = Shape(x)",
            "free = Constant<value_ints=[-1]>()",
            "width = Shape<start=-1>(x)",
            "row_shape = Concat<axis=0>(free, width)",
        ]
        if self.variant.x == "float32":
            self.lines.append("rows = Reshape(x, row_shape)")
        else:
            self.lines += ["rows_x = Reshape(x, row_shape)", "rows = Cast<to=1>(rows_x)"]
        return "rows"

    def neurons(self, rows: str) -> str:
        """What every neuron would give, [T, n]; `act` is the activation alone."""
        activation = self.variant.activation
        self.product("up", rows, "w_up", self.stored, "s_up", "b_up")
        if self.variant.plain:
            self.lines.append(_activation(activation, "act", "up"))
            return "act"
        self.product("gate", rows, "w_gate", self.stored, "s_gate", "b_gate")
        self.lines.append(_activation(activation, "act", "gate"))
        up = "up"
        if cuts_up(activation):
            up = "up_relu"
            self.lines.append("up_relu = Relu(up)")
        self.lines.append(f"z = Mul(act, {up})")
        return "z"

    def kept(self, z: str, rows: str) -> str:
        """The products with 0 where the score does not keep a neuron; `hidden` [T, r] where there is a predictor or a
        residual.
        """
        if "p1" in self.roles:
            self.product("logit", rows, "p1", self.variant.p, "s_p1")
            self.lines.append("hidden = Relu(logit)")
        if "tau" not in self.roles:
            return z
        if self.variant.score == "predictor":
            self.product("score", "hidden", "p2", self.variant.p, "s_p2")
        else:
            self.lines.append("score = Abs(act)")
        # Where, not Mul: a NaN or inf in a neuron that is not kept must not reach y
        self.lines += [
            "keep = Greater(score, tau)",
            "zero = Constant<value_float=0.0>()",
            f"kept = Where(keep, {z}, zero)",
        ]
        return "kept"

    def down(self, z: str) -> str:
        """The down projection, bias and residual, [T, d]."""
        if "s_down" in self.roles and self.stored == "int8":
            self.lines.append(f"z_scaled = Mul({z}, s_down)")
            z = "z_scaled"
        self.lines.append(f"down = MatMul({z}, {self.weight('w_down', self.stored)})")
        y = "down"
        if "b_down" in self.roles:
            self.lines.append(f"biased = Add({y}, b_down)")
            y = "biased"
        if "res" in self.roles:
            self.lines.append(f"residual = MatMul(hidden, {self.weight('res', self.variant.p)})")
            self.lines.append(f"summed = Add({y}, residual)")
            y = "summed"
        return y

    def shaped(self, y: str) -> None:
        """`y` in the dtype and shape of x."""
        if self.variant.x != "float32":
            code = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}[self.variant.x]
            self.lines.append(f"narrow = Cast<to={code}>({y})")
            y = "narrow"
        self.lines.append(f"y = Reshape({y}, x_shape)")


def body(variant: Variant, domain: str, name: str, overload: str, opset: int) -> onnx.FunctionProto:
    """Returns the function with formal inputs x and the variant's roles, output y, computing in float32.

    Gemm(transB) reads weights [n, d] as they lie: no transposed copy. Weights that are not float32 pass through Cast,
    which ORT folds at load into a float32 copy, as it folds the unpacking of int4_g32. Row scales multiply the
    products, not the weights.
    """
    if opset < 20:
        raise InputError(
            f"opset must be at least 20, got {opset}: Gelu is younger than that. Export with a newer opset."
        )
    steps = _Lines(variant)
    rows = steps.rows()
    steps.shaped(steps.down(steps.kept(steps.neurons(rows), rows)))
    formal = ", ".join(("x", *variant.inputs))
    attributes = ", ".join(variant.attributes())
    text = (
        f'<domain: "{domain}", opset_import: ["" : {opset}]>\n{name} <{attributes}> ({formal}) => (y) {{\n '
        + "\n ".join(steps.lines)
        + "\n}"
    )
    function = onnx.parser.parse_function(text)
    function.overload = overload
    return function

"""What `--precision` means in the graph: the formats of the ops' weights and predictors, and the bits of the remaining
products.

| precision | op weights | predictor | rest, CPU | rest, CUDA |
|---|---|---|---|---|
| fp32 | float32 | float32 | float32 | float32 |
| fp16 | float16 | float16 | float32 | float16 |
| bf16 | bfloat16 | bfloat16 | float32 | bfloat16 |
| int8 | int8_row | int8, float16 with a residual | MatMulNBits 8 bits | MatMulNBits 8 bits, float16 |
| int4 | int4_g32 | int8, float16 with a residual | MatMulNBits 4 bits | MatMulNBits 4 bits, float16 |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from ...runtime_onnx.errors import either
from ...runtime_onnx.ops.vocabulary import GROUP
from ..checkpoint.fields import Strict


@dataclass(frozen=True)
class Precision:
    """One row of PRECISIONS.

    Attributes:
        name: The word after `--precision`.
        weights: The ops' weight format: float, int8_row or int4_g32.
        w: dtype of the ops' float weights; float32 for integer weights, as in the ops' variants.
        predictor: Format of p1, p2 and res where it may be chosen: a dtype or int8.
        bits: Of MatMulNBits in the rest of the graph; None leaves the rest in floating point.
        cuda: The builder's precision of the floating-point part of a graph for CUDA.
    """

    name: str
    weights: str
    w: str
    predictor: str
    bits: int | None
    cuda: str

    def builder(self, target: str) -> str:
        """The builder's precision of the float graph for a target."""
        return self.cuda if target == "cuda" else "fp32"

    def fitting(self, width: int) -> str:
        """The weight format for rows of `width` values: int8_row in place of int4_g32 where the groups do not fit."""
        return "int8_row" if self.weights == "int4_g32" and width % GROUP else self.weights

    def predictor_format(self, residual: bool) -> str:
        """Format of a predictor: int8 leaves no place for a residual, so it is float16 then."""
        return "float16" if self.predictor == "int8" and residual else self.predictor

    def predictor_share(self, residual: bool) -> float:
        """Bytes of a predictor's value relative to those of a gated weight, its scales included."""
        weight = {"int8_row": 1.0, "int4_g32": 0.5 + 2 / GROUP}.get(self.weights)
        return 1.0 if weight is None else {"float16": 2, "int8": 1}[self.predictor_format(residual)] / weight

    @property
    def width(self) -> int:
        """Bits of a weight, scales left out."""
        return self.bits or (32 if self.w == "float32" else 16)


PRECISIONS = {
    row.name: row
    for row in (
        Precision("fp32", "float", "float32", "float32", None, "fp32"),
        Precision("fp16", "float", "float16", "float16", None, "fp16"),
        Precision("bf16", "float", "bfloat16", "bfloat16", None, "bf16"),
        Precision("int8", "int8_row", "float32", "int8", 8, "fp16"),
        Precision("int4", "int4_g32", "float32", "int8", 4, "fp16"),
    )
}
FLOAT_NAMES = {row.name: row.w for row in PRECISIONS.values() if row.weights == "float"}
"""The builder's precision -> dtype of a graph's activations."""
FOR_CUDA = either(row.name for row in PRECISIONS.values() if row.cuda != "fp32")
"""The names of what a graph for CUDA can be in."""
if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(PRECISIONS)]


def named(weights: str, w: str) -> str:
    """The first precision whose ops' weights are of a format and dtype."""
    return next(row.name for row in PRECISIONS.values() if (row.weights, row.w) == (weights, w))


class Export(Strict):
    """How the gated weights are stored in ONNX (`onnx_export.precision` has the table), and which execution provider
    the graph is for.
    """

    precision: Name = "fp32"
    target: Literal["cpu", "cuda"] = "cpu"

    @model_validator(mode="after")
    def _check(self) -> Export:
        if self.target == "cuda" and self.precision == "fp32":
            raise ValueError(f"precision must be {FOR_CUDA} for the target cuda")
        return self

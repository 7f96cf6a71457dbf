"""Cases for the CUDA kernels of both ops: for the emulation on a CPU, for ONNX Runtime on a GPU and for
tests/bench/benchmarks/cuda_run.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from op_harness import gated_mlp as mlp_inputs
from op_harness import sparse_linear as linear_inputs
from op_harness.rounding import between
from op_harness.sessions import Tensors, nmse

from sparsegate.runtime_onnx.ops import gated_mlp, sparse_linear
from sparsegate.runtime_onnx.ops.quantisation import dequantise

CUDA = "CUDAExecutionProvider"
FLOATS = ("float32", "float16", "bfloat16")
DECODE, PREFILL = (1, 3), (5, 130)
"""Numbers of tokens on either path of the kernels."""

Run = Callable[[str, str, tuple[str, ...], Tensors, np.ndarray, int], np.ndarray]
"""(op, name of the variant, all roles of the op, tensors, x [T, columns], width) -> y [T, width]"""


@dataclass(frozen=True)
class Mlp:
    """One run of GatedMLP."""

    tokens: int
    score: str = "predictor"
    activation: str = "silu"
    weights: str = "float"
    x: str = "float32"
    w: str = "float32"
    p: str = "float32"
    plain: bool = False
    bias: bool = False
    res: bool = False
    d: int = 96
    n: int = 140
    r: int = 24
    keep: float = 0.3

    def __str__(self) -> str:
        flags = [name for name in ("plain", "bias", "res") if getattr(self, name)]
        parts = (
            self.tokens,
            self.score,
            self.activation,
            self.weights,
            self.x,
            self.w,
            self.p,
            f"d{self.d}",
            f"n{self.n}",
            f"r{self.r}",
            *flags,
        )
        return "-".join(map(str, parts))


def mlp(case: Mlp) -> tuple[gated_mlp.Variant, Tensors, np.ndarray]:
    """(variant, tensors, x [tokens, d]) of a case."""
    options = {"plain": case.plain, "bias": case.bias, "res": case.res, "x": case.x, "w": case.w, "p": case.p}
    variant = mlp_inputs.make_variant(case.activation, case.score, case.weights, **options)
    tensors = mlp_inputs.make_tensors(variant, case.d, case.n, case.r)
    x = mlp_inputs.make_x(variant, (case.tokens, case.d))
    if "tau" in variant.inputs:
        kept = np.random.default_rng(2).binomial(case.tokens, case.keep, case.n)
        tensors["tau"] = between(gated_mlp.scores(variant, x, {**tensors, "tau": np.zeros(case.n, np.float32)}), kept)
    return variant, tensors, x


def linear(
    tokens: int,
    weights: str = "float",
    x: str = "float32",
    w: str = "float32",
    bias: bool = True,
    d_in: int = 200,
    d_out: int = 96,
    keep: float = 0.4,
) -> tuple[sparse_linear.Variant, Tensors, np.ndarray]:
    """(variant, tensors, x [tokens, d_in]) of one run of SparseLinear."""
    variant = linear_inputs.make_variant(weights, bias=bias, x=x, w=w)
    rows = linear_inputs.make_x(variant, (tokens, d_in))
    return variant, linear_inputs.with_tau(variant, rows, linear_inputs.make_tensors(variant, d_in, d_out), keep), rows


def run_mlp(run: Run, variant: gated_mlp.Variant, tensors: Tensors, x: np.ndarray) -> np.ndarray:
    return run("gated_mlp", variant.name, gated_mlp.ROLES, tensors, x, x.shape[1])


def run_linear(run: Run, variant: sparse_linear.Variant, tensors: Tensors, x: np.ndarray) -> np.ndarray:
    width = tensors["w"].shape[1] * (2 if variant.weights == "int4_g32" else 1)
    return run("sparse_linear", variant.name, sparse_linear.ROLES, tensors, x, width)


def bound(variant: gated_mlp.Variant | sparse_linear.Variant) -> float:
    """Largest NMSE: by the weights' format for float32 x, by x's dtype otherwise."""
    return gated_mlp.BOUNDS[variant.weights if variant.weights != "float" and variant.x == "float32" else variant.x]


def floats(variant: gated_mlp.Variant | sparse_linear.Variant, tensors: Tensors) -> Tensors:
    """The weights of the variant in float64, its other tensors as they are."""
    scale = {"w": "s_w", "w_gate": "s_gate", "w_up": "s_up", "w_down": "s_down"}
    return {
        role: dequantise(v, tensors[scale[role]], variant.weights)
        if role in scale and variant.weights != "float"
        else v
        for role, v in tensors.items()
    }


def check_mlp(variant: gated_mlp.Variant, tensors: Tensors, x: np.ndarray, y: np.ndarray) -> float:
    """Asserts that y meets the variant's bound and that the reference with one kept neuron dropped does not; returns
    the NMSE.
    """
    error = nmse(y, gated_mlp.emulate(variant, x, tensors, CUDA))
    assert error < bound(variant)
    wide = floats(variant, tensors)
    keep = gated_mlp.active(variant, x, tensors)
    z = np.where(keep, gated_mlp._activated(variant, x.astype(np.float64), tensors)[1], 0)
    size = np.sqrt((z**2).sum(0)) * np.abs(wide["w_down"].astype(np.float64)).sum(1)
    used = np.flatnonzero(size)
    neuron = used[np.argsort(size[used])[used.size // 2]]
    control = gated_mlp.emulate(variant, x, tensors, CUDA) - np.outer(
        z[:, neuron], wide["w_down"][neuron].astype(np.float64)
    )
    assert nmse(y, control) > bound(variant)
    return error


def check_linear(variant: sparse_linear.Variant, tensors: Tensors, x: np.ndarray, y: np.ndarray) -> float:
    """Asserts that y meets the variant's bound and that the reference with one kept channel dropped does not; returns
    the NMSE.
    """
    expected = sparse_linear.emulate(variant, x, tensors, CUDA)
    error = nmse(y, expected)
    assert error < bound(variant)
    w = floats(variant, tensors)["w"].astype(np.float64)
    kept = np.where(sparse_linear.active(variant, x, tensors), x.astype(np.float64), 0)
    size = np.sqrt((kept**2).sum(0)) * np.abs(w).sum(1)
    used = np.flatnonzero(size)
    channel = used[np.argsort(size[used])[used.size // 2]]
    assert nmse(y, expected - np.outer(kept[:, channel], w[channel])) > bound(variant)
    return error


def _mlp_cases() -> list[Mlp]:
    out = []
    for tokens in (*DECODE, *PREFILL):
        many = {"d": 64, "n": 136} if tokens == 130 else {}
        for dtype in FLOATS:
            out.append(Mlp(tokens, x=dtype, w=dtype, p=dtype, bias=True, res=tokens < 100, **many))
        out += [
            Mlp(tokens, "gate", x="float16", w="float16", bias=True, **many),
            Mlp(tokens, "all", x="bfloat16", w="bfloat16", plain=True, **many),
        ]
        for weights in ("int8_row", "int4_g32"):
            out += [
                Mlp(tokens, weights=weights, x=x, p="int8", bias=True, **many)
                for x in FLOATS[: 3 if tokens < 100 else 1]
            ]
    for tokens in (1, 5):
        out += [
            Mlp(tokens, "exact", "drelu", x="float16", w="float16"),
            Mlp(tokens, "exact", "relu2", plain=True, bias=True),
            Mlp(tokens, "exact", "fatrelu(0.2)", bias=True),
            Mlp(tokens, "gate", "shifted_relu(0.2)", x="float16", w="float16"),
            Mlp(tokens, activation="drelu", weights="int8_row", x="float16", p="int8"),
            Mlp(tokens, "gate", "gelu", plain=True, bias=True, x="float16", w="float16"),
            Mlp(
                tokens, activation="gelu_tanh", x="float16", w="bfloat16", p="float32"
            ),  # types that the tensor cores do not take together
            Mlp(tokens, activation="identity", x="float16", w="float32", p="int8"),
            Mlp(
                tokens, x="float16", w="float16", p="float16", d=93, n=77, r=9, res=True
            ),  # nothing is a multiple of eight
            Mlp(tokens, d=93, n=77, r=9),
            Mlp(tokens, "all", d=1, n=1),
        ]
    out.append(
        Mlp(1, x="float16", w="float16", p="float16", d=2400, n=40, r=264)
    )  # more than one round of a block over columns and ranks
    out.append(Mlp(1, "gate", weights="int4_g32", x="float16", d=2112, n=300))
    return out


MLP_CASES = _mlp_cases()

LINEAR_CASES: list[dict] = [
    {"tokens": tokens, "weights": weights, "x": x, "w": x if weights == "float" else "float32"}
    for tokens in (1, 3, 6, 130)
    for weights in ("float", "int8_row", "int4_g32")
    for x in FLOATS[: 3 if tokens < 100 else 2]
] + [{"tokens": tokens, "x": "float16", "w": "float16", "d_in": 77, "d_out": 93} for tokens in (1, 6)]

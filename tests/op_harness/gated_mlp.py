"""Cases of GatedMLP."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from sparsegate.runtime_onnx.ops import gated_mlp as OP
from sparsegate.runtime_onnx.ops.activation import is_relu, split_activation
from sparsegate.runtime_onnx.ops.gated_mlp import (
    FLOATS,
    ROLES,
    SCORES,
    Variant,
    _activated,
    _hidden,
    _matrix,
    _product,
    _rows,
    active,
    scores,
)
from sparsegate.runtime_onnx.ops.quantisation import quantise

from .breaking import Broken, documented, message, others_untouched
from .case import ISAS, KEEP, STORED, TOKENS, Case, Row, formats, pairwise
from .rounding import between
from .sessions import Tensors

ACTIVATIONS = (*OP.ACTIVATIONS, "fatrelu(0.2)", "shifted_relu(0.2)")
SIZES = ((96, 331, 19), (160, 700, 33), (32, 31, 1), (37, 101, 8), (288, 64, 40), (83, 547, 130))
"""(d, n, r): tails in every direction, one and several blocks of neurons, enough bytes for threads in some."""


def make_variant(
    activation: str = "silu",
    score: str = "predictor",
    weights: str = "float",
    *,
    plain: bool = False,
    bias: bool = False,
    res: bool = False,
    x: str = "float32",
    w: str = "float32",
    p: str = "float32",
) -> Variant:
    """The variant with just the roles it needs."""
    roles = {"w_gate", "w_up", "w_down"}
    if weights != "float":
        roles |= {"s_gate", "s_up", "s_down"}
    if bias:
        roles |= {"b_gate", "b_up", "b_down"}
    if score in ("predictor", "gate"):
        roles.add("tau")
    if score == "predictor":
        roles |= {"p1", "p2"}
    if res:
        roles |= {"p1", "res"}
    if p == "int8":
        roles |= {"s_" + role for role in roles & {"p1", "p2"}}
    if plain:
        roles -= {"w_gate", "s_gate", "b_gate"}
    return Variant(activation, score, weights, tuple(role for role in ROLES if role in roles), x, w, p)


def make_tensors(variant: Variant, d: int, n: int, r: int = 8, seed: int = 0) -> Tensors:
    """Random tensors of unit-scale products, without tau."""
    rng = np.random.default_rng(seed)
    shapes = {
        "w_gate": (n, d),
        "w_up": (n, d),
        "w_down": (n, d),
        "b_gate": (n,),
        "b_up": (n,),
        "b_down": (d,),
        "p1": (r, d),
        "p2": (n, r),
        "res": (r, d),
    }
    out: Tensors = {}
    for role in variant.inputs:
        if role not in shapes:
            continue
        value = rng.standard_normal(shapes[role]) / (
            1 if role in ("w_down", "res") else shapes[role][-1] ** 0.5 if role[0] != "b" else 2
        )
        if role[0] == "w" and variant.weights != "float":
            out[role], out["s" + role[1:]] = quantise(value, variant.weights)
        elif role[0] == "p" and variant.p == "int8":
            out[role], out["s_" + role] = quantise(value, "int8_row")
        else:
            out[role] = value.astype("float32" if role[0] == "b" else variant.w if role[0] == "w" else variant.p)
    return out


def make_x(variant: Variant, shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    """Random x of the variant's dtype."""
    return np.random.default_rng(seed).standard_normal(shape).astype(variant.x)


def with_tau(variant: Variant, x: np.ndarray, tensors: Tensors, keep: str | float, seed: int = 2) -> Tensors:
    """Adds a tau that keeps this share of the (token, neuron) pairs, or one neuron ("one"), with every score off the
    threshold.

    The one is the largest of the first token: where gate or up nearly cancel, a bound on the relative error would
    measure their condition.
    """
    if "tau" not in variant.inputs:
        return tensors
    n = tensors["w_up"].shape[0]
    s = scores(variant, x, {**tensors, "tau": np.zeros(n, np.float32)}, integer=True)
    tokens = len(s)
    if keep == "one":
        kept = np.where(np.arange(n) == np.abs(_activated(variant, _rows(x), tensors)[1][0]).argmax(), tokens, 0)
    else:
        kept = np.random.default_rng(seed).binomial(tokens, keep, n)
    return {**tensors, "tau": between(s, kept)}


def make(case: Case, pool: int) -> tuple[np.ndarray, Tensors]:
    """x [pool, d] and tensors of a case."""
    d, n, r = case.sizes
    x = make_x(case.variant, (pool, d), case.seed + 1)
    return x, with_tau(case.variant, x, make_tensors(case.variant, d, n, r, case.seed), case.keep, case.seed + 2)


def expected(variant: Variant, x: np.ndarray, tensors: Tensors) -> np.ndarray:
    """What the CPU's kernel computes, in float64."""
    return OP.emulate(variant, x, tensors)


def float_activations(variant: Variant, x: np.ndarray, tensors: Tensors) -> np.ndarray:
    """The same selection as the kernel's, and the same side of a jump, the rest without rounding of activations."""
    rows = _rows(x)
    z = _activated(variant, rows, tensors)[1]
    kind, parameter = split_activation(variant.activation)
    if kind == "fatrelu":
        first = "up" if variant.plain else "gate"
        rounded, value = (
            _product(variant, rows, tensors, f"w_{first}", f"b_{first}", integer) for integer in (True, False)
        )
        other = 1.0 if variant.plain else _product(variant, rows, tensors, "w_up", "b_up", False)
        z = np.where(rounded > np.float32(parameter), value * other, 0.0)
    y = np.where(active(variant, x, tensors, integer=True), z, 0.0) @ _matrix(variant, tensors, "w_down")
    if "b_down" in tensors:
        y = y + tensors["b_down"].astype(np.float64)
    return y + _hidden(variant, rows, tensors, False) @ tensors["res"].astype(np.float64) if "res" in tensors else y


def nothing(variant: Variant, x: np.ndarray, tensors: Tensors) -> np.ndarray | None:
    """y bit for bit where nothing is kept; None where something is, or where the residual adds to it."""
    if active(variant, x, tensors, integer=True).any() or "res" in tensors:
        return None
    return np.broadcast_to(tensors.get("b_down", np.zeros(1, np.float32)), x.shape).astype(variant.x).astype(np.float32)


def without_one(variant: Variant, x: np.ndarray, tensors: Tensors) -> np.ndarray | None:
    """What is expected without the kept neuron of upper-quartile contribution, the negative control of every bound;
    None if nothing contributes.
    """
    z = np.where(active(variant, x, tensors, integer=True), _activated(variant, _rows(x), tensors, True)[1], 0)
    size = np.sqrt((z**2).sum(0)) * np.abs(_matrix(variant, tensors, "w_down")).sum(1)
    used = np.flatnonzero(size)
    if not used.size:
        return None
    role = "w_down" if variant.weights == "float" else "s_down"
    down = tensors[role].copy()
    down[used[np.argsort(size[used])[used.size * 3 // 4]]] = 0
    return expected(variant, x, {**tensors, role: down})


def possible(row: Row) -> bool:
    """Whether a row of the axes below makes a case, and no value of it is without effect."""
    predictor = row["score"] == "predictor" or row["res"]
    return not (
        (row["plain"] and row["activation"] == "drelu")
        or (row["score"] == "exact" and not is_relu(row["activation"]))
        or (row["p"] != "float32" and not predictor)
        or (row["p"] == "int8" and row["res"])
        or (row["keep"] != 1.0 and row["score"] in ("exact", "all"))
        or (row["stored"] == "int4_g32" and row["sizes"][0] % 32)
    )


VARIANT_AXES: dict[str, tuple] = {
    "activation": ACTIVATIONS,
    "score": SCORES,
    "plain": (False, True),
    "stored": STORED,
    "p": (*FLOATS, "int8"),
    "x": FLOATS,
    "bias": (False, True),
    "res": (False, True),
}
RUN_AXES: dict[str, tuple] = {"tokens": TOKENS, "keep": KEEP, "sizes": SIZES, "isa": ISAS}


def variant_of(row: Row) -> Variant:
    """The variant that a row of the axes spells."""
    weights, w = formats(row["stored"])
    return make_variant(
        row["activation"], row["score"], weights, w=w, **{k: row[k] for k in ("plain", "bias", "res", "x", "p")}
    )


def case_of(row: Row, seed: int) -> Case:
    """The case that a row of the axes spells."""
    return Case(variant_of(row), row["sizes"], row["tokens"], row["keep"], row["isa"], seed)


SAMPLED = tuple(case_of(row, 100 + i) for i, row in enumerate(pairwise({**VARIANT_AXES, **RUN_AXES}, possible)))
"""Every pair of two axes' values."""


def rows_of_variants() -> Iterator[Row]:
    """All variants with biases (all or none), as rows without the axes of a run."""
    free = {"keep": 1.0, "sizes": (32, 32, 1)}
    for values in itertools.product(*VARIANT_AXES.values()):
        row = dict(zip(VARIANT_AXES, values, strict=True))
        if possible({**row, **free}):
            yield row


def every_case() -> Iterator[Case]:
    """Every variant, each at one random choice of the run's axes."""
    rng = random.Random(1)
    for i, row in enumerate(rows_of_variants()):
        while not possible(full := {**row, **{k: rng.choice(v) for k, v in RUN_AXES.items()}}):
            pass
        yield case_of(full, 10_000 + i)


def grid() -> Iterator[tuple[str, str, Variant]]:
    """(Row, column, variant) of the table of support: weights and dtypes x activation and score; gated without biases
    or residual.
    """
    for row in rows_of_variants():
        if not (row["plain"] or row["bias"] or row["res"]):
            yield f"{row['stored']} p={row['p']} x={row['x']}", f"{row['activation']}/{row['score']}", variant_of(row)


def names() -> Iterator[Any]:
    """Every variant of the grid, plain ones, biases and residuals among them."""
    return (variant_of(row) for row in rows_of_variants())


D, N, R = 32, 40, 6
WRONG_TENSORS: tuple[tuple[str, str, tuple[int, ...], str, str], ...] = (
    ("float", "w_gate", (N, D + 1), "float32", "input w_gate must be float32 [40, 32], got float32 [40, 33]"),
    ("float", "w_down", (N - 1, D), "float32", "input w_down must be float32 [40, 32], got float32 [39, 32]"),
    ("float", "w_down", (N, D), "float16", "input w_down must be float32 [40, 32], got float16 [40, 32]"),
    ("float", "w_up", (N, D), "float64", "input w_up must be float32 [40, 32], got float64 [40, 32]"),
    ("float", "w_gate", (N, D), "int8", "input w_gate must be float32 [40, 32], got int8 [40, 32]"),
    ("float", "w_up", (N * D,), "float32", "input w_up must be [n, d], got float32 [1280]"),
    ("float", "w_up", (0, D), "float32", "input w_up must be [n, d], got float32 [0, 32]"),
    ("float", "w_up", (N, 0), "float32", "input w_up must be [n, d], got float32 [40, 0]"),
    ("float", "tau", (1,), "float32", "input tau must be float32 [40], got float32 [1]"),
    ("float", "tau", (), "float32", "input tau must be float32 [40], got float32 []"),
    ("float", "tau", (N,), "float16", "input tau must be float32 [40], got float16 [40]"),
    ("float", "p1", (R, D, 1), "float32", "input p1 must be [r, d], got float32 [6, 32, ...]"),
    ("float", "p1", (0, D), "float32", "input p1 must be [r, d], got float32 [0, 32]"),
    ("float", "p2", (N, R + 1), "float32", "input p2 must be float32 [40, 6], got float32 [40, 7]"),
    ("float", "p2", (N, R), "int8", "input p2 must be float32 [40, 6], got int8 [40, 6]"),
    ("float", "res", (R, D - 1), "float32", "input res must be float32 [6, 32], got float32 [6, 31]"),
    ("float", "b_down", (N,), "float32", "input b_down must be float32 [32], got float32 [40]"),
    ("int8_row", "w_up", (N, D), "uint8", "input w_up must be int8 [40, 32], got uint8 [40, 32]"),
    ("int8_row", "w_down", (N, D), "float32", "input w_down must be int8 [40, 32], got float32 [40, 32]"),
    ("int8_row", "s_down", (N, 1), "float32", "input s_down must be float32 [40], got float32 [40, 1]"),
    ("int8_row", "s_up", (N - 1,), "float32", "input s_up must be float32 [40], got float32 [39]"),
    ("int8_row", "s_gate", (N,), "float16", "input s_gate must be float32 [40], got float16 [40]"),
    ("int8_row", "s_p1", (N,), "float32", "input s_p1 must be float32 [6], got float32 [40]"),
    ("int4_g32", "w_up", (N, D // 2), "int8", "input w_up must be uint8 [40, 16], got int8 [40, 16]"),
    ("int4_g32", "w_gate", (N, D), "uint8", "input w_gate must be uint8 [40, 16], got uint8 [40, 32]"),
    (
        "int4_g32",
        "w_up",
        (N, 24),
        "uint8",
        "input w_up must have a multiple of 16 columns with weights int4_g32, got uint8 [40, 24]",
    ),
    ("int4_g32", "s_down", (N,), "float16", "input s_down must be float16 [40, 1], got float16 [40]"),
    ("int4_g32", "s_down", (N, 2), "float16", "input s_down must be float16 [40, 1], got float16 [40, 2]"),
    ("int4_g32", "s_up", (N, 1), "float32", "input s_up must be float16 [40, 1], got float32 [40, 1]"),
)
"""(Weights, role, shape and dtype of a wrong tensor, the error)."""
WRONG_ATTRIBUTES: tuple[tuple[dict[str, str], str], ...] = (
    ({"activation": "swish"}, "attribute activation must be one of silu, gelu"),
    ({"score": ""}, "attribute score must be one of predictor, gate, exact, all, got ''"),
    ({"weights": "int2"}, "attribute weights must be one of float, int8_row, int4_g32, got 'int2'"),
    ({"weights": "int8_row"}, "inputs must hold s_gate"),
    ({"weights": "int4_g32"}, "inputs must hold s_gate"),
    ({"score": "all"}, "inputs must not hold tau"),
    ({"score": "exact"}, "inputs must not hold tau"),
    ({"inputs": "w_gate w_up w_down tau p2 p1"}, "attribute inputs must name roles in the order"),
    ({"inputs": "w_gate w_up w_down tau p1 p3"}, "attribute inputs must name roles in the order"),
    ({"inputs": "w_gate w_up w_down tau p1 p1 p2"}, "attribute inputs must name roles in the order"),
    ({"inputs": "w_up w_down tau p1 p2"}, "attribute inputs must name every input after x, got 7 inputs"),
    ({"inputs": "w_gate w_down tau p1 p2"}, "inputs must hold w_up"),
    ({"inputs": ""}, "attribute inputs must name roles in the order"),
)
"""(Change of a node's attributes, the error)."""


def broken() -> Iterator[Broken]:
    """Broken inputs and what they must give."""
    yield from _wrong()
    yield from _odd_values()


def _float() -> tuple[Variant, Tensors]:
    variant = make_variant()
    return variant, make_tensors(variant, D, N, R) | {"tau": np.zeros(N, np.float32)}


def _wrong() -> Iterator[Broken]:
    x = np.zeros((1, D), np.float32)
    made = {
        w: make_variant(weights=w, bias=True, res=w == "float", p="float32" if w == "float" else "int8")
        for w in ("float", "int8_row", "int4_g32")
    }
    for weights, role, shape, dtype, text in WRONG_TENSORS:
        variant = made[weights]
        tensors = make_tensors(variant, D, N, R) | {"tau": np.zeros(N, np.float32)} | {role: np.zeros(shape, dtype)}
        what = f"{weights} {role} {dtype}{list(shape)}"
        yield Broken(f"constant {what}", variant, tensors, x, message(OP, text), early=True)
        yield Broken(f"fed {what}", variant, tensors, x, message(OP, text), fed=(role,))
    variant, tensors = _float()
    for change, text in WRONG_ATTRIBUTES:
        yield Broken(
            f"attributes {change}",
            variant,
            tensors,
            x,
            message(OP, text),
            attributes={**variant.attributes(), **change},
            early=True,
        )
    yield Broken(
        "no attributes",
        variant,
        tensors,
        x,
        message(OP, "attribute activation must be one of"),
        attributes={},
        early=True,
    )
    for role in variant.inputs:
        left = tuple(r for r in variant.inputs if r != role)
        yield Broken(
            f"no {role}",
            variant,
            tensors,
            x,
            message(OP, "attribute inputs must name every input after x, got 6 inputs"),
            inputs=left,
            early=True,
        )
    wide = ("w_gate", "w_up", "w_down", "p1")
    for width in (D + 1, D - 1, 0):
        text = f"input x must be float32 [..., 32], got float32 [1, {width}]"
        yield Broken(
            f"x of width {width}", variant, tensors, np.zeros((1, width), np.float32), message(OP, text), fed=wide
        )
    text = "input x must be float32 [..., 32], got float32 []"
    yield Broken(
        "x without dimensions", variant, tensors, np.zeros((), np.float32), message(OP, text), x_rank=0, fed=wide
    )
    for shape in ((0, D), (3, 0, D), (0, 0, D)):
        empty = lambda y, _, shape=shape: "" if y.shape == shape else f"y has shape {y.shape}"  # noqa: E731
        yield Broken(
            f"no tokens {shape}", variant, tensors, np.zeros(shape, np.float32), judge=empty, x_rank=len(shape)
        )


def _odd_values() -> Iterator[Broken]:
    tokens = np.arange(9)
    for weights, score, p in itertools.product(
        ("float", "int8_row", "int4_g32"), ("predictor", "gate", "exact", "all"), ("float32", "int8")
    ):
        if p == "int8" and score != "predictor":
            continue
        variant = make_variant("relu" if score == "exact" else "silu", score, weights, bias=True, p=p)
        kind = f"{weights} {score} p={p}"
        x = make_x(variant, (9, D))
        tensors = with_tau(variant, x, make_tensors(variant, D, N, R), 0.5)
        for value in (np.nan, np.inf, -np.inf):
            bad = x.copy()
            bad[2, 5] = value
            yield Broken(f"{kind} x {value}", variant, tensors, bad, judge=documented(OP, variant, bad, tensors))
            yield Broken(
                f"{kind} x {value} others",
                variant,
                tensors,
                bad,
                judge=others_untouched(bad, tensors, x, tensors, tokens != 2),
            )
        for value in (3e38, 1e-38, 1e-44):
            bad = x.copy()
            bad[2] = value
            yield Broken(
                f"{kind} x {value} others",
                variant,
                tensors,
                bad,
                judge=others_untouched(bad, tensors, x, tensors, tokens != 2),
            )
        zero = np.zeros_like(x)
        yield Broken(f"{kind} x 0", variant, tensors, zero, judge=documented(OP, variant, zero, tensors))
        if "tau" in tensors:
            for value in (np.nan, np.inf, -np.inf, 3e38, -3e38):
                changed = {**tensors, "tau": tensors["tau"].copy()}
                changed["tau"][3:30] = value
                yield Broken(f"{kind} tau {value}", variant, changed, x, judge=documented(OP, variant, x, changed))
            keep = active(variant, x, tensors, integer=True)
            row = int(np.flatnonzero(keep.any(0) & ~keep.all(0))[0])
            skipped = ("w_up", "w_down") if score == "gate" else ("w_gate", "w_up", "w_down")
            for role, value in itertools.product(
                skipped if weights == "float" else ["s" + r[1:] for r in skipped], (np.nan, np.inf)
            ):
                changed = {**tensors, role: tensors[role].copy()}
                changed[role][row] = value
                yield Broken(
                    f"{kind} {role} {value} others",
                    variant,
                    changed,
                    x,
                    judge=others_untouched(x, changed, x, tensors, ~keep[:, row]),
                )
                spoiled = lambda y, _, keep=keep, row=row: (  # noqa: E731
                    "" if (~np.isfinite(y)).any(1)[keep[:, row]].all() else "the damage is not seen"
                )
                yield Broken(f"{kind} {role} {value} seen", variant, changed, x, judge=spoiled)
        if weights != "float":
            for role, value in itertools.product(("s_gate", "s_up", "s_down"), (0.0, -1.0)):
                changed = {**tensors, role: tensors[role] * tensors[role].dtype.type(value)}
                yield Broken(
                    f"{kind} {role} times {value}", variant, changed, x, judge=documented(OP, variant, x, changed)
                )
            extreme = {
                r: np.full_like(v, {"int8_row": -128, "int4_g32": 0}[weights]) if r[0] == "w" else v
                for r, v in tensors.items()
            }
            extreme["tau"] = tensors.get("tau", np.zeros(N, np.float32))
            extreme = {r: v for r, v in extreme.items() if r in variant.inputs}
            yield Broken(f"{kind} smallest integers", variant, extreme, x, judge=documented(OP, variant, x, extreme))

"""Cases of SparseLinear."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np

from sparsegate.runtime_onnx.ops import sparse_linear as OP
from sparsegate.runtime_onnx.ops.quantisation import quantise
from sparsegate.runtime_onnx.ops.sparse_linear import FLOATS, ROLES, Variant, active

from .breaking import Broken, documented, message, others_untouched
from .case import ISAS, KEEP, STORED, TOKENS, Case, Row, formats, pairwise
from .rounding import between
from .sessions import Tensors

SIZES = ((547, 683), (331, 288), (1100, 96), (31, 32), (64, 7), (130, 2080))
"""(d_in, d_out): tails in both, several blocks of channels, several strips of columns, enough bytes for threads in
some.
"""


def make_variant(weights: str = "float", *, bias: bool = False, x: str = "float32", w: str = "float32") -> Variant:
    """The variant with just the roles it needs."""
    roles = {"w", "tau"} | ({"b"} if bias else set()) | ({"s_w"} if weights != "float" else set())
    return Variant(weights, tuple(role for role in ROLES if role in roles), x, w)


def make_tensors(variant: Variant, d_in: int, d_out: int, seed: int = 0) -> Tensors:
    """Random tensors of unit-scale products, without tau."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((d_in, d_out)) / d_in**0.5
    out: Tensors = {"w": w.astype(variant.w)}
    if variant.weights != "float":
        out["w"], out["s_w"] = quantise(w, variant.weights)
    if "b" in variant.inputs:
        out["b"] = (rng.standard_normal(d_out) / 2).astype(np.float32)
    return out


def make_x(variant: Variant, shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    """Random x of the variant's dtype."""
    return np.random.default_rng(seed).standard_normal(shape).astype(variant.x)


def with_tau(variant: Variant, x: np.ndarray, tensors: Tensors, keep: float | str, seed: int = 2) -> Tensors:
    """Adds a tau that keeps about this share of the (token, channel) pairs, or one channel; every |x| lies off the
    threshold, or a tie on both of its sides.
    """
    size = np.abs(x.astype(np.float64)).reshape(-1, x.shape[-1])
    tokens, d_in = size.shape
    if keep == "one":
        kept = np.where(np.arange(d_in) == size[0].argmax(), tokens, 0)
    else:
        kept = np.random.default_rng(seed).binomial(tokens, keep, d_in)
    return {**tensors, "tau": between(size, kept)}


def make(case: Case, pool: int) -> tuple[np.ndarray, Tensors]:
    """x [pool, d_in] and tensors of a case."""
    x = make_x(case.variant, (pool, case.sizes[0]), case.seed + 1)
    return x, with_tau(case.variant, x, make_tensors(case.variant, *case.sizes, case.seed), case.keep, case.seed + 2)


def expected(variant: Variant, x: np.ndarray, tensors: Tensors) -> np.ndarray:
    """What the CPU's kernel computes, in float64."""
    return OP.emulate(variant, x, tensors)


def float_activations(variant: Variant, x: np.ndarray, tensors: Tensors) -> np.ndarray:
    """The same without rounding of activations."""
    return OP.reference(variant, x, tensors)


def nothing(variant: Variant, x: np.ndarray, tensors: Tensors) -> np.ndarray | None:
    """y bit for bit where nothing is kept; None where something is."""
    if active(variant, x, tensors).any():
        return None
    width = expected(variant, x[:1], tensors).shape[-1]
    return (
        np.broadcast_to(tensors.get("b", np.zeros(1, np.float32)), (len(x), width)).astype(variant.x).astype(np.float32)
    )


def without_one(variant: Variant, x: np.ndarray, tensors: Tensors) -> np.ndarray | None:
    """What is expected without the kept channel of upper-quartile contribution, the negative control of every bound;
    None if nothing contributes.
    """
    kept = np.where(active(variant, x, tensors), x.astype(np.float64).reshape(-1, x.shape[-1]), 0)
    size = np.sqrt((kept**2).sum(0))
    used = np.flatnonzero(size)
    if not used.size:
        return None
    role = "w" if variant.weights == "float" else "s_w"
    w = tensors[role].copy()
    w[used[np.argsort(size[used])[used.size * 3 // 4]]] = 0
    return expected(variant, x, {**tensors, role: w})


def possible(row: Row) -> bool:
    """Whether a row of the axes below makes a case."""
    return row["stored"] != "int4_g32" or row["sizes"][1] % 32 == 0


VARIANT_AXES: dict[str, tuple] = {"stored": STORED, "x": FLOATS, "bias": (False, True)}
RUN_AXES: dict[str, tuple] = {"tokens": TOKENS, "keep": KEEP, "sizes": SIZES, "isa": ISAS}


def variant_of(row: Row) -> Variant:
    """The variant that a row of the axes spells."""
    weights, w = formats(row["stored"])
    return make_variant(weights, bias=row["bias"], x=row["x"], w=w)


def case_of(row: Row, seed: int) -> Case:
    """The case that a row of the axes spells."""
    return Case(variant_of(row), row["sizes"], row["tokens"], row["keep"], row["isa"], seed)


SAMPLED = tuple(case_of(row, 100 + i) for i, row in enumerate(pairwise({**VARIANT_AXES, **RUN_AXES}, possible)))
"""Every pair of two axes' values."""


def rows_of_variants() -> Iterator[Row]:
    """All variants, as rows without the axes of a run."""
    return (dict(zip(VARIANT_AXES, values, strict=True)) for values in itertools.product(*VARIANT_AXES.values()))


def every_case() -> Iterator[Case]:
    """Every variant with every number of tokens, each at a random choice of the run's other axes."""
    rng = random.Random(1)
    for i, (row, tokens) in enumerate(itertools.product(list(rows_of_variants()), TOKENS)):
        while not possible(full := {**row, **{k: rng.choice(v) for k, v in RUN_AXES.items()}, "tokens": tokens}):
            pass
        yield case_of(full, 10_000 + i)


def grid() -> Iterator[tuple[str, str, Variant]]:
    """(Row, column, variant) of the table of support."""
    for row in rows_of_variants():
        yield f"{row['stored']} x={row['x']}", "bias" if row["bias"] else "no bias", variant_of(row)


def names() -> Iterator[Variant]:
    """Every variant of the grid."""
    return (variant_of(row) for row in rows_of_variants())


D_IN, D_OUT = 24, 64
WRONG_TENSORS: tuple[tuple[str, str, tuple[int, ...], str, str], ...] = (
    ("float", "w", (24,), "float32", "input w must be float32, float16 or bfloat16 [d_in, d_out], got float32 [24]"),
    (
        "float",
        "w",
        (0, 64),
        "float32",
        "input w must be float32, float16 or bfloat16 [d_in, d_out], got float32 [0, 64]",
    ),
    (
        "float",
        "w",
        (24, 0),
        "float32",
        "input w must be float32, float16 or bfloat16 [d_in, d_out], got float32 [24, 0]",
    ),
    ("float", "w", (24, 64), "int8", "input w must be float32, float16 or bfloat16 [d_in, d_out], got int8 [24, 64]"),
    (
        "float",
        "w",
        (24, 64),
        "float64",
        "input w must be float32, float16 or bfloat16 [d_in, d_out], got float64 [24, 64]",
    ),
    ("float", "tau", (1,), "float32", "input tau must be float32 [24], got float32 [1]"),
    ("float", "tau", (24,), "float16", "input tau must be float32 [24], got float16 [24]"),
    ("float", "tau", (24, 1), "float32", "input tau must be float32 [24], got float32 [24, 1]"),
    ("float", "b", (24,), "float32", "input b must be float32 [64], got float32 [24]"),
    ("int8_row", "w", (24, 64), "uint8", "input w must be int8 [d_in, d_out], got uint8 [24, 64]"),
    ("int8_row", "s_w", (24,), "float16", "input s_w must be float32 [24], got float16 [24]"),
    ("int8_row", "s_w", (64,), "float32", "input s_w must be float32 [24], got float32 [64]"),
    ("int4_g32", "w", (24, 32), "int8", "input w must be uint8 [d_in, d_out / 2], got int8 [24, 32]"),
    (
        "int4_g32",
        "w",
        (24, 24),
        "uint8",
        "input w must have a multiple of 16 columns with weights int4_g32, got uint8 [24, 24]",
    ),
    ("int4_g32", "s_w", (24,), "float16", "input s_w must be float16 [24, 2], got float16 [24]"),
    ("int4_g32", "s_w", (24, 3), "float16", "input s_w must be float16 [24, 2], got float16 [24, 3]"),
    ("int4_g32", "s_w", (24, 2), "float32", "input s_w must be float16 [24, 2], got float32 [24, 2]"),
)
"""(Weights, role, shape and dtype of a wrong tensor, the error)."""
WRONG_ATTRIBUTES: tuple[tuple[dict[str, str], str], ...] = (
    ({"weights": "int2"}, "attribute weights must be one of float, int8_row, int4_g32, got 'int2'"),
    ({"weights": "int8_row"}, "inputs must hold s_w with weights int8_row"),
    ({"weights": "int4_g32"}, "inputs must hold s_w with weights int4_g32"),
    ({"inputs": "w b"}, "inputs must hold tau"),
    ({"inputs": "b w tau"}, "attribute inputs must name roles in the order w, s_w, b, tau"),
    ({"inputs": "w tau"}, "attribute inputs must name every input after x, got 4 inputs"),
    ({"inputs": ""}, "attribute inputs must name roles in the order"),
)
"""(Change of a node's attributes, the error)."""


def broken() -> Iterator[Broken]:
    """Broken inputs and what they must give."""
    yield from _wrong()
    yield from _odd_values()


def _wrong() -> Iterator[Broken]:
    x = np.zeros((1, D_IN), np.float32)
    for weights, role, shape, dtype, text in WRONG_TENSORS:
        variant = make_variant(weights, bias=True)
        tensors = (
            make_tensors(variant, D_IN, D_OUT) | {"tau": np.zeros(D_IN, np.float32)} | {role: np.zeros(shape, dtype)}
        )
        what = f"{weights} {role} {dtype}{list(shape)}"
        yield Broken(f"constant {what}", variant, tensors, x, message(OP, text), early=True)
        yield Broken(f"fed {what}", variant, tensors, x, message(OP, text), fed=(role,))
    variant = make_variant(bias=True)
    tensors = make_tensors(variant, D_IN, D_OUT) | {"tau": np.zeros(D_IN, np.float32)}
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
        "no attributes", variant, tensors, x, message(OP, "attribute weights must be one of"), attributes={}, early=True
    )
    for role in variant.inputs:
        left = tuple(r for r in variant.inputs if r != role)
        yield Broken(
            f"no {role}",
            variant,
            tensors,
            x,
            message(OP, "attribute inputs must name every input after x, got 3 inputs"),
            inputs=left,
            early=True,
        )
    for width in (D_IN + 1, D_IN - 1, 0):
        text = f"input x must be float32 [..., 24], got float32 [1, {width}]"
        yield Broken(f"x of width {width}", variant, tensors, np.zeros((1, width), np.float32), message(OP, text))
    text = "input x must be float32 [..., 24], got float32 []"
    yield Broken("x without dimensions", variant, tensors, np.zeros((), np.float32), message(OP, text), x_rank=0)
    for shape in ((0, D_IN), (3, 0, D_IN), (0, 0, D_IN)):
        empty = lambda y, _, shape=shape: "" if y.shape == (*shape[:-1], D_OUT) else f"y has shape {y.shape}"  # noqa: E731
        yield Broken(
            f"no tokens {shape}", variant, tensors, np.zeros(shape, np.float32), judge=empty, x_rank=len(shape)
        )


def _odd_values() -> Iterator[Broken]:
    tokens = np.arange(9)
    for weights in ("float", "int8_row", "int4_g32"):
        variant = make_variant(weights, bias=True)
        x = make_x(variant, (9, D_IN))
        tensors = with_tau(variant, x, make_tensors(variant, D_IN, D_OUT), 0.5)
        for value in (np.nan, np.inf, -np.inf):
            bad = x.copy()
            bad[2, 5] = value
            yield Broken(f"{weights} x {value}", variant, tensors, bad, judge=documented(OP, variant, bad, tensors))
            yield Broken(
                f"{weights} x {value} others",
                variant,
                tensors,
                bad,
                judge=others_untouched(bad, tensors, x, tensors, tokens != 2),
            )
        for value in (3e38, 1e-38, 1e-44):
            bad = x.copy()
            bad[2] = value
            yield Broken(
                f"{weights} x {value} others",
                variant,
                tensors,
                bad,
                judge=others_untouched(bad, tensors, x, tensors, tokens != 2),
            )
        for value in (np.nan, np.inf, -np.inf, 3e38, -3e38):
            changed = {**tensors, "tau": tensors["tau"].copy()}
            changed["tau"][3:20] = value
            yield Broken(f"{weights} tau {value}", variant, changed, x, judge=documented(OP, variant, x, changed))
        keep = active(variant, x, tensors)
        row = int(np.flatnonzero(keep.any(0) & ~keep.all(0))[0])
        role = "w" if weights == "float" else "s_w"
        for value in (np.nan, np.inf):
            changed = {**tensors, role: tensors[role].copy()}
            changed[role][row] = value
            yield Broken(
                f"{weights} {role} {value} others",
                variant,
                changed,
                x,
                judge=others_untouched(x, changed, x, tensors, ~keep[:, row]),
            )
            spoiled = lambda y, _, keep=keep, row=row: (  # noqa: E731
                "" if (~np.isfinite(y)).any(1)[keep[:, row]].all() else "the damage is not seen"
            )
            yield Broken(f"{weights} {role} {value} seen", variant, changed, x, judge=spoiled)
        if weights != "float":
            extreme = {**tensors, "w": np.full_like(tensors["w"], {"int8_row": -128, "int4_g32": 0}[weights])}
            yield Broken(f"{weights} smallest integers", variant, extreme, x, judge=documented(OP, variant, x, extreme))

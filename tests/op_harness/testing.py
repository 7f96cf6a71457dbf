"""Mode test: kernels against the float64 reference by the bounds of their op, and what must not change a result by one
bit.

For float weights the reference is the op's own; for integer weights or predictor its emulation of the kernels'
arithmetic, and the error against activations that are not rounded is stated beside it. The same bound must refuse the
reference with one kept unit dropped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsegate.runtime_onnx.ops.margins import settled

from . import cases_of
from .case import ISAS, Case
from .sessions import forced_isa, has_isa, make_model, nmse, open_model, run

STEPS = (1, 2, 3, 5, 7, 64)
LARGEST_ROUNDING = 1e-3
"""Of the NMSE that int8 activations cost against float32 ones, at the same selection."""


@dataclass(frozen=True)
class Result:
    """What one case gave: NMSEs (`rounding` against activations that are not rounded), and `compared`, the share of the
    drawn tokens that is.
    """

    case: Case
    error: float
    bound: float
    control: float | None
    rounding: float | None
    compared: float
    problems: tuple[str, ...]


def bound_of(op, variant) -> float:
    """Largest NMSE of a variant's kernel."""
    return max(op.BOUNDS[variant.x], op.BOUNDS["int8_row"] if integer(variant) else 0.0)


def integer(variant) -> bool:
    """Whether the CPU's kernel rounds activations somewhere."""
    return variant.weights != "float" or getattr(variant, "p", "") == "int8"


def draw(stem: str, case: Case) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    """x [tokens, ...] of settled tokens only, the tensors, and the share of tokens that were settled."""
    cases = cases_of(stem)
    x, tensors = cases.make(
        case, 2 * case.tokens + 24
    )  # of the widest integer cases more than a third lies near some boundary
    good = settled(case.variant, x, tensors)
    return x[good][: case.tokens], tensors, float(good.mean())


def check(stem: str, case: Case) -> Result:
    """Runs one case on its build of the kernels."""
    cases = cases_of(stem)
    variant, op = case.variant, cases.OP
    x, tensors, share = draw(stem, case)
    problems = []
    if len(x) < case.tokens:
        return Result(
            case,
            float("nan"),
            bound_of(op, variant),
            None,
            None,
            share,
            (f"only {len(x)} of {case.tokens} tokens are settled",),
        )
    model = make_model(op, variant, tensors, body=False)
    session = open_model(model)
    with forced_isa(case.isa):
        y = run(session, x)
        for step in [STEPS[case.seed % 6], STEPS[(case.seed + 1) % 6]] if case.tokens >= 12 else [1]:
            if step < case.tokens:
                parts = np.concatenate([run(session, x[i : i + step]) for i in range(0, len(x), step)])
                if not np.array_equal(parts, y):
                    problems.append(f"calls of {step} tokens give other bits")
        if not np.array_equal(run(open_model(model, threads=1), x), y):
            problems.append("one thread gives other bits")
    if not integer(variant) and case.isa.startswith("avx"):
        for isa in (name for name in ISAS if name.startswith("avx") and name != case.isa and has_isa(name)):
            with forced_isa(isa):
                if not np.array_equal(run(session, x), y):
                    problems.append(f"{isa} gives other bits")
    expected = cases.expected(variant, x, tensors)
    error, bound = nmse(y, expected), bound_of(op, variant)
    if not error <= bound:
        problems.append(f"NMSE {error:.1e} is above {bound:.1e}")
    if y.shape != expected.shape:
        problems.append(f"y has shape {y.shape}")
    if nmse(y, y.astype(variant.x).astype(np.float64)) != 0:
        problems.append(f"y is not {variant.x}")
    empty = cases.nothing(variant, x, tensors)
    if empty is not None and not np.array_equal(y, empty):
        problems.append("nothing is kept, but y is not the bias")
    dropped = cases.without_one(variant, x, tensors)
    control = None if dropped is None else nmse(y, dropped)
    if control is not None and not control > bound:
        problems.append(f"a dropped unit is not seen: NMSE {control:.1e}")
    rounding = None
    if integer(variant):
        rounding = nmse(expected, cases.float_activations(variant, x, tensors))
        if not rounding < LARGEST_ROUNDING:
            problems.append(f"rounded activations cost {rounding:.1e}")
    return Result(case, error, bound, control, rounding, share, tuple(problems))


def main(ops: Sequence[str], isas: Sequence[str], full: bool) -> int:
    """Prints one line per case and, per format, the worst figures; 1 if a case fails."""
    failed = 0
    for stem in ops:
        cases = cases_of(stem)
        results = []
        for case in cases.every_case() if full else cases.SAMPLED:
            if case.isa not in isas or not has_isa(case.isa):
                continue
            results.append(result := check(stem, case))
            failed += bool(result.problems)
            numbers = [f"nmse {result.error:.1e} <= {result.bound:.1e}"]
            numbers += [f"one dropped {result.control:.1e}"] if result.control is not None else []
            numbers += [f"rounded activations {result.rounding:.1e}"] if result.rounding is not None else []
            print("FAIL" if result.problems else "ok  ", case.name, ", ".join((*numbers, *result.problems)))
        for key in sorted({(r.case.variant.weights, r.case.variant.x) for r in results}):
            rows = [r for r in results if (r.case.variant.weights, r.case.variant.x) == key]
            rounding = max((r.rounding for r in rows if r.rounding is not None), default=None)
            more = "" if rounding is None else f", activations in float32 differ by at most {rounding:.1e}"
            print(f"{stem} {key[0]} x={key[1]}: {len(rows)} cases, worst NMSE {max(r.error for r in rows):.1e}{more}")
    print(f"{failed} failed" if failed else "all passed", file=sys.stderr)
    return int(failed > 0)

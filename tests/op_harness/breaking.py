"""Mode break: broken input gives an error that names it, or the documented result; never a crash.

The inputs run in processes of their own, so that one that dies is seen: its input is named and the others go on in the
next.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import CASES, cases_of
from .case import ISAS
from .sessions import NODE, Tensors, forced_isa, has_isa, make_model, open_model, run

CONTROL = "control"
"""Name of an input that kills its process: the negative control of this mode."""


@dataclass(frozen=True)
class Broken:
    """One broken input of an op.

    Attributes:
        name: Unique among the op's.
        variant: The node's variant.
        tensors: By role, complete.
        x: Token rows.
        error: Pattern that the error's message must hold, found by search; None: there is a result, which `judge` looks
        at.
        fed: Roles that are graph inputs; their errors come with the run, those of constants when the session is made.
        attributes: In place of the variant's.
        inputs: Roles of the node in place of the variant's.
        judge: (y, clean) -> what is wrong, "" if nothing; clean(x, tensors) runs another input of the same variant.
        x_rank: Declared rank of x.
        early: The error comes when the session is made.
    """

    name: str
    variant: Any
    tensors: Tensors
    x: np.ndarray
    error: str | None = None
    fed: tuple[str, ...] = ()
    attributes: Mapping[str, str] | None = None
    inputs: tuple[str, ...] | None = None
    judge: Callable[[np.ndarray, Callable[[np.ndarray, Tensors], np.ndarray]], str] | None = None
    x_rank: int = 2
    early: bool = False


def message(op: Any, text: str) -> str:
    """Pattern of an error of the library, whose message starts with `text` behind the op's and the node's name."""
    return re.escape(f"{op.NAME} {NODE}: {text}")


def same_numbers(y: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> str:
    """What differs: NaN and infinities must stand in the same places, numbers agree."""
    if y.shape != expected.shape:
        return f"shape {y.shape}, expected {expected.shape}"
    finite = np.isfinite(expected)
    if not np.array_equal(np.isfinite(y), finite):
        return (
            f"{(np.isfinite(y) != finite).sum()} of {y.size} numbers are finite and must not be, or the other way round"
        )
    scale = np.sqrt((expected[finite] ** 2).mean()) if finite.any() else 1.0
    worst = np.abs(y[finite] - expected[finite]).max(initial=0)
    return (
        "" if worst <= tolerance * max(scale, 1e-30) else f"differs by {worst:.1e} where numbers are about {scale:.1e}"
    )


def documented(op: Any, variant: Any, x: np.ndarray, tensors: Tensors) -> Callable:
    """Judge: the op's own emulation is the result, NaN and infinities included."""

    def judge(y: np.ndarray, _clean: Callable) -> str:
        with np.errstate(all="ignore"):
            return same_numbers(y, op.emulate(variant, x, tensors))

    return judge


def others_untouched(
    x: np.ndarray, tensors: Tensors, clean_x: np.ndarray, clean_tensors: Tensors, tokens: np.ndarray
) -> Callable:
    """Judge: these tokens (bool [T]) have the bits that they have without the damage."""

    def judge(y: np.ndarray, clean: Callable) -> str:
        good = clean(clean_x, clean_tensors)
        return "" if np.array_equal(y[tokens], good[tokens]) else "a token changed that must not"

    return judge


def attempt(stem: str, broken: Broken) -> str:
    """Runs one input; "" or what is wrong with the outcome."""
    op = cases_of(stem).OP

    def clean(x: np.ndarray, tensors: Tensors) -> np.ndarray:
        return run(open_model(make_model(op, broken.variant, tensors)), x)

    model = make_model(
        op,
        broken.variant,
        broken.tensors,
        x_rank=broken.x_rank,
        fed=broken.fed,
        attributes=broken.attributes,
        inputs=broken.inputs,
    )
    try:
        session = open_model(model)
        if broken.error and broken.early:
            return f"a session, expected the error {broken.error}"
        y = run(session, broken.x, **{role: broken.tensors[role] for role in broken.fed})
    except Exception as error:  # noqa: BLE001 ORT raises many types
        text = str(error)
        return (
            ""
            if broken.error and re.search(broken.error, text)
            else f"error {text[:400]!r}, expected {broken.error or 'a result'}"
        )
    if broken.error:
        return f"a result, expected the error {broken.error}"
    return broken.judge(y, clean) if broken.judge else ""


def inside(stem: str, isa: str, names: Sequence[str]) -> None:
    """The child process: one JSON line before and one after every input."""
    if CONTROL in names:
        print(json.dumps({"start": CONTROL}), flush=True)
        os.abort()
    inputs = {broken.name: broken for broken in cases_of(stem).broken()}
    with forced_isa(isa):
        for name in names:
            print(json.dumps({"start": name}), flush=True)
            print(json.dumps({"name": name, "problem": attempt(stem, inputs[name])}), flush=True)


def survive(stem: str, isa: str, names: Sequence[str] | None = None) -> dict[str, str]:
    """Runs an op's broken inputs (by default all) in child processes; returns name -> what is wrong, "" if nothing."""
    left = [broken.name for broken in cases_of(stem).broken()] if names is None else list(names)
    found: dict[str, str] = {}
    while left:
        code = f"from {__name__} import inside; inside({stem!r}, {isa!r}, {left!r})"
        path = Path(__file__).parents[1 if __name__.startswith("op_harness") else 2]
        child = subprocess.run(
            [sys.executable, "-c", code], cwd=path, capture_output=True, text=True, timeout=300, check=False
        )
        lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
        started = [line["start"] for line in lines if "start" in line]
        found |= {line["name"]: line["problem"] for line in lines if "name" in line}
        if child.returncode:
            if not started:
                raise RuntimeError(f"The child process must start, got exit {child.returncode}: {child.stderr[-2000:]}")
            if started[-1] not in found:
                found[started[-1]] = f"the process died with exit status {child.returncode}: {child.stderr[-300:]}"
        left = [name for name in left if name not in found]
    return found


def main(ops: Sequence[str], isas: Sequence[str], full: bool) -> int:
    """Prints one line per op and build and one per problem; 1 if there is a problem, or if a crash is not seen."""
    bad = 0
    if "died" not in survive(next(iter(CASES)), "portable", [CONTROL])[CONTROL]:
        print("a crash in a child process is not seen")
        bad = 1
    for stem in ops:
        for isa in (isa for isa in ISAS if isa in isas and has_isa(isa)):
            found = survive(stem, isa)
            problems = {name: problem for name, problem in found.items() if problem}
            bad += len(problems)
            print(f"{stem} {isa}: {len(found)} broken inputs, {len(problems)} problems")
            for name, problem in problems.items():
                print(f"  {name}: {problem}")
    return int(bad > 0)

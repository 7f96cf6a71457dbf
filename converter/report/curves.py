"""Quality against density and cost of many methods on one model: the stored JSON (`Curves`), its tables, and methods
compared at equal cost.

A row whose score sees a label or the future is an oracle: marked in every table, kept out of every ranking, drawn
dashed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from ...runtime_onnx.errors import InputError
from ..checkpoint.fields import Strict
from ..evaluation.records import Machine, Record, read_stored
from .tables import ABSENT, Cells, Number, nats, percent, table

CURVES = "report/curves.json"
"""The place of curves in a checkpoint folder, where they were measured for it."""
VALUES = ("nll", "kl", "agreement", "density", "cost", "block_cost")
_EPSILON = 1e-9  # of a cost: .7 and .3 + .4 are the same place
COSTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


class Point(Strict):
    """One method at one target density, with one seed where it has any.

    `nll` and `kl` (dense to sparse) in nats per token, `agreement` of the argmax, `density` the realised share of kept
    units, `cost` the bytes touched per token relative to the dense MLPs and `block_cost` relative to all linear maps of
    the blocks, predictors included; `rank` of the predictor.
    """

    method: str
    density_target: float = Field(gt=0, le=1)
    seed: int | None = None
    nll: float
    kl: float
    agreement: float = Field(ge=0, le=1)
    density: float = Field(ge=0, le=1)
    cost: float = Field(ge=0)
    block_cost: float | None = Field(default=None, ge=0)
    rank: int | None = None
    oracle: bool = False
    note: str = ""


class Correlations(Strict):
    """Spearman rank correlations [S, S] of neuron scores, averaged over tokens and layers; `oracles` names the scores
    that see a label.
    """

    scores: list[str]
    matrix: list[list[float]]
    oracles: list[str] = []
    note: str = ""

    @model_validator(mode="after")
    def _check(self) -> Correlations:
        matrix = np.asarray(self.matrix, dtype=float) if len({len(row) for row in self.matrix}) <= 1 else np.zeros(0)
        if matrix.shape != (len(self.scores),) * 2:
            raise ValueError(f"the matrix must be square over {len(self.scores)} scores")
        if (
            not np.allclose(matrix, matrix.T, atol=1e-6)
            or not np.allclose(np.diag(matrix), 1, atol=1e-6)
            or np.abs(matrix).max(initial=0) > 1 + 1e-6
        ):
            raise ValueError("correlations must be symmetric, within [-1, 1] and 1 on the diagonal")
        if set(self.oracles) - set(self.scores):
            raise ValueError(f"oracles must be among the scores, got {sorted(set(self.oracles) - set(self.scores))}")
        return self


class Curves(Record):
    """All methods at several densities on one model and text of `tokens` tokens; exactly one row is the
    dense model's.
    """

    version: Literal[1] = 1
    model: str
    tokens: int
    machine: Machine
    versions: dict[str, str]
    command: str
    commit: str | None = None
    date: str
    rows: list[Point]
    correlations: Correlations | None = None

    @model_validator(mode="after")
    def _check(self) -> Curves:
        if sum(row.method == "dense" for row in self.rows) != 1:
            raise ValueError("rows must hold exactly one of the method dense")
        if self.dense.oracle:
            raise ValueError("the dense row is no oracle")
        places = [(row.method, row.density_target, row.seed) for row in self.rows]
        twice = sorted({f"{place[0]} at {place[1]}" for place in places if places.count(place) > 1})
        if twice:
            raise ValueError(f"a method must stand once at a density and seed, got {', '.join(twice)} again")
        for method in {row.method for row in self.rows}:
            kinds = {row.oracle for row in self.rows if row.method == method}
            if len(kinds) > 1 or (method.startswith("oracle") and kinds != {True}):
                raise ValueError(f"{method} must be an oracle in all of its rows or in none")
        return self

    @property
    def dense(self) -> Point:
        """The baseline's row."""
        return next(row for row in self.rows if row.method == "dense")

    @property
    def densities(self) -> list[float]:
        """Target densities, the largest first."""
        return sorted({row.density_target for row in self.rows if row.method != "dense"}, reverse=True)

    def methods(self, oracle: bool | None = None) -> list[str]:
        """Methods in the order of their first rows, without dense; only oracles, or only others, when asked."""
        return list(
            dict.fromkeys(row.method for row in self.rows if row.method != "dense" and oracle in (None, row.oracle))
        )

    @classmethod
    def load(cls, path: Path) -> Curves:
        """Read curves. Raises InputError when the file is missing or has another form."""
        return read_stored(cls, path, "The curves", "Measure them again.")


@dataclass(frozen=True)
class Summary:
    """A method at a target density over its seeds: mean of every value that all seeds have, and their sample standard
    deviation (0 for one seed).
    """

    method: str
    density_target: float
    oracle: bool
    seeds: int
    mean: dict[str, float]
    spread: dict[str, float]
    ranks: tuple[int, ...]
    note: str


def summarise(curves: Curves, method: str, seed: int | None = None) -> list[Summary]:
    """One Summary per target density of a method, the largest first; of one seed's rows when `seed` is given. Raises
    InputError for an unknown method.
    """
    rows = [row for row in curves.rows if row.method == method and seed in (None, row.seed)]
    if not rows:
        raise InputError(
            f"method must be one of {', '.join(['dense', *curves.methods()])} with rows of seed {seed}, got "
            f"{method!r}. Measure it first."
        )
    summaries = []
    for target in sorted({row.density_target for row in rows}, reverse=True):
        here = [row for row in rows if row.density_target == target]
        values = {name: [getattr(row, name) for row in here] for name in VALUES}
        values = {name: column for name, column in values.items() if None not in column}
        summaries.append(
            Summary(
                method,
                target,
                here[0].oracle,
                len(here),
                {name: fmean(column) for name, column in values.items()},
                {name: stdev(column) if len(column) > 1 else 0.0 for name, column in values.items()},
                tuple(sorted({row.rank for row in here if row.rank is not None})),
                "; ".join(dict.fromkeys(row.note for row in here if row.note)),
            )
        )
    return summaries


def at_cost(
    curves: Curves, method: str, cost: float, value: str = "nll", seed: int | None = None, over: str = "cost"
) -> float:
    """A method's value at a cost, linear between its measured points (means over seeds, or one seed's); `over` may be
    block_cost or density instead.

    Raises InputError outside the measured costs: nothing is extrapolated.
    """
    points = [point for point in summarise(curves, method, seed) if over in point.mean and value in point.mean]
    if not points:
        raise InputError(f"{method} must have {over} and {value} in its rows, got none. Measure them.")
    costs = np.array([point.mean[over] for point in points])
    order = costs.argsort(kind="stable")
    costs, values = costs[order], np.array([point.mean[value] for point in points])[order]
    if not costs[0] - _EPSILON <= cost <= costs[-1] + _EPSILON:
        raise InputError(
            f"{over} must lie within {costs[0]:.4f} and {costs[-1]:.4f}, where {method} was measured, got {cost}. "
            "Measure more densities."
        )
    return float(np.interp(cost, costs, values))


def ranking(curves: Curves, target: float, value: str = "nll") -> list[Summary]:
    """The methods at a target density, the best first. Oracles are never in it."""
    measured = [
        point
        for name in curves.methods(oracle=False)
        for point in summarise(curves, name)
        if point.density_target == target and value in point.mean
    ]
    return sorted(measured, key=lambda point: -point.mean[value] if value == "agreement" else point.mean[value])


def best_at_cost(curves: Curves, cost: float, value: str = "nll", over: str = "cost") -> str | None:
    """The deployable method that is best at a cost, or None where none was measured around it."""
    values = {
        name: at for name in curves.methods(oracle=False) if (at := _at(curves, name, cost, value, over)) is not None
    }
    if not values:
        return None
    return max(values, key=values.__getitem__) if value == "agreement" else min(values, key=values.__getitem__)


def _at(curves: Curves, method: str, cost: float, value: str, over: str) -> float | None:
    try:
        return at_cost(curves, method, cost, value, over=over)
    except InputError:
        return None


def curves_cells(curves: Curves) -> Cells:
    """Every method at every target density, dense first, then by density; within a density the best NLL first and
    oracles, marked, after all methods.
    """
    blocks = any(row.block_cost is not None for row in curves.rows)
    ranks, notes = any(row.rank is not None for row in curves.rows), any(row.note for row in curves.rows)
    header = ["method", "target", "NLL", "KL to dense", "agreement", "density", "cost"]
    header += ["block cost"] * blocks + ["rank"] * ranks + ["seeds"] + ["note"] * notes
    oracles = [point for name in curves.methods(oracle=True) for point in summarise(curves, name)]
    points = summarise(curves, "dense")
    for target in curves.densities:
        points += ranking(curves, target)
        points += sorted(
            (point for point in oracles if point.density_target == target), key=lambda point: point.mean["nll"]
        )
    body = []
    for point in points:
        target = ABSENT if point.method == "dense" else percent(point.density_target)
        cells = [_label(point.method, point.oracle), target]
        for name in VALUES if blocks else VALUES[:-1]:
            cells.append(_cell(point, name))
        if ranks:
            cells.append(
                "..".join(map(str, dict.fromkeys((point.ranks[0], point.ranks[-1])))) if point.ranks else ABSENT
            )
        body.append([*cells, Number(str(point.seeds), point.seeds), *([point.note] if notes else [])])
    return header, body


def curves_table(curves: Curves) -> str:
    """`curves_cells` as Markdown."""
    return table(curves_cells(curves))


def summary_cells(curves: Curves, value: str = "nll", oracle: bool = False) -> Cells:
    """One value with target densities as columns: dense first, then every method, or every oracle."""
    body = [["dense", *(_cell(summarise(curves, "dense")[0], value) for _ in curves.densities)]]
    for name in curves.methods(oracle):
        points = {point.density_target: point for point in summarise(curves, name)}
        body.append(
            [
                _label(name, oracle),
                *(_cell(points[target], value) if target in points else ABSENT for target in curves.densities),
            ]
        )
    return ["method", *(f"density {target:.2g}" for target in curves.densities)], body


def cost_cells(curves: Curves, value: str = "nll", over: str = "cost", costs: tuple[float, ...] = COSTS) -> Cells:
    """One value of the deployable methods at equal costs, interpolated; a dash where a method was not measured around
    that cost.
    """
    show: Callable[[float], str] = nats if value in ("nll", "kl") else percent
    columns = [cost for cost in costs if best_at_cost(curves, cost, value, over)]
    body = [["dense", *(show(getattr(curves.dense, value)) for _ in columns)]]
    for name in curves.methods(oracle=False):
        row = [_at(curves, name, cost, value, over) for cost in columns]
        if any(at is not None for at in row):
            body.append([name, *(ABSENT if at is None else show(at) for at in row)])
    return ["method", *(f"{over.replace('_', ' ')} {cost:.2g}" for cost in columns)], body


def correlation_cells(correlations: Correlations) -> Cells:
    """The matrix with its scores as rows and columns."""
    names = [_label(name, name in correlations.oracles) for name in correlations.scores]
    body = [
        [name, *(Number(f"{value:.2f}", value) for value in row)]
        for name, row in zip(names, correlations.matrix, strict=True)
    ]
    return ["score", *names], body


def curves_page(curves: Curves, plot: str | None = None) -> str:
    """A Markdown page: the summary, methods at equal cost, oracles apart, all rows, correlations, and how it was
    measured. `plot` is a link to the picture.
    """
    parts = [
        f"# Quality against density: {curves.model}",
        f"All methods on the same {curves.tokens} held-out tokens. Density is the share of units kept, cost the bytes "
        "touched per token relative to the dense "
        "MLPs, predictors included; NLL and KL in nats per token. Several seeds: mean ± sample standard deviation. "
        "An oracle sees the label or the future: it cannot be deployed and stands in no ranking.",
        *([f"![NLL and KL over density and cost]({plot})"] if plot else []),
        "## NLL at a target density",
        table(summary_cells(curves)),
        "## NLL at equal cost",
        "Linear between measured points; a dash where a method was not measured around that cost.",
        table(cost_cells(curves)),
    ]
    if any(row.block_cost is not None for row in curves.rows):
        parts += [
            "The same, with cost over all linear maps of the blocks:",
            table(cost_cells(curves, over="block_cost")),
        ]
    if curves.methods(oracle=True):
        parts += ["## Oracles", table(summary_cells(curves, oracle=True))]
    parts += ["## All rows", curves_table(curves)]
    if curves.correlations is not None:
        note = f" {curves.correlations.note}" if curves.correlations.note else ""
        parts += [
            "## Rank correlations of the scores",
            f"Spearman.{note}",
            table(correlation_cells(curves.correlations)),
        ]
    parts += ["## How it was measured", conditions(curves)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def conditions(curves: Curves) -> str:
    """Command, machine and versions as a Markdown list."""
    commit = f", commit `{curves.commit}`" if curves.commit else ""
    versions = ", ".join(f"{name} {version}" for name, version in curves.versions.items())
    return (
        f"- Command: `{curves.command}` on {curves.date}{commit}\n- Machine: {curves.machine.cpu}, "
        f"{curves.machine.cores} cores, {curves.machine.os}\n"
        f"- Versions: {versions}\n"
    )


def _label(method: str, oracle: bool) -> str:
    return f"{method} (oracle)" if oracle and "oracle" not in method else method


def _cell(point: Summary, name: str) -> str:
    value = point.mean.get(name)
    if value is None:
        return ABSENT
    exact = name in ("nll", "kl")
    text = nats(value, small=name == "kl") if exact else percent(value)
    spread = point.spread[name]
    if point.seeds == 1 or math.isclose(spread, 0, abs_tol=1e-12):
        return text
    return Number(f"{value:.4f} ± {spread:.4f}" if exact else f"{100 * value:.1f} ± {100 * spread:.1f} %", value)

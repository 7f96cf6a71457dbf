"""The page of all methods is made from its JSON, the table is whole, and what the page says of one method against
another holds in the rows.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from pages.curves_page import CHEAP, OURS, PAGE, comparisons, half_cells, load, page, verdict
from sparsegate.converter.report.curves import Curves

DENSITIES = (0.7, 0.5, 0.4, 0.3, 0.2)
DEPLOYABLE = (
    "gate",
    "chess",
    "cett",
    "teal",
    "teal MLP",
    "wina",
    "wina MLP",
    "gate + teal attention",
    "chess + teal attention",
)
TRAINED = {CHEAP: (0, 1, 2), OURS: (0, 1, 2), "gate end to end": (0, 1, 2)}
ORACLES = ("magnitude", "abs_z", "corrected_gxo", "gxo", "snip", "fisher")
CURVES, PROMPT = load()
TEXT = PAGE.read_text(encoding="utf-8")


def curve(method: str, seed: int | None, over: str, value: str) -> tuple[np.ndarray, np.ndarray]:
    """A method's costs and values, sorted by cost."""
    points = sorted(
        (getattr(row, over), getattr(row, value)) for row in CURVES.rows if row.method == method and row.seed == seed
    )
    return np.array([place for place, _ in points]), np.array([found for _, found in points])


def at(method: str, seed: int | None, where: float, over: str, value: str) -> float | None:
    """Linear between the two neighbours; None outside."""
    places, values = curve(method, seed, over, value)
    right = int(np.searchsorted(places, where))
    if len(places) == 0 or not places[0] <= where <= places[-1]:
        return None
    if right == 0:
        return float(values[0])
    part = (where - places[right - 1]) / (places[right] - places[right - 1])
    return float(values[right - 1] + part * (values[right] - values[right - 1]))


def compared(ours: str, other: str, over: str, value: str = "nll") -> dict[float, bool]:
    """Target density -> whether every seed of ours loses less than the other at the same place, by the loop above."""
    found: dict[float, bool] = {}
    seeds = {row.seed for row in CURVES.rows if row.method == other}
    for row in (row for row in CURVES.rows if row.method == ours):
        reached = at(other, row.seed if row.seed in seeds else None, getattr(row, over), over, value)
        if reached is not None:
            found[row.density_target] = found.get(row.density_target, True) and getattr(row, value) < reached
    return found


def test_page_is_that_of_the_stored_results() -> None:
    assert page(CURVES, PROMPT) == TEXT, "run python tests/bench/pages/curves_page.py"
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT):
        assert (PAGE.parent / picture).stat().st_size > 10_000
    changed = CURVES.model_copy(
        update={
            "rows": [
                row.model_copy(update={"nll": row.nll + 0.001}) if row.method == "gate" else row for row in CURVES.rows
            ]
        }
    )
    assert page(changed, PROMPT) != TEXT


def test_every_method_stands_at_every_density() -> None:
    expected = {name: (None,) for name in (*DEPLOYABLE, *ORACLES)} | TRAINED
    for method, seeds in expected.items():
        places = {(row.density_target, row.seed) for row in CURVES.rows if row.method == method}
        assert places >= {(density, seed) for density in DENSITIES for seed in seeds}, method
    assert set(CURVES.methods(oracle=True)) >= set(ORACLES)
    assert not set(CURVES.methods(oracle=True)) & {*DEPLOYABLE, *TRAINED}
    assert CURVES.tokens == 64 * 255


@pytest.mark.parametrize("method", (*DEPLOYABLE, *TRAINED))
def test_realised_density_is_near_its_target(method: str) -> None:
    for row in CURVES.rows:
        if row.method == method and row.density_target in DENSITIES:
            assert row.density == pytest.approx(row.density_target, abs=0.06), row


def test_comparisons_hold_in_the_rows() -> None:
    section = comparisons(CURVES)
    assert section in TEXT
    claims = re.findall(r"### ([^\n]+)\n(.*?)(?=\n### |\Z)", section, flags=re.DOTALL)
    checked = 0
    for heading, body in claims:
        ours = heading.partition(" against ")[0]
        for other, place, kl, rest in re.findall(r"Against (.+?) at equal (cost|density)(, in KL)?: (.*)", body):
            found = compared(ours, other, place, "kl" if kl else "nll")
            assert found, (ours, other)
            if "**loses less**" in rest:
                assert all(found.values()), (ours, other, found)
            elif "**none**" in rest:
                assert not any(found.values()), (ours, other, found)
            else:
                better, worse = rest.split("**not** at ")
                assert {float(t) for t in re.findall(r"\d\.\d+", better)} == {t for t, less in found.items() if less}
                assert {float(t) for t in re.findall(r"\d\.\d+", worse)} == {t for t, less in found.items() if not less}
            checked += 1
    assert checked >= 10


def test_verdicts_follow_the_rows() -> None:
    assert "**loses less** at" in verdict(CURVES, "chess", "cett")
    swapped = {"chess": "cett", "cett": "chess"}
    turned = Curves.model_validate(
        CURVES.model_dump()
        | {"rows": [row.model_dump() | {"method": swapped.get(row.method, row.method)} for row in CURVES.rows]}
    )
    assert "**none**" in verdict(turned, "chess", "cett")


def test_oracles_stand_in_no_ranking() -> None:
    assert not {row[0].removesuffix(" (oracle)") for row in half_cells(CURVES)[1]} & set(CURVES.methods(oracle=True))
    for line in TEXT.splitlines():
        name = line.split("|")[1].strip() if line.startswith("| ") else ""
        assert name not in CURVES.methods(oracle=True), line


def test_where_no_cost_is_common_both_cost_and_loss_are_less() -> None:
    (targets,) = re.findall(r"- At ([\d., ]+), where no cost is common to both", TEXT)
    for target in map(float, targets.split(", ")):
        ours, cheap = (
            [row for row in CURVES.rows if row.method == name and row.density_target == target]
            for name in (OURS, CHEAP)
        )
        assert len(ours) == len(cheap) == 3
        assert max(row.cost for row in ours) < min(row.cost for row in cheap) and max(row.nll for row in ours) < min(
            row.nll for row in cheap
        )

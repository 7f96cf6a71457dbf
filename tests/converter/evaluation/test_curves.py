"""Curves and the HTML page: golden tables, interpolation by hand, oracles out of every ranking, every stored number on
the page, hostile names escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from stored_results import EVALUATION
from test_report import REPORT

from sparsegate.converter import report as reporting
from sparsegate.converter.checkpoint.manifest import Manifest, check_files, list_files, read_manifest, write_manifest
from sparsegate.converter.report.curves import cost_cells, summarise
from sparsegate.runtime_onnx.errors import InputError


def row(method: str, target: float, nll: float, cost: float, **more: Any) -> dict[str, Any]:
    base = {
        "method": method,
        "density_target": target,
        "nll": nll,
        "kl": nll - 2.0,
        "agreement": 3 - nll,
        "density": target + 0.01,
        "cost": cost,
    }
    return base | more


CURVES: dict[str, Any] = {
    "model": "small",
    "tokens": 640,
    "machine": REPORT["machine"],
    "versions": {"torch": "2.13.0"},
    "command": "python curves.py",
    "date": "2026-01-02",
    "rows": [
        row("dense", 1.0, 2.0, 1.0, density=1.0, block_cost=1.0),
        row("gate", 0.5, 2.2, 0.67, block_cost=0.76),
        row("gate", 0.3, 2.6, 0.53, block_cost=0.66),
        row("predictor", 0.5, 2.30, 0.6, seed=0, rank=16, block_cost=0.7),
        row("predictor", 0.5, 2.34, 0.6, seed=1, rank=16, block_cost=0.7),
        row("predictor", 0.3, 2.4, 0.4, seed=0, rank=16, block_cost=0.55, note="few steps"),
        row("predictor", 0.3, 2.5, 0.4, seed=1, rank=16, block_cost=0.55, note="few steps"),
        row("magnitude", 0.5, 2.05, 0.5, oracle=True),
        row("magnitude", 0.3, 2.1, 0.3, oracle=True),
    ],
    "correlations": {
        "scores": ["gate", "magnitude"],
        "matrix": [[1.0, 0.25], [0.25, 1.0]],
        "oracles": ["magnitude"],
        "note": "512 tokens.",
    },
}


def make_curves(**changes: Any) -> reporting.Curves:
    return reporting.Curves.model_validate({**json.loads(json.dumps(CURVES)), **changes})


TABLE = """\
| method | target | NLL | KL to dense | agreement | density | cost | block cost | rank | seeds | note |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| dense | - | 2.0000 | 0.0000 | 100.0 % | 100.0 % | 100.0 % | 100.0 % | - | 1 |  |
| gate | 50.0 % | 2.2000 | 0.2000 | 80.0 % | 51.0 % | 67.0 % | 76.0 % | - | 1 |  |
| predictor | 50.0 % | 2.3200 ± 0.0283 | 0.3200 ± 0.0283 | 68.0 ± 2.8 % | 51.0 % | 60.0 % | 70.0 % | 16 | 2 |  |
| magnitude (oracle) | 50.0 % | 2.0500 | 0.0500 | 95.0 % | 51.0 % | 50.0 % | - | - | 1 |  |
| predictor | 30.0 % | 2.4500 ± 0.0707 | 0.4500 ± 0.0707 | 55.0 ± 7.1 % | 31.0 % | 40.0 % | 55.0 % | 16 | 2 | few steps |
| gate | 30.0 % | 2.6000 | 0.6000 | 40.0 % | 31.0 % | 53.0 % | 66.0 % | - | 1 |  |
| magnitude (oracle) | 30.0 % | 2.1000 | 0.1000 | 90.0 % | 31.0 % | 30.0 % | - | - | 1 |  |
"""  # noqa: E501


def test_table_has_dense_first_methods_ranked_and_oracles_marked() -> None:
    assert reporting.curves_table(make_curves()) == TABLE
    plain = reporting.curves_table(
        make_curves(
            rows=[{k: v for k, v in r.items() if k not in ("block_cost", "rank", "note")} for r in CURVES["rows"]]
        )
    )
    assert plain.splitlines()[0] == "| method | target | NLL | KL to dense | agreement | density | cost | seeds |"


def test_values_at_equal_cost_are_interpolated_and_never_extrapolated() -> None:
    curves = make_curves()
    assert reporting.at_cost(curves, "gate", 0.6) == pytest.approx(
        2.6 + (0.6 - 0.53) / (0.67 - 0.53) * (2.2 - 2.6), abs=1e-12
    )
    assert reporting.at_cost(curves, "predictor", 0.45) == pytest.approx(2.45 + 0.25 * (2.32 - 2.45), abs=1e-12)
    assert reporting.at_cost(curves, "predictor", 0.45, seed=1) == pytest.approx(2.5 + 0.25 * (2.34 - 2.5), abs=1e-12)
    assert reporting.at_cost(curves, "predictor", 0.45, "agreement", seed=0) == pytest.approx(
        0.6 + 0.25 * 0.1, abs=1e-12
    )
    assert reporting.at_cost(curves, "gate", 0.71, over="block_cost") == pytest.approx(2.4, abs=1e-12)
    assert reporting.at_cost(curves, "gate", 0.67) == 2.2 and reporting.at_cost(curves, "gate", 0.53) == 2.6
    for cost in (0.5, 0.7):
        with pytest.raises(InputError, match=r"cost must lie within 0\.5300 and 0\.6700"):
            reporting.at_cost(curves, "gate", cost)
    with pytest.raises(InputError, match="must be one of dense, gate, predictor, magnitude"):
        reporting.at_cost(curves, "gte", 0.5)
    with pytest.raises(InputError, match="must have block_cost"):
        reporting.at_cost(curves, "magnitude", 0.5, over="block_cost")
    header, body = cost_cells(curves)
    assert header == ["method", "cost 0.4", "cost 0.5", "cost 0.6"]
    assert body == [
        ["dense", "2.0000", "2.0000", "2.0000"],
        ["gate", "-", "-", "2.4000"],
        ["predictor", "2.4500", "2.3850", "2.3200"],
    ]


def test_spread_is_the_sample_standard_deviation_of_the_seeds() -> None:
    first, second = summarise(make_curves(), "predictor")
    assert (first.density_target, second.density_target, first.seeds) == (0.5, 0.3, 2)
    assert first.mean["nll"] == pytest.approx(2.32) and first.spread["nll"] == pytest.approx(0.04 / math.sqrt(2))
    assert second.note == "few steps" and first.ranks == (16,)


def test_oracles_are_never_selected() -> None:
    curves = make_curves()
    assert [point.method for point in reporting.ranking(curves, 0.3)] == ["predictor", "gate"]
    assert [point.method for point in reporting.ranking(curves, 0.5, "agreement")] == ["gate", "predictor"]
    assert reporting.best_at_cost(curves, 0.5) == "predictor"  # the oracle's NLL there is 2.05
    assert reporting.best_at_cost(curves, 0.6) == "predictor" and reporting.best_at_cost(curves, 0.65) == "gate"
    assert reporting.best_at_cost(curves, 0.3) is None
    alone = make_curves(rows=[r for r in CURVES["rows"] if r["method"] in ("dense", "magnitude")])
    assert reporting.ranking(alone, 0.5) == [] and reporting.best_at_cost(alone, 0.4) is None
    unmarked = make_curves(rows=[{**r, "oracle": False} for r in CURVES["rows"]])
    assert (
        reporting.ranking(unmarked, 0.3)[0].method == "magnitude"
        and reporting.best_at_cost(unmarked, 0.4) == "magnitude"
    )


ROWS = CURVES["rows"]


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        ({"rows": ROWS[1:]}, "exactly one"),
        ({"rows": [*ROWS, ROWS[0]]}, "exactly one"),
        ({"rows": [*ROWS, ROWS[1]]}, "gate at 0.5 again"),
        ({"rows": [*ROWS, row("magnitude", 0.2, 3.0, 0.2)]}, "magnitude must be an oracle in all"),
        ({"rows": [*ROWS, row("oracle-x", 0.2, 2.9, 0.2)]}, "oracle-x must be an oracle"),
        ({"rows": [*ROWS, row("chess", 0.2, float("nan"), 0.2, agreement=1)]}, "finite"),
        ({"rows": [*ROWS, row("chess", 20, 2.9, 0.2, density=0.2)]}, "less than or equal to 1"),
        ({"faster": True}, "Extra"),
        ({"version": 2}, "1"),
        ({"correlations": {"scores": ["a"], "matrix": [[1, 2], [3, 4]]}}, "square"),
        ({"correlations": {"scores": ["a", "b"], "matrix": [[1, 0.5], [0.4, 1]]}}, "symmetric"),
        (
            {"correlations": {"scores": ["a", "b"], "matrix": [[1, 0.5], [0.5, 1]], "oracles": ["c"]}},
            "among the scores",
        ),
    ],
)
def test_curves_that_say_too_much_are_refused(change: dict[str, Any], sign: str) -> None:
    make_curves()
    with pytest.raises(ValidationError, match=sign):
        reporting.Curves.model_validate({**CURVES, **change})


def test_curves_are_stored_and_read_back_and_drawn_alike(tmp_path: Path) -> None:
    curves = make_curves()
    curves.save(tmp_path / "curves.json")
    assert reporting.Curves.load(tmp_path / "curves.json") == curves
    with pytest.raises(InputError, match="The curves must be a file"):
        reporting.Curves.load(tmp_path / "none.json")
    first, second = (reporting.plot_curves(tmp_path / name, curves).read_bytes() for name in ("a.png", "b.png"))
    changed = make_curves(rows=[{**r, "nll": r["nll"] + 0.1 * (r["method"] == "gate")} for r in ROWS])
    assert first == second != reporting.plot_curves(tmp_path / "c.png", changed).read_bytes() and first.startswith(
        b"\x89PNG"
    )
    assert curves.correlations is not None
    assert reporting.plot_correlations(tmp_path / "d.png", curves.correlations).read_bytes().startswith(b"\x89PNG")


def test_page_of_curves_holds_every_part() -> None:
    page = reporting.curves_page(make_curves(commit="abc"), "curves.png")
    assert reporting.curves_table(make_curves()) in page and "![NLL and KL over density and cost](curves.png)" in page
    ranked = page.split("## Oracles")[0]
    assert "magnitude" not in ranked and "| magnitude (oracle) | 2.0500 | 2.1000 |" in page
    assert "| gate | 1.00 | 0.25 |" in page and "512 tokens." in page
    assert "- Command: `python curves.py` on 2026-01-02, commit `abc`" in page and "\n\n\n" not in page


# the HTML page

HOSTILE = "</h1><script>alert(1)</script>'\"&lt;"


class Page(HTMLParser):
    """Tags, visible text and the values of data elements with their texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.values, self.open = "", dict[str, set[str]](), list[str]()
        self.data: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "data":
            self.data = dict(attrs)["value"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "data":
            self.data = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.data is not None:
            self.values.setdefault(self.data, set()).add(data)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder with stored results, a large file that must not be read again, and its manifest."""
    (tmp_path / "report").mkdir()
    reporting.Report.model_validate({**REPORT, "model": HOSTILE}).save(tmp_path / reporting.RESULTS)
    reporting.Evaluation.model_validate(EVALUATION).save(tmp_path / reporting.EVALUATION)
    make_curves(model=HOSTILE).save(tmp_path / reporting.CURVES)
    (tmp_path / "weights").write_text("x")
    files = list_files(tmp_path)
    write_manifest(
        tmp_path,
        Manifest(
            fingerprint="f",
            source={},
            calibration={},
            recipe={},
            seed=0,
            budget={},
            measured={},
            versions={},
            files=files,
        ),
    )
    (tmp_path / "weights").write_text("y")
    return tmp_path


def test_html_is_well_formed_self_contained_and_escapes(folder: Path) -> None:
    page = Page(reporting.make_report(folder).read_text(encoding="utf-8"))
    assert page.open == [] and HOSTILE in page.text
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "a"} and sum(tag == "h1" for tag, _ in page.tags) == 1
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 4 and all(source and source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert {path.name for path in (folder / "report").glob("*.png")} == {
        "candidates.png",
        "layers.png",
        "curves.png",
        "correlations.png",
    }


def test_html_shows_every_stored_number(folder: Path) -> None:
    text = reporting.make_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    visible = Page(text.split("<details>")[0])
    for name in (reporting.RESULTS, reporting.EVALUATION, reporting.CURVES):
        for number in numbers(json.loads((folder / name).read_text())):
            assert repr(number) in page.text, (name, number)
    shown = {float(value) for value in visible.values}
    for part in (
        REPORT["rows"],
        REPORT["layers"],
        EVALUATION["site_density"],
        EVALUATION["sparsity"],
        EVALUATION["tasks"],
        CURVES["correlations"]["matrix"],
    ):
        for number in numbers(part):
            assert float(number) in shown, number
    assert (
        visible.values["0.3401"] == {"34.0 %"}
        and visible.values["54.89"] == {"54.89"}
        and "2.1000" in visible.values["2.1"]
    )
    means = {
        point.mean["nll"] for name in ("gate", "predictor", "magnitude") for point in summarise(make_curves(), name)
    }
    assert means <= shown
    assert "magnitude (oracle)" in visible.text and 'class="oracle"' in text and "not run: no library" in visible.text


def test_html_with_a_report_alone(folder: Path) -> None:
    (folder / reporting.EVALUATION).unlink()
    (folder / reporting.CURVES).unlink()
    written = reporting.render(folder)
    assert [path.name for path in written] == ["candidates.png", "layers.png", "index.html"]
    text = (folder / reporting.PAGE).read_text(encoding="utf-8")
    assert "Evaluation" not in text and "oracle)" not in text and Page(text).open == []


def test_report_rewrites_the_manifest_with_what_it_wrote_alone(folder: Path) -> None:
    before = read_manifest(folder)
    reporting.make_report(folder)
    after = read_manifest(folder)
    pictures = {f"report/{name}.png" for name in ("candidates", "layers", "curves", "correlations")}
    assert set(after.files) - set(before.files) == {"report/index.html", *pictures}
    assert check_files(folder, after) == ["weights has other bytes than the manifest says"]  # damage stays damage
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"manifest\.json"):
        reporting.make_report(folder)
    with pytest.raises(InputError, match="DIR must be a sparse checkpoint"):
        reporting.make_report(folder / "nothing")

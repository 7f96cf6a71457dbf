"""The verdict's rules case by case, and the picture and tables that stand below it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from test_report import REPORT, make_base, make_report, without_speed, write
from test_report_recovery import make as make_record

from sparsegate.converter import report as reporting
from sparsegate.converter.report import comparison, scatter, tables
from sparsegate.converter.report.change import Change, perplexity_change
from sparsegate.converter.report.verdict import make_verdict

SPEED = REPORT["speed"]
DENSE = {
    "method": "dense",
    "nll": 2.0,
    "perplexity": math.exp(2.0),
    "kl": 0,
    "agreement": 1,
    "density": 1,
    "cost": 1,
    "block_cost": 1,
    "read_share": 1,
    "prefill_tokens_per_second": 1000,
    "decode_tokens_per_second": 40.0,
}
GATE = {
    "method": "gate",
    "nll": 2.02,
    "perplexity": math.exp(2.02),
    "kl": 0.02,
    "nll_error": 0.003,
    "agreement": 0.9,
    "density": 0.5,
    "cost": 0.67,
    "block_cost": 0.76,
    "read_share": 0.8,
}
TIMED = {
    "prefill_tokens_per_second": 980.0,
    "decode_tokens_per_second": 56.0,
    "decode_ratio": 1.4,
    "prefill_ratio": 0.98,
    "selected": True,
}
INT8 = {
    "precision": "int8",
    "tokens": 2040,
    "nll_dense": 2.01,
    "nll": 2.011,
    "nll_error": 0.0004,
    "kl": 0.001,
    "agreement": 0.98,
    "bytes": 1000,
    "read_share": 0.27,
    "decode_ratio": 1.3,
    "prefill_ratio": 1.1,
    "pairs": 5,
}
INT4 = INT8 | {
    "precision": "int4",
    "nll": 2.09,
    "nll_error": 0.006,
    "kl": 0.07,
    "read_share": 0.15,
    "decode_ratio": 1.9,
}
ONNX = {
    "precision": "int4",
    "executor": "native kernel",
    "bytes": 1000,
    "tokens": 4096,
    "kl": 0.1,
    "agreement": 0.8,
    "cost": 0.7,
    "read_share": 0.12,
}


def report_of(chosen: dict[str, Any] | None = None, **changes: Any) -> reporting.Report:
    return make_report(rows=[DENSE, GATE | TIMED | (chosen or {})], **changes)


def onnx_rows(dense: float, sparse: float, error: float | None = 0.004) -> list[dict[str, Any]]:
    values = [
        ("dense", dense, {}),
        ("sparse", sparse, {"rise": sparse - dense, "rise_error": error, "nll_error": 0.01}),
    ]
    return [ONNX | {"model": model, "nll": nll, "perplexity": math.exp(nll)} | extra for model, nll, extra in values]


# The sentence


def test_faster_says_by_how_much_and_what_it_costs() -> None:
    verdict = make_verdict(report_of())
    assert (
        verdict.sentence
        == "Decodes 1.40 times as fast as the dense fp32 model on this machine, perplexity +2.0 % (± 0.3)."
    )
    assert (
        verdict.worth_it is True
        and verdict.decode_ratio == 1.4
        and verdict.baseline == "fp32"
        and verdict.better is None
    )
    assert verdict.change.value == pytest.approx(math.exp(0.02) - 1) and verdict.change.error == pytest.approx(
        math.exp(0.02) * 0.003
    )
    numbers = verdict.numbers()
    assert (
        numbers["perplexity_change"] == verdict.change.value
        and numbers["cost"] == 0.67
        and numbers["prefill_ratio"] == 0.98
    )


def test_slow_prompts_are_a_loss_that_is_named() -> None:
    assert (
        "on this machine, prompts at 0.68 of its speed; perplexity"
        in make_verdict(report_of({"prefill_ratio": 0.68})).sentence
    )
    medians = {"prefill_ratio": None, "prefill_tokens_per_second": 500}
    assert "prompts at 0.50 of its speed" in make_verdict(report_of(medians)).sentence, (
        "an old report has the two speeds alone"
    )
    assert "prompts" not in make_verdict(report_of({"prefill_ratio": None, "prefill_tokens_per_second": None})).sentence


@pytest.mark.parametrize(("ratio", "written"), [(0.998, "0.998"), (1.0, "1.00"), (1.004, "1.00"), (0.5, "0.50")])
def test_not_faster_is_not_worth_it(ratio: float, written: str) -> None:
    verdict = make_verdict(report_of({"decode_ratio": ratio}, references=[INT8 | {"decode_ratio": 3.0}]))
    assert verdict.worth_it is False and verdict.sentence.startswith(
        "Not worth it: not faster than the dense fp32 model on this machine, "
    )
    assert f"decodes at {written} of its speed; perplexity +2.0 % (± 0.3)." in verdict.sentence


def test_a_dense_model_of_fewer_bits_that_is_as_fast_and_loses_less_wins() -> None:
    verdict = make_verdict(report_of(references=[INT8 | {"decode_ratio": 1.75}, INT4]))
    assert verdict.worth_it is False and verdict.better == "dense int8", "int4 is faster still, and loses more"
    assert verdict.sentence == (
        "Not worth it: it decodes 1.40 times as fast as the dense fp32 model on this machine, perplexity +2.0 % (± "
        "0.3), but the dense int8 model decodes "
        "1.25 times as fast as this and loses less (perplexity +0.10 % (± 0.04))."
    )
    assert (
        "decodes as fast as this and loses less"
        in make_verdict(report_of(references=[INT8 | {"decode_ratio": 1.4}])).sentence
    )


@pytest.mark.parametrize(
    "reference",
    [
        INT8,  # slower
        INT4,  # loses more
        INT8 | {"decode_ratio": None, "prefill_ratio": None},  # not timed
        INT8 | {"decode_ratio": 1.9, "disturbed": True},
    ],
)
def test_other_references_do_not_win(reference: dict[str, Any]) -> None:
    verdict = make_verdict(report_of(references=[reference]))
    assert verdict.worth_it is True and verdict.better is None and "int" not in verdict.sentence


def test_integers_are_compared_with_the_dense_model_in_their_own_bits() -> None:
    speed, rows = SPEED | {"precision": "int4", "baseline": "int4"}, onnx_rows(2.09, 2.11)
    verdict = make_verdict(report_of(speed=speed, onnx=rows, references=[INT8 | {"decode_ratio": 9.0}, INT4]))
    assert (
        verdict.sentence
        == "Decodes 1.40 times as fast as the dense int4 model on this machine, perplexity +2.0 % (± 0.4)."
    )
    assert verdict.worth_it is True and verdict.baseline == "int4", "int8 has more bits"
    assert perplexity_change(2.11, 2.09, 0.004).error == verdict.change.error
    assert "perplexity +2.0 %." in make_verdict(report_of(speed=speed, onnx=onnx_rows(2.09, 2.11, None))).sentence


def test_a_model_in_int8_meets_dense_int4_through_fp32() -> None:
    speed = SPEED | {"precision": "int8", "baseline": "int8"}
    faster = INT4 | {"nll": 2.012, "decode_ratio": 1.9}  # sparse int8 is 1.4 * 1.3 = 1.82 times as fast as dense fp32
    verdict = make_verdict(report_of(speed=speed, onnx=onnx_rows(2.0, 2.02), references=[INT8, faster]))
    assert verdict.better == "dense int4" and "decodes 1.04 times as fast as this and loses less" in verdict.sentence
    assert (
        make_verdict(
            report_of(speed=speed, onnx=onnx_rows(2.0, 2.02), references=[INT8, faster | {"decode_ratio": 1.8}])
        ).worth_it
        is True
    )
    assert make_verdict(report_of(speed=speed, onnx=onnx_rows(2.0, 2.02), references=[faster])).worth_it is True, (
        "nothing says how fast int8 is"
    )


def test_half_precision_on_the_cpu_names_its_baseline() -> None:
    assert (
        "as fast as the dense fp32 model"
        in make_verdict(report_of(speed=SPEED | {"precision": "fp16", "baseline": "fp32"})).sentence
    )


def test_what_was_not_timed_claims_no_speed() -> None:
    verdict = make_verdict(make_report(**without_speed()))
    assert (
        verdict.sentence
        == "Reads 0.58 of the MLP's bytes per token, perplexity +22.1 % (± 0.5); speed was not measured."
    )
    assert verdict.worth_it is None and verdict.decode_ratio is None and verdict.baseline is None
    told = make_verdict(make_report(**without_speed(), speed_note="not run: no CUDA device was at hand"))
    assert told.sentence.endswith("speed was not measured (not run: no CUDA device was at hand).")
    assert "(±" not in make_verdict(make_report(**without_speed("gate"))).sentence, "an old report has no error"


def test_a_disturbed_measurement_says_so() -> None:
    verdict = make_verdict(report_of(speed=SPEED | {"disturbed": True}))
    assert verdict.worth_it is None and not verdict.sentence.startswith(("Decodes", "Not worth"))
    assert (
        "other load disturbed every pair of runs" in verdict.sentence
        and "not to be quoted" in verdict.sentence
        and "0.67 of the MLP's" in verdict.sentence
    )


def test_a_change_smaller_than_its_error() -> None:
    verdict = make_verdict(report_of({"nll_error": 0.03}))
    assert "perplexity unchanged within the measurement's error (+2.0 % (± 3.1))" in verdict.sentence


def test_trained_weights_name_what_they_are_compared_with() -> None:
    trained = make_verdict(report_of(), make_record())
    assert trained.sentence.endswith(
        "perplexity +2.0 % (± 0.3) against the dense model that it was trained from, with drelu for its activation."
    )
    swapped = make_verdict(report_of(swapped=True), make_record())
    assert (
        "as fast as its own dense fp32 graph on this machine" in swapped.sentence
        and "the dense fp32 model" not in swapped.sentence
    )
    assert (
        "against itself with nothing skipped, and +8.3 % against the dense model that it was trained from"
        in swapped.sentence
    )
    assert make_verdict(report_of(swapped=True)).sentence.endswith(
        "perplexity +2.0 % (± 0.3) against itself with nothing skipped."
    )
    assert make_verdict(report_of(swapped=True, references=[INT8 | {"decode_ratio": 9.0}])).worth_it is True, (
        "int8 of another function is no rival"
    )


def test_a_report_without_a_sparse_row() -> None:
    verdict = make_verdict(make_report(rows=[DENSE]))
    assert verdict.worth_it is None and verdict.sentence.startswith("Nothing is skipped")


@pytest.mark.parametrize(
    ("change", "said", "cell"),
    [
        (Change(0.021, 0.003), "+2.1 % (± 0.3)", "+2.1 ± 0.3 %"),
        (Change(-0.0001, 0.0004), "-0.01 % (± 0.04)", "-0.01 ± 0.04 %"),
        (Change(0.31, 0.12), "+31 % (± 12)", "+31 ± 12 %"),
        (Change(-1e-9, 0.002), "+0.0 % (± 0.2)", "+0.0 ± 0.2 %"),
        (Change(0.0, 0.0), "+0.0 % (± 0.0)", "+0.0 ± 0.0 %"),
        (Change(0.221), "+22.1 %", "+22.1 %"),
        (Change(0.0004), "+0.04 %", "+0.04 %"),
    ],
)
def test_how_a_change_is_written(change: Change, said: str, cell: str) -> None:
    assert str(change) == said and change.cell == cell


def test_a_model_that_lost_everything_has_a_finite_change() -> None:
    assert math.isfinite(perplexity_change(5000.0, 2.0).value) and len(perplexity_change(300.0, 2.0, 0.1).cell) < 30


# Where it stands


def test_card_and_page_begin_with_it(tmp_path: Path) -> None:
    report = report_of(references=[INT8, INT4])
    said = make_verdict(report).sentence
    reporting.plot_candidates(tmp_path / "out", report)
    _, card = write(tmp_path, report, make_base(tmp_path / "base"))
    body = card.split("\n---\n", 1)[1].strip()
    assert body.splitlines()[0] == f"**{said}**"
    assert (
        body.index("report/candidates.png")
        < body.index("| method |")
        < body.index(comparison.reference_table(report))
        < body.index("report/layers.png")
    )
    report.save(tmp_path / "out" / reporting.RESULTS)
    reporting.render(tmp_path / "out")
    page = (tmp_path / "out" / reporting.PAGE).read_text(encoding="utf-8")
    assert page.split("<body>")[1].strip().startswith(f'<p class="verdict">{said}</p>')
    assert (
        page.index("data:image/png") < page.index("<table>")
        and "overflow-x" not in page.split("</style>")[0].split("pre {")[0]
    ), "nothing scrolls sideways"


def test_tables_of_a_real_report_fit_a_hundred_columns() -> None:
    names = ("trained_gate", "predictor", "chess", "teal", "random")
    rows = [GATE | {"method": name, "nll": 6.7, "perplexity": math.exp(6.7), "nll_error": 0.02} for name in names]
    rows = [DENSE, *rows, GATE | TIMED | {"method": "predictor_residual"}]
    report = make_report(
        rows=rows,
        onnx=onnx_rows(2.09, 6.7),
        references=[INT8, INT4],
        speed=SPEED | {"precision": "int4", "baseline": "int4"},
    )
    for cells in (
        tables.quality_cells,
        tables.detail_cells,
        tables.speed_cells,
        tables.onnx_cells,
        tables.onnx_detail_cells,
        comparison.reference_cells,
    ):
        header, body = cells(report)
        assert len(header) <= 7 and {len(row) for row in body} == {len(header)}
        assert max(map(len, tables.table((header, body), "text").splitlines())) <= 100, header


def test_the_reference_table_puts_everything_beside_dense_fp32() -> None:
    report = report_of(references=[INT8, INT4 | {"disturbed": True}])
    assert comparison.reference_table(report, "text").splitlines()[2:] == [
        "dense               fp32               -       -  100.0 %           1.00",
        "dense               int8  +0.10 ± 0.04 %  0.0010   27.0 %           1.30",
        "dense               int4    +8.3 ± 0.6 %  0.0700   15.0 %              -",
        "gate (selected)     fp32    +2.0 ± 0.3 %  0.0200   80.0 %           1.40",
    ]
    speed = SPEED | {"precision": "int4", "baseline": "int4"}
    last = comparison.reference_cells(report_of(speed=speed, onnx=onnx_rows(2.09, 2.11), references=[INT4]))[1][-1]
    assert last == ["gate (selected)", "int4", "+11.6 ± 1.1 %", "0.1000", "12.0 %", "2.66"]


# The picture


def test_the_picture_holds_every_candidate_and_the_dense_models() -> None:
    rows = [DENSE, GATE | TIMED, GATE | {"method": "teal", "read_share": 0.7, "nll_error": None}]
    report = make_report(rows=rows, references=[INT8, INT4 | {"decode_ratio": None}])
    points = scatter.candidate_points(report)
    assert [point.label for point in points] == [
        "dense fp32, decodes 1.00×",
        "dense int8, decodes 1.30×",
        "dense int4",
        "gate (selected), decodes 1.40×",
        "teal",
    ]
    assert [point.share for point in points] == [1.0, 0.27, 0.15, 0.8, 0.7]
    assert points[3].selected and points[3].change.error and points[4].change.error is None
    panel = scatter.draw_candidates(points, report).axes[0]
    assert {point.label for point in points} == {text.get_text() for text in panel.texts}
    assert "dense fp32" in panel.get_xlabel() and "standard error" in panel.get_title(loc="left")


def test_the_picture_of_integers_has_the_file_as_it_is_shipped() -> None:
    report = report_of(
        speed=SPEED | {"precision": "int4", "baseline": "int4"}, onnx=onnx_rows(2.09, 2.11), references=[INT4]
    )
    points = scatter.candidate_points(report)
    assert [(point.name, point.share, point.selected) for point in points[2:]] == [
        ("gate", 0.8, False),
        ("gate int4 (selected)", 0.12, True),
    ]
    assert points[3].decode_ratio == pytest.approx(1.4 * 1.9) and points[3].change.value == pytest.approx(
        math.exp(0.11) - 1
    )


def test_the_picture_of_an_old_or_disturbed_report() -> None:
    old = scatter.candidate_points(make_report())
    assert [(point.name, point.share) for point in old] == [
        ("dense fp32", 1.0),
        ("gate", 0.6675),
        ("predictor (selected)", 0.58),
    ]
    disturbed = scatter.candidate_points(report_of(speed=SPEED | {"disturbed": True}))
    assert not [point for point in disturbed if point.decode_ratio is not None]
    assert (
        scatter.candidate_points(make_report(rows=[DENSE])) == []
        and scatter.candidate_points(report_of(swapped=True))[0].name == "ungated"
    )


def test_labels_keep_apart_and_in_the_picture() -> None:
    assert scatter.spread([0.2, 0.5, 0.9], 0.1) == pytest.approx([0.2, 0.5, 0.9])
    assert scatter.spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert scatter.spread([-0.3, 0.0], 0.25) == pytest.approx([0.0, 0.25])
    assert scatter.spread([1.0, 1.0], 0.25) == pytest.approx([0.75, 1.0])


# Stored


def test_old_reports_load_and_new_fields_are_checked() -> None:
    old = make_report()
    assert (
        old.references == []
        and old.rows[0].read_share is None
        and old.rows[0].nll_error is None
        and old.rows[0].prefill_ratio is None
    )
    for change in (
        {"references": [INT8, INT8]},
        {"references": [INT8 | {"precision": "fp8"}]},
        {"references": [INT8 | {"nll_error": -1}]},
    ):
        with pytest.raises(ValidationError):
            make_report(**change)

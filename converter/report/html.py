"""The HTML report: one page without scripts or links to other files, made from the JSON stored in a
checkpoint folder.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ...runtime_onnx.errors import InputError
from ..checkpoint.manifest import check_links, read_manifest
from ..evaluation.long_record import LongContext
from ..evaluation.records import EVALUATION, RESULTS, Evaluation, Report, record_files
from ..evaluation.recovery_record import RecoveryRecord
from .card import BaseCard, speed_sentence, write_card
from .comparison import reference_cells
from .curves import CURVES, Curves, correlation_cells, cost_cells, curves_cells, summary_cells
from .evaluation import answer_cells, executor_cells, site_cells, sparsity_cells, task_cells
from .long_context import long_sentence, long_tables
from .plots import (
    plot_candidates,
    plot_correlations,
    plot_curves,
    plot_layers,
    plot_positions,
    plot_recovery,
    plot_zeros,
)
from .recovery import before_after_cells, heldout_cells, spent_cells, zeros_cells
from .tables import (
    Cells,
    Number,
    check_cells,
    detail_cells,
    layer_cells,
    onnx_cells,
    onnx_detail_cells,
    quality_cells,
    speed_cells,
)
from .verdict import make_verdict, read_recovery

PAGE = "report/index.html"


@dataclass(frozen=True)
class Section:
    """A headed section of the page: text, pictures as data URIs, and tables; `plain` is shown as it is."""

    title: str
    text: str = ""
    pictures: tuple[tuple[str, str], ...] = ()
    tables: tuple[tuple[str, Cells], ...] = ()
    plain: str = ""
    folded: bool = False


def write_report(folder: Path, report: Report, source: BaseCard, repo_id: str | None = None) -> None:
    """Write all that is made from a report into a checkpoint folder: report/ with JSON, pictures and page, README.md
    and the licence files.
    """
    report.save(folder / RESULTS)
    render(folder)
    write_card(folder, report, source, repo_id)


def make_report(folder: str | Path) -> Path:
    """Write the HTML page and the pictures of a sparse checkpoint again, from its stored JSON, and its manifest last.
    Returns the page.

    Raises InputError when the folder is no finished checkpoint or its stored results have another form.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"DIR must be a sparse checkpoint, got nothing at {folder}. Check the path.")
    read_manifest(folder)
    check_links(folder)
    written = render(folder)
    record_files(folder, *(path.relative_to(folder).as_posix() for path in written))
    return folder / PAGE


def render(folder: Path) -> list[Path]:
    """Write the pictures and the page from report.json, and from recovery.json, eval.json and curves.json where they
    lie beside it; returns what it wrote.
    """
    report = Report.load(folder / RESULTS)
    evaluation = Evaluation.load(folder / EVALUATION) if (folder / EVALUATION).is_file() else None
    curves = Curves.load(folder / CURVES) if (folder / CURVES).is_file() else None
    recovery = read_recovery(folder)
    pictures: dict[str, Path] = {}
    candidates, layers = plot_candidates(folder, report), plot_layers(folder, report)
    if candidates is not None:
        pictures["candidates"] = candidates
    if layers is not None:
        pictures["layers"] = layers
    for name, draw in (("recovery", plot_recovery), ("zeros", plot_zeros)):
        drawn = draw(folder / "report" / f"{name}.png", recovery) if recovery is not None else None
        if drawn is not None:
            pictures[name] = drawn
    longs = {"positions": report.long, "positions_eval": None if evaluation is None else evaluation.long}
    for name, long in longs.items():
        if long is not None:
            pictures[name] = plot_positions(folder / "report" / f"{name}.png", long)
    if curves is not None:
        pictures["curves"] = plot_curves(folder / "report" / "curves.png", curves)
        if curves.correlations is not None:
            pictures["correlations"] = plot_correlations(folder / "report" / "correlations.png", curves.correlations)
    page = folder / PAGE
    page.write_text(html(report, evaluation, curves, pictures, recovery), encoding="utf-8")
    return [*pictures.values(), page]


def html(
    report: Report,
    evaluation: Evaluation | None,
    curves: Curves | None,
    pictures: dict[str, Path],
    recovery: RecoveryRecord | None = None,
) -> str:
    """The page's text; pictures by name (as `render` names them) go into it. A cell
    that shows a number carries it in full in its `data` element.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["exact"] = lambda cell: repr(cell.value) if isinstance(cell, Number) else None
    shown = {
        name: (name, "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode())
        for name, path in pictures.items()
    }
    sections = [
        *_conversion(report, shown),
        *(_recovery(recovery, shown) if recovery else ()),
        *(_evaluation(evaluation, shown) if evaluation else ()),
    ]
    sections += [*(_curves(curves, shown) if curves else ()), *_origin(report)]
    for name, stored in (
        ("report.json", report),
        ("recovery.json", recovery),
        ("eval.json", evaluation),
        ("curves.json", curves),
    ):
        if stored is not None:
            sections.append(
                Section(
                    name, plain=json.dumps(stored.model_dump(mode="json"), indent=1, ensure_ascii=False), folded=True
                )
            )
    template = environment.from_string((Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        report=report, chosen=report.chosen, verdict=make_verdict(report, recovery).sentence, sections=sections
    )


def _time(report: Report) -> str:
    return f" What its time budget decided: {'; '.join(report.time_notes)}." if report.time_notes else ""


def _conversion(report: Report, shown: dict[str, Any]) -> Iterator[Section]:
    against = "the model with nothing skipped" if report.swapped else "the dense model"
    tables = [
        ("", quality_cells(report)),
        *([("Beside dense models of fewer bits", reference_cells(report))] if report.references else ()),
    ]
    yield Section(
        "Quality and speed",
        f"Change is that of perplexity against {against}, ± the standard error of the paired difference where it was "
        "measured; KL to dense in nats per "
        "token; density is the mean share of units computed, cost the bytes that the MLPs touch per token relative to "
        "dense, predictors included, read those "
        f"of blocks and output head. {speed_sentence(report)}{_time(report)}",
        _pictures(shown, "candidates"),
        tuple(tables),
    )
    if report.onnx:
        yield Section(
            "As shipped",
            "What the ONNX files lose in their own precision, against the dense model in fp32.",
            tables=(("", onnx_cells(report)),),
        )
    more = [("", detail_cells(report)), *([("Speed", speed_cells(report))] if report.speed else ())]
    more += [("As shipped", onnx_detail_cells(report))] if report.onnx else []
    yield Section(
        "More of each model",
        "NLL in nats per token, and the standard error of its paired difference to dense; agreement is the share of "
        "positions with the dense model's most "
        "likely token, block cost the bytes of all linear maps of the blocks relative to dense, read that with the "
        "output head.",
        tables=tuple(more),
    )
    if report.long is not None:
        yield _long(report.long, "positions", shown)
    if report.layers:
        yield Section(
            "Per layer",
            "Density asked for, on held-out calibration tokens, and on the evaluation text; recall of the "
            "predictor against its labels.",
            _pictures(shown, "layers"),
            (("", layer_cells(report)),),
        )
    if report.checks:
        yield Section(
            "Checks", "Executors against each other, and the quality budget.", tables=(("", check_cells(report)),)
        )


def _recovery(record: RecoveryRecord, shown: dict[str, Any]) -> Iterator[Section]:
    tables = [("Before and after", before_after_cells(record)), ("What it took", spent_cells(record))]
    tables += [("Held-out text while training", heldout_cells(record))] if record.heldout else []
    tables += [("Exact zeros by site", zeros_cells(record))] if record.recovered.sites else []
    yield Section(
        "Recovery training",
        f"The networks' activation became {record.activation}, and the weights were trained. "
        f"{record.evaluation.tokens} tokens of "
        f"{record.evaluation.name or 'held-out text'}, the same for every row; the change is that of NLL, relative to "
        "dense. Density is the share of units "
        "whose product is not exactly zero, gate open that of units whose gate is not.",
        (*_pictures(shown, "recovery"), *_pictures(shown, "zeros")),
        tuple(tables),
        plain=yaml.safe_dump(record.settings, sort_keys=False, allow_unicode=True) if record.settings else "",
    )


def _long(long: LongContext, picture: str, shown: dict[str, Any]) -> Section:
    return Section("Long context", long_sentence(long), _pictures(shown, picture), long_tables(long))


def _evaluation(evaluation: Evaluation, shown: dict[str, Any]) -> Iterator[Section]:
    tables = [
        ("Held-out text", executor_cells(evaluation)),
        ("Greedy answers", answer_cells(evaluation)),
        ("Realised sparsity and cost", sparsity_cells(evaluation)),
    ]
    tables += [("By site", site_cells(evaluation))] + (
        [("lm-eval", task_cells(evaluation))] if evaluation.tasks else []
    )
    text, answers, machine = evaluation.text, evaluation.answers, evaluation.machine
    yield Section(
        "Evaluation",
        f"{text.tokens} tokens of {text.name}; {answers.prompts} prompts from {answers.name}, "
        f"{answers.prompt_tokens} tokens, "
        f"answered with at most {answers.max_new_tokens} tokens each. BLEU is sacrebleu's corpus BLEU of each "
        "answer against the dense model's own, mean "
        "over prompts. Sparsity counts the weights of masked sites only.",
        tables=tuple(tables),
        plain=f"{evaluation.command}\n{evaluation.date}, {machine.cpu}, {machine.cores} cores, {machine.os}",
    )
    if evaluation.long is not None:
        yield _long(evaluation.long, "positions_eval", shown)


def _curves(curves: Curves, shown: dict[str, Any]) -> Iterator[Section]:
    tables = [
        ("NLL at a target density", summary_cells(curves)),
        ("NLL at equal cost, linear between measured points", cost_cells(curves)),
    ]
    if curves.methods(oracle=True):
        tables.append(
            ("Oracles: they see the label or the future and cannot be deployed", summary_cells(curves, oracle=True))
        )
    yield Section(
        "All methods: quality against density and cost",
        f"{curves.model}, {curves.tokens} held-out tokens, the same for every row. Several seeds: mean ± sample "
        "standard deviation.",
        _pictures(shown, "curves"),
        (*tables, ("All rows", curves_cells(curves))),
        plain=f"{curves.command}\n{curves.date}, {curves.machine.cpu}, {curves.machine.cores} cores, "
        f"{curves.machine.os}",
    )
    if curves.correlations is not None:
        yield Section(
            "Rank correlations of the scores",
            f"Spearman. {curves.correlations.note}",
            _pictures(shown, "correlations"),
            (("", correlation_cells(curves.correlations)),),
        )


def _origin(report: Report) -> Iterator[Section]:
    machine = report.machine
    lines = [
        report.command,
        f"{report.date}, sparsegate {report.tool}, {machine.cpu}, {machine.cores} cores, {machine.os}",
        ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        f"calibration: {report.calibration.tokens} tokens of {report.calibration.name}, sha256 "
        f"{report.calibration.hash}",
    ]
    if report.evaluation is not None:
        lines.append(
            f"evaluation: {report.evaluation.tokens} tokens of {report.evaluation.name}, sha256 "
            f"{report.evaluation.hash}"
        )
    yield Section("How it was measured", plain="\n".join(lines))
    yield Section("Recipe", plain=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True))


def _pictures(shown: dict[str, Any], name: str) -> tuple[tuple[str, str], ...]:
    return (shown[name],) if name in shown else ()

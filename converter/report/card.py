"""The model card: README.md with the Hub's metadata, generated from a report and the base model's own card. It states
nothing that was not measured.
"""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData, constants
from huggingface_hub.repocard import metadata_load

from ...runtime_onnx.untrusted import is_data, read_json, regular
from ..evaluation.records import Report, Speed
from ..evaluation.recovery_record import RecoveryRecord
from .comparison import reference_table
from .long_context import long_sentence, position_cells
from .markdown import code, fenced, inline, target
from .plots import CANDIDATES
from .recovery import before_after_table, spent_table, zeros_table
from .tables import (
    check_table,
    detail_table,
    layer_table,
    onnx_detail_table,
    onnx_table,
    quality_table,
    ratio_text,
    speed_table,
    table,
)
from .verdict import make_verdict, read_recovery

TAGS = ("onnx", "onnxruntime", "onnxruntime-genai", "sparse", "activation-sparsity")
_LICENCE_FILES = re.compile(r"(licen[cs]e|notice|copying|use_policy)", re.IGNORECASE)

logger = logging.getLogger("sparsegate")


@dataclass(frozen=True)
class BaseCard:
    """What the card takes over from the base model: Hub id and commit, when it has them, licence, languages, and the
    files with the licence's text.
    """

    id: str | None = None
    revision: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


def read_base_card(folder: Path, id: str | None = None, revision: str | None = None) -> BaseCard:
    """Read a model folder's README.md front matter and find its licence files. A README without front matter, or none,
    gives a card without a licence.
    """
    readme = regular(folder / "README.md")
    try:
        metadata: dict[str, Any] = (metadata_load(readme) if readme.is_file() else None) or {}
    except (ValueError, yaml.YAMLError):
        logger.warning("The front matter of %s is no YAML mapping; the licence has to be filled in by hand.", readme)
        metadata = {}
    files = tuple(
        sorted(
            regular(path)
            for path in folder.iterdir()
            if path.is_file() and _LICENCE_FILES.match(path.name) and is_data(path.name)
        )
    )
    license, name, link = metadata.get("license"), metadata.get("license_name"), metadata.get("license_link")
    if license is None and files:
        license, name, link = "other", "license-of-the-base-model", files[0].name
    if link and "://" not in str(link) and str(link) not in {path.name for path in files}:
        link = f"{constants.ENDPOINT}/{id}/blob/{revision or 'main'}/{link}" if id else None
    language = [] if metadata.get("language") is None else metadata["language"]
    # YAML 1.1 reads the code of Norwegian as the boolean false
    codes = tuple(
        "no" if code is False else str(code) for code in (language if isinstance(language, list) else [language])
    )
    return BaseCard(
        id, revision, _text(license), _text(name), target(_text(link), tuple(path.name for path in files)), codes, files
    )


def write_card(folder: Path, report: Report, source: BaseCard, repo_id: str | None = None) -> Path:
    """Write `folder`/README.md and copy the base model's licence files beside it. Plots that lie in `folder`/report are
    shown, and the record of a recovery.

    `repo_id` is what the usage examples download; without it they name OWNER/NAME.
    """
    for path in source.files:
        if path.resolve() != (folder / path.name).resolve():
            shutil.copyfile(path, folder / path.name)
    recovery = read_recovery(folder)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"inline": inline, "code": code}
    template = environment.from_string((Path(__file__).parent / "card.md.jinja").read_text(encoding="utf-8"))
    body = template.render(
        **_facts(folder, report, recovery),
        **_tables(report, recovery),
        source=source,
        repo=repo_id or "OWNER/NAME",
        local=(repo_id or "OWNER/NAME").split("/")[-1],
    )
    metadata = _metadata(report, source, trained=report.updated or recovery is not None)
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + re.sub(r"\n{3,}", "\n\n", body))
    path = folder / "README.md"
    card.save(path)
    return path


def _metadata(report: Report, source: BaseCard, trained: bool) -> ModelCardData:
    """The Hub's metadata; `trained` where the weights are not the base model's."""
    relation = "finetune" if trained else "quantized"  # the Hub's closed list has no word for sparse
    return ModelCardData(
        base_model=source.id,
        base_model_relation=relation if source.id else None,
        library_name="sparsegate",
        pipeline_tag="text-generation",
        license=source.license,
        license_name=source.license_name,
        license_link=source.license_link,
        language=list(source.language) or None,
        datasets=[report.calibration.dataset] if report.calibration.dataset else None,
        tags=list(TAGS),
    )


def _facts(folder: Path, report: Report, recovery: RecoveryRecord | None) -> dict[str, Any]:
    """What the card says beside its tables."""
    return {
        "report": report,
        "chosen": report.chosen,
        "units": _units(report),
        "hub": constants.ENDPOINT,
        "verdict": inline(make_verdict(report, recovery).sentence),
        "errors": report.chosen.nll_error is not None,
        "weights": weights,
        "model_type": _model_type(folder),
        "recovery": recovery,
        "speed": inline(speed_sentence(report)),
        "long": inline(long_sentence(report.long)) if report.long else "",
        "recipe": fenced(yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True), "yaml"),
        "versions": inline(", ".join(f"{name} {version}" for name, version in report.versions.items())),
        "plots": sorted(
            (path.relative_to(folder).as_posix() for path in (folder / "report").glob("*.png")),
            key=lambda name: (name != CANDIDATES, name),
        ),
    }


def _tables(report: Report, recovery: RecoveryRecord | None) -> dict[str, str]:
    """The card's tables in markdown; empty where nothing was measured."""
    return {
        "quality": quality_table(report),
        "details": detail_table(report),
        "speeds": speed_table(report) if report.speed else "",
        "references": reference_table(report) if report.references else "",
        "layers": layer_table(report),
        "positions": table(position_cells(report.long)) if report.long else "",
        "checks": check_table(report),
        "onnx": onnx_table(report) if report.onnx else "",
        "onnx_details": onnx_detail_table(report) if report.onnx else "",
        "before_after": before_after_table(recovery) if recovery else "",
        "spent": spent_table(recovery) if recovery else "",
        "zeros": zeros_table(recovery) if recovery else "",
    }


def speed_sentence(report: Report) -> str:
    """What was measured about decoding speed, claiming no more."""
    row, speed = report.chosen, report.speed
    if row.method == "dense" or speed is None or row.decode_ratio is None:
        return f"Speed was not measured{f' ({report.speed_note})' if report.speed_note else ''}."
    threads = "" if speed.threads is None else f", {speed.threads} threads"
    where = (
        f"on this machine ({report.machine.cpu}, {report.machine.cores} cores{threads}, {weights(speed)}, "
        f"{speed.provider})"
    )
    other = (
        "this model's dense graph, with the stock activation and nothing skipped"
        if report.swapped
        else "the dense model"
    )
    times = f"{ratio_text(row.decode_ratio)} times the speed of {other}"
    said = (
        f"Not faster {where}: decoding ran at {times}." if row.decode_ratio < 1 else f"Decoding ran at {times} {where}."
    )
    return (
        f"{said} Other load disturbed every pair of runs: these speeds are not to be quoted."
        if speed.disturbed
        else said
    )


def weights(speed: Speed) -> str:
    """The precisions of a comparison of speeds."""
    return (
        speed.precision
        if speed.baseline in (None, speed.precision)
        else f"{speed.precision} against dense {speed.baseline}"
    )


def _model_type(folder: Path) -> str | None:
    """The model type of a checkpoint that stock transformers does not know; None for every other."""
    config = folder / "config.json"
    model_type = read_json(config, config.name).get("model_type") if config.is_file() else None
    return model_type if str(model_type).startswith("sparsegate_") else None


def _units(report: Report) -> str:
    """What the sites gate, for people."""
    linear = [".linear." in layer.site for layer in report.layers]
    neurons, channels = "feed-forward neurons", "input channels of linear maps"
    return f"{neurons} and {channels}" if any(linear) and not all(linear) else channels if any(linear) else neurons


def _text(value: Any) -> str | None:
    return None if value is None else str(value)

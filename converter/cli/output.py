"""What verbs print: plain aligned text, or JSON with --json."""

from __future__ import annotations

import json as _json
import logging
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import printable

if TYPE_CHECKING:
    from ..evaluation.checks import Verification
    from ..evaluation.records import Report
    from ..pipeline.convert import Result
    from ..pipeline.doctor import Diagnosis
    from ..pipeline.export import Exported
    from ..pipeline.inspect import Inspection
    from ..training.stage import Tuned

_MOST_SITES = 12
"""More sites than these are not listed on a terminal."""


Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print the result and errors, and nothing of the way there.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print what libraries say too, and everything that sparsegate logs.")
]


@contextmanager
def telling(quiet: bool, verbose: bool) -> Iterator[None]:
    """How much goes to stderr inside the block."""
    if quiet and verbose:
        raise InputError("--quiet and --verbose must not be given together, got both. Leave one out.")
    from .. import progress

    logger, root = logging.getLogger("sparsegate"), logging.getLogger()
    before = logger.level, root.level
    logger.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.WARNING)
    if verbose:
        root.setLevel(logging.INFO)
    try:
        with progress.shown("quiet" if quiet else "verbose" if verbose else "normal"):
            yield
    finally:
        logger.setLevel(before[0])
        root.setLevel(before[1])


def share(text: str | None, flag: str) -> float | None:
    """A share given as `1%` or `0.01`."""
    if text is None:
        return None
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise InputError(f"{flag} must be a share like 1% or 0.01, got {text!r}. Correct it.") from None


def command(words: list[str]) -> str:
    """The command for the report, which may be published: of absolute paths (`/a/b`, `--flag=/a/b`, `-o/a/b`) only the
    last name.
    """
    return shlex.join(
        [
            "sparsegate",
            *(
                re.sub(r"^(--?[\w-]+=?)?(/.*)$", lambda match: (match[1] or "") + Path(match[2]).name, word)
                for word in words
            ),
        ]
    )


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def conversion(result: Result, as_json: bool) -> None:
    """The tables of a conversion and the verdict on it, last, or what a dry run found."""
    from ..report.comparison import reference_table
    from ..report.tables import onnx_table, quality_table, stage_text
    from ..report.verdict import make_verdict, read_recovery

    if result.report is None:
        estimate = result.estimate
        assert estimate is not None
        if as_json:
            print(_json.dumps({"output": str(result.folder), "dry_run": True, **estimate.model_dump()}, indent=2))
            return
        exists = f"{result.folder} exists: a real run writes nothing, it says up to date or refuses"
        print(exists if result.folder.exists() else f"would write {result.folder}; nothing was written")
        _estimate(estimate, result.precision)
        return
    report, verdict = result.report, make_verdict(result.report, read_recovery(result.folder))
    if as_json:
        fields = {
            "output": str(result.folder),
            "up_to_date": result.up_to_date,
            "url": result.url,
            "verdict": verdict.numbers(),
        }
        print(_json.dumps({**fields, "report": report.model_dump(mode="json")}, indent=2))
        return
    print(f"{result.folder} is up to date" if result.up_to_date else f"wrote {result.folder}")
    parts = [quality_table(report, "text")]
    parts += [reference_table(report, "text")] if report.references else []
    parts += [onnx_table(report, "text")] if report.onnx else []
    parts += [_layers(report)] if report.layers else []
    parts += [stage_text(report)] if report.stages and not result.up_to_date else []
    parts += [f"pushed to {result.url}"] if result.url else []
    for part in (*parts, verdict.sentence):
        print(f"\n{part}")


def _layers(report: Report) -> str:
    """The table of the sites; of many sites their range alone."""
    from ..report.tables import layer_table

    if len(report.layers) <= _MOST_SITES:
        return layer_table(report, "text")
    densities = [layer.density_realised for layer in report.layers]
    return (
        f"density of the {len(densities)} sites {min(densities):.1%} to {max(densities):.1%}; each stands in "
        "report/index.html"
    )


def _estimate(estimate: Any, precision: str | None = None) -> None:
    print(f"parameters        {estimate.parameters / 1e6:.1f} M, {estimate.ffn_share:.0%} in the feed-forward networks")
    print(f"weights           {_size(estimate.source_bytes)}")
    sizes = {name: size for name, size in estimate.onnx_bytes.items() if precision in (None, name)}
    print(f"ONNX model        {', '.join(f'{_size(size)} in {name}' for name, size in sizes.items())}")
    print(f"disk needed       {_size(estimate.disk_bytes)}")
    print(
        f"peak memory       {_size(estimate.peak_calibrate)} while calibrating, {_size(estimate.peak_export)} while "
        "exporting and verifying"
    )
    for name, value in estimate.expected_cost.items():
        print(f"expected cost     {value:.2f} of the dense MLP's bytes per token with method {name}")
    if estimate.seconds:
        download = f", without the download of {_size(estimate.download_bytes)}" if estimate.download_bytes else ""
        print(f"expected time     {sum(estimate.seconds.values()) / 60:.1f} minutes on this machine{download}:")
        for name, seconds in estimate.seconds.items():
            print(f"  {name:<22} {seconds / 60:6.1f} minutes")
    for note in estimate.notes:
        print(note)


def tuning(result: Tuned, as_json: bool) -> None:
    """What a recovery gave, beside the dense model."""
    record = result.record
    if as_json:
        print(_json.dumps({"output": str(result.folder), **record.model_dump(mode="json")}, indent=2))
        return
    from ..report.recovery import before_after_cells, spent_cells, zeros_cells
    from ..report.tables import table

    print(f"wrote {result.folder}")
    for cells in (before_after_cells, zeros_cells, spent_cells):
        print()
        print(table(cells(record), "text"))


def verification(result: Verification, as_json: bool) -> None:
    """One line a check, then the verdict."""
    if as_json:
        print(_json.dumps(result.model_dump(mode="json", exclude={"shipped": {"rises"}}), indent=2))
        return
    quality = result.quality
    print(
        f"NLL dense {quality.nll_dense:.4f}, sparse {quality.nll:.4f} nats per token; KL {quality.kl:.4f}; agreement "
        f"{quality.agreement:.1%}"
    )
    if result.shipped is not None:
        shipped = result.shipped
        print(
            f"ONNX as shipped: NLL {shipped.nll:.4f}; KL to dense {shipped.kl:.4f}; agreement {shipped.agreement:.1%} "
            f"over {shipped.tokens} tokens"
        )
    print(f"density {quality.density:.3f}, cost {quality.cost:.3f} of the dense MLP's bytes")
    for key, value in quality.site_density.items():
        print(f"  {key:<20} density {value:.3f}  cost {quality.site_cost[key]:.3f}")
    for check in result.checks:
        print(
            f"{'ok    ' if check.passed else 'FAILED'} {check.name}: {check.value:.3g} (bound {check.bound:.3g}) "
            f"{check.note}"
        )
    print("verified" if result.passed else "NOT verified")


def speed(result: dict[str, Any], as_json: bool) -> None:
    """Tokens per second and ratios; of ops and shapes the tables."""
    if as_json:
        print(_json.dumps(result, indent=2))
        return
    if result.get("kind"):
        from ..report.speed import page

        print(page(result), end="")
        return
    for role in ("baseline", "candidate"):
        row = result[role]
        print(
            f"{role:<10} prefill {row['prefill_tokens_per_s']:9.1f} tok/s  decode {row['decode_tokens_per_s']:9.1f} "
            f"tok/s  {row['path']} ({row['executor']})"
        )
    for phase in ("prefill", "decode"):
        print(f"{phase:<10} {result[phase]['ratio']:.2f} times the baseline's speed: {result[phase]['verdict']}")
    print(f"{len(result['samples'])} pairs counted, {result['dropped']} dropped")


def inspection(result: Inspection, as_json: bool) -> None:
    """What a model is and needs."""
    if as_json:
        print(_json.dumps(result.model_dump(mode="json"), indent=2))
        return
    verdict = "can be converted" if result.convertible else "cannot be converted"
    print(printable(f"{result.model}: {result.model_type}, {verdict}"))
    if result.reason:
        print(printable(result.reason))
    if result.estimate:
        if result.download_bytes:
            print(f"download          {_size(result.download_bytes)}")
        print(
            f"sites             {result.sites} feed-forward networks of {result.units} neurons, width {result.hidden}, "
            f"activation {result.activation}"
        )
        _estimate(result.estimate)


def exported(result: Exported, as_json: bool) -> None:
    """What an export wrote."""
    if as_json:
        print(_json.dumps(result.model_dump(mode="json"), indent=2))
        return
    print(f"wrote {result.output}, {_size(result.bytes)}")
    if result.side_file is not None:
        print(f"wrote {result.side_file}")


def diagnosis(result: Diagnosis, as_json: bool) -> None:
    """The installation, one fact a line, then commands that mend."""
    if as_json:
        print(_json.dumps(result.model_dump(mode="json"), indent=2))
        return
    for name, value in result.facts.items():
        print(f"{name:<24} {value}")
    for remedy in result.remedies:
        print(f"missing: {remedy}")
    print("nothing is missing" if not result.remedies else "run the commands above")

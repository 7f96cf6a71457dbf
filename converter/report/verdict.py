"""The verdict on a conversion: one sentence of what a person gains and loses, from the stored numbers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..evaluation.records import DenseReference, OnnxRow, Report
from ..evaluation.recovery_record import RECOVERY, RecoveryRecord
from ..onnx_export.precision import PRECISIONS
from .change import Change, perplexity_change
from .tables import onnx_change, ratio_text

_FASTER = 1.005
"""The least ratio that does not read as 1.00: below it nothing is gained."""
_SLOWER_PROMPTS = 0.95
"""Below this ratio of prefill speeds the sentence names it: a loss that a person will notice."""


@dataclass(frozen=True)
class Verdict:
    """The sentence, and the numbers that it was made from.

    Attributes:
        worth_it: None where speed was not measured or is not to be quoted.
        decode_ratio: Speed relative to the dense model in the precision `baseline`; `prefill_ratio` likewise.
        change: Of perplexity, against the dense model of the same precision where both ONNX files were measured.
        cost: Bytes of the MLPs that a token touches, relative to dense.
        better: A dense model in fewer bits that is at least as fast and loses less.
    """

    sentence: str
    worth_it: bool | None
    change: Change
    cost: float
    decode_ratio: float | None = None
    prefill_ratio: float | None = None
    baseline: str | None = None
    better: str | None = None

    def numbers(self) -> dict[str, object]:
        """JSON-ready: the fields, the change as `perplexity_change` and `perplexity_error`."""
        fields = {
            name: getattr(self, name)
            for name in ("sentence", "worth_it", "decode_ratio", "prefill_ratio", "baseline", "cost", "better")
        }
        return {**fields, "perplexity_change": self.change.value, "perplexity_error": self.change.error}


def reference_change(reference: DenseReference) -> Change:
    """Change of perplexity of a dense graph in fewer bits against the dense model in fp32."""
    return perplexity_change(reference.nll, reference.nll_dense, reference.nll_error)


def fp32_decode_ratio(report: Report) -> float | None:
    """Decoding speed of the chosen model relative to the dense graph in fp32: measured, or through the dense graph of
    its own precision, which was timed against both.
    """
    row, speed = report.chosen, report.speed
    if speed is None or row.decode_ratio is None:
        return None
    baseline = speed.baseline or speed.precision
    if baseline == "fp32":
        return row.decode_ratio
    dense_ratio = next(
        (reference.decode_ratio for reference in report.references if reference.precision == baseline), None
    )
    return None if dense_ratio is None else row.decode_ratio * dense_ratio


def read_recovery(folder: Path) -> RecoveryRecord | None:
    """The record of the training behind a checkpoint's weights; None without one."""
    return RecoveryRecord.load(folder / RECOVERY) if (folder / RECOVERY).is_file() else None


def make_verdict(report: Report, recovery: RecoveryRecord | None = None) -> Verdict:
    """What a person gains and loses with the chosen model.

    Speed is claimed only where it was measured, against the dense graph of the same precision. `recovery` is the record
    of the training that the weights come from, where there is one.
    """
    row, speed = report.chosen, report.speed
    change = _own_change(report)
    if row.method == "dense":
        return Verdict("Nothing is skipped: this is the dense model, as fast and as good.", None, Change(0.0), 1.0)
    loss = _loss(report, change, recovery)
    if speed is None or row.decode_ratio is None:
        reason = f" ({report.speed_note})" if report.speed_note else ""
        return Verdict(
            f"Reads {_share(row.cost)} of the MLP's bytes per token, {loss}; speed was not measured{reason}.",
            None,
            change,
            row.cost,
        )
    baseline, prefill = speed.baseline or speed.precision, _prefill_ratio(report)
    dense = f"its own dense {baseline} graph" if report.swapped else f"the dense {baseline} model"
    numbers = {"decode_ratio": row.decode_ratio, "prefill_ratio": prefill, "baseline": baseline}
    prompts = (
        f", prompts at {ratio_text(prefill)} of its speed" if prefill is not None and prefill < _SLOWER_PROMPTS else ""
    )
    if speed.disturbed:
        sentence = (
            f"Reads {_share(row.cost)} of the MLP's bytes per token, {loss}; other load disturbed every pair of runs, "
            "so the measured speed "
            f"({ratio_text(row.decode_ratio)} of that of {dense}) is not to be quoted."
        )
        return Verdict(sentence, None, change, row.cost, **numbers)
    if row.decode_ratio < _FASTER:
        sentence = (
            f"Not worth it: not faster than {dense} on this machine, decodes at {ratio_text(row.decode_ratio)} "
            f"of its speed{prompts}; {loss}."
        )
        return Verdict(sentence, False, change, row.cost, **numbers)
    gain = f"decodes {ratio_text(row.decode_ratio)} times as fast as {dense} on this machine{prompts}"
    better = _better(report)
    if better is not None:
        sentence = f"Not worth it: it {gain}, {loss}, but {_said(better, report)}."
        return Verdict(sentence, False, change, row.cost, **numbers, better=f"dense {better.precision}")
    return Verdict(f"{gain[0].upper()}{gain[1:]}{';' if prompts else ','} {loss}.", True, change, row.cost, **numbers)


def _better(report: Report) -> DenseReference | None:
    """The fastest dense graph in fewer bits than the chosen model's that is at least as fast as it and loses less, None
    without one.
    """
    loss, ratio = fp32_change(report), fp32_decode_ratio(report)
    precision = report.speed.precision if report.speed else "fp32"
    if ratio is None or report.swapped:
        return None
    faster = [
        reference
        for reference in report.references
        if reference.decode_ratio is not None
        and not reference.disturbed
        and PRECISIONS[reference.precision].width < PRECISIONS.get(precision, PRECISIONS["fp32"]).width
        and reference.decode_ratio >= ratio
        and reference_change(reference).value < loss.value
    ]
    return max(faster, key=lambda reference: reference.decode_ratio or 0.0, default=None)


def _said(better: DenseReference, report: Report) -> str:
    ratio = fp32_decode_ratio(report)
    assert ratio is not None and better.decode_ratio is not None
    faster = better.decode_ratio / ratio
    as_fast = f"{ratio_text(faster)} times as fast as this" if faster >= _FASTER else "as fast as this"
    return (
        f"the dense {better.precision} model decodes {as_fast} and loses less (perplexity {reference_change(better)})"
    )


def fp32_change(report: Report) -> Change:
    """Change of perplexity of the chosen model, as it is shipped where that was measured, against the dense model in
    fp32.
    """
    row, sparse = report.chosen, onnx_row(report, "sparse")
    if sparse is not None:
        return onnx_change(sparse, report)
    return perplexity_change(row.nll, report.dense.nll, row.nll_error)


def _own_change(report: Report) -> Change:
    """Change of perplexity of the chosen model against the dense one of the same precision: of the ONNX files where
    both were measured.
    """
    sparse, dense = onnx_row(report, "sparse"), onnx_row(report, "dense")
    if sparse is not None and sparse.rise is not None:
        return perplexity_change(sparse.rise, 0.0, sparse.rise_error)
    if sparse is not None and dense is not None:
        return perplexity_change(sparse.nll, dense.nll)
    return fp32_change(report)


def onnx_row(report: Report, model: str) -> OnnxRow | None:
    """The measured ONNX file `dense` or `sparse`, None where it was not."""
    return next((row for row in report.onnx if row.model == model), None)


def _prefill_ratio(report: Report) -> float | None:
    """Of the pairs where it is stored, else of the medians."""
    row, dense = report.chosen, report.dense
    if row.prefill_ratio is not None:
        return row.prefill_ratio
    if row.prefill_tokens_per_second is None or not dense.prefill_tokens_per_second:
        return None
    return row.prefill_tokens_per_second / dense.prefill_tokens_per_second


def _loss(report: Report, change: Change, recovery: RecoveryRecord | None) -> str:
    """What it costs in quality. Against a model that is itself trained, the training's own change is named where its
    record is there.
    """
    said = (
        f"perplexity unchanged within the measurement's error ({change})"
        if change.uncertain
        else f"perplexity {change}"
    )
    if not report.swapped:
        trained = (
            f" against the dense model that it was trained from, with {recovery.activation} for its activation"
            if recovery is not None
            else ""
        )
        return said + trained
    said += " against itself with nothing skipped"
    if recovery is None:
        return said
    training = perplexity_change(recovery.recovered.nll, recovery.dense.nll)
    return f"{said}, and {training} against the dense model that it was trained from"


def _share(cost: float) -> str:
    return f"{cost:.2f}"

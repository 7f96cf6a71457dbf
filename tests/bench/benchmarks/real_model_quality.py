"""What every planned method loses on held-out windows, a chunk of windows at a time, each chunk a stage: a run that is
stopped loses one of them, and one with more windows goes on from those that are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality_stages import load_quality, loss_fields, quality_header, store_quality
from benchmarks.real_model_plans import METHODS, TRAINED, Study, header_of, planned, training_of
from records.real_model_results import Row
from sparsegate.converter.checkpoint.stage import Header, is_finished
from sparsegate.converter.evaluation.checks import Quality
from sparsegate.converter.evaluation.quality import measure_qualities
from sparsegate.converter.text.windows import Batches

CHUNK = 16
"""Windows: the fewest that tell a standard error."""
Key = tuple[str, float]
"""Method and density."""


def measure(study: Study, methods: Sequence[str]) -> None:
    """Store the quality of the methods that are planned on every chunk where it is not stored yet. The plans of a chunk
    share its dense pass.
    """
    found = {(method, density): plan for method in methods for density, plan in planned(study, method).items()}
    model = None
    for number in range(chunks(study)):
        missing = {key: plan for key, plan in found.items() if not _is_measured(study, key, number)}
        if not missing:
            continue
        model = model or study.model()
        qualities = measure_qualities(
            model, {str(key): plan for key, plan in missing.items()}, _batches(study, number), error=0.0
        )
        for key in missing:
            quality = qualities[str(key)]
            store_quality(_folder(study, key, number), _header(study, key, number), quality)
            print(
                f"windows {number * CHUNK} on, {key[0]} {key[1]}: NLL {quality.nll_dense:.4f} -> {quality.nll:.4f}",
                flush=True,
            )


def rows(study: Study) -> tuple[list[Row], list[str]]:
    """What is measured, all on the same windows, and the names of what is not: a chunk counts when all that are
    measured at all have it.
    """
    keys = [(method, density) for method in METHODS for density in study.densities]
    measured = {key: [number for number in range(chunks(study)) if _is_measured(study, key, number)] for key in keys}
    having = [numbers for numbers in measured.values() if numbers]
    common = sorted(set.intersection(*map(set, having))) if having else []
    found, missing = [], []
    for key in keys:
        if not common or not measured[key]:
            missing.append(f"{key[0]} {key[1]:g}")
            continue
        found.append(_row(study, key, [load_quality(_folder(study, key, number)) for number in common]))
    return found, missing


def chunks(study: Study) -> int:
    """Chunks of the held-out windows; the last may be smaller."""
    return -(-len(study.heldout.tokens) // CHUNK)


def joined(parts: Sequence[Quality]) -> Quality:
    """The quality on the windows of all parts, whose windows have one length. Shares and costs are means over tokens,
    as they are in each part.

    The squares about the common mean are those about the parts' own and the parts' about the common one, so the
    standard error is that of one measurement.
    """
    tokens, windows = sum(part.tokens for part in parts), sum(part.windows for part in parts)
    shares = [part.tokens / tokens for part in parts]

    def mean(name: str) -> float:
        return sum(share * getattr(part, name) for share, part in zip(shares, parts, strict=True))

    difference, length = mean("nll") - mean("nll_dense"), tokens / windows
    squares = 0.0  # of a window's sum of differences about its expected one
    for part in parts:
        squares += part.nll_error**2 * part.tokens**2 * (part.windows - 1) / max(1, part.windows)
        squares += part.windows * (length * (part.nll - part.nll_dense - difference)) ** 2
    error = (squares * windows / max(1, windows - 1)) ** 0.5 / tokens
    means = {name: mean(name) for name in ("nll_dense", "nll", "kl", "agreement", "density", "cost")}
    block = None if any(part.block_cost is None for part in parts) else mean("block_cost")
    return Quality(
        **means, tokens=tokens, windows=windows, nll_error=error, block_cost=block, site_density={}, site_cost={}
    )


def _row(study: Study, key: Key, parts: Sequence[Quality]) -> Row:
    training = training_of(study, *key) if key[0] in TRAINED else None
    return Row(method=key[0], density_target=key[1], **loss_fields(joined(parts)), training=training)


def _batches(study: Study, number: int) -> Batches:
    part = slice(number * CHUNK, (number + 1) * CHUNK)
    return Batches(study.heldout.tokens[part], study.heldout.mask[part])


def _folder(study: Study, key: Key, number: int) -> Path:
    return study.work / "quality" / f"{key[0]}-{key[1]}" / str(number)


def _header(study: Study, key: Key, number: int) -> Header:
    return quality_header({"plan": header_of(study, *key).fingerprint}, _batches(study, number))


def _is_measured(study: Study, key: Key, number: int) -> bool:
    return is_finished(_folder(study, key, number), _header(study, key, number))

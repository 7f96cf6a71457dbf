"""The training stages of a recipe (`stage`), one after another: a checkpoint becomes another one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...runtime_onnx.errors import InputError
from .. import progress
from ..checkpoint.plan import check_exact
from ..checkpoint.source import Source
from ..checkpoint.stage import atomic_folder, is_finished, read_header, write_header, write_json
from ..evaluation.recovery_record import RecoveryRecord
from ..modeling.distributed import check_started, same_error, share_of, world
from ..text.generated import GENERATED, SECONDS
from ..text.mixture import FOLDER as MIXTURE
from .by_block import GROUP, micro_batch
from .inputs import Heldout, RecoveryTask, present
from .settings import Stage
from .stage import Tuned, processes_for, tuned


def training_inputs(stages: Sequence[Stage]) -> list[tuple[str, Path]]:
    """Files of the user's that training stages read, and what they are."""
    parts = [part for stage in stages if stage.tune is not None for part in stage.tune.data.mixture]
    return [("The training text", Path(name)) for part in parts for name in part.files or ()]


def stage_folder(work: Path, number: int) -> Path:
    """Where a training stage keeps its text, state and result."""
    return work / f"stage_{number}"


def train_stages(
    source: Source, stages: Sequence[Stage], seed: int, work: Path, device: str, heldout: Heldout
) -> Tuned:
    """Run training stages one after another, each on the checkpoint of the one before and all towards the dense
    `source`; the record is that of all.

    Raises InputError as `tuned` does.
    """
    _check(source, stages, device)
    last, records = None, []
    for number, stage in enumerate(stages):
        assert stage.tune is not None
        before = source if last is None else last.source
        with same_error():
            if number and stage.tune.data == stages[number - 1].tune.data and world().rank == 0:  # type: ignore[union-attr]
                _share_text(stage_folder(work, number - 1), stage_folder(work, number))
        with progress.stage(f"train {number + 1}" if len(stages) > 1 else "train"):
            activation, folder = stage.config.get("activation"), stage_folder(work, number)
            last = tuned(RecoveryTask(before, source, activation, stage.tune, seed, folder, device, heldout))
        records.append(last.record)
    assert last is not None
    return replace(last, record=joined(records))


def _check(source: Source, stages: Sequence[Stage], device: str) -> None:
    """Raise InputError, before anything is sampled, for what training would meet later: an activation, windows that
    processes cannot share, no processes.
    """
    for site in source.arch.sites(source.config):
        name = stages[0].config.get("activation") or present(source, site)
        check_exact(name)
        source.arch.check_activation(name)
    for stage in stages:
        assert stage.tune is not None
        share_of(stage.tune.windows, "The windows of a micro-batch")
        if stage.tune.parallel == "fsdp":
            check_started()
        count = processes_for(source, stage.tune, device)
        if stage.tune.windows % count:
            raise InputError(
                f"windows must divide by processes, got {stage.tune.windows} for {count}. Change one of them."
            )
        blocks, shared = stage.tune.by_block, count * world().size
        if blocks is not None and micro_batch(blocks) % shared:
            raise InputError(
                f"tokens of by_block must be {GROUP} times what divides by processes, got {blocks.tokens} for "
                f"{shared}. Change one of them."
            )


def _share_text(before: Path, after: Path) -> None:
    """Let a stage read the text that the one before it had made, with no seconds of its own."""
    for name in (GENERATED, MIXTURE):
        header = read_header(before / name)
        if header is not None and not (is_finished(after / name, header)):
            with atomic_folder(after / name) as partial:
                shutil.copytree(before / name, partial, dirs_exist_ok=True)
                write_json(partial / SECONDS, {"seconds": 0.0})
                write_header(partial, header)


def joined(records: Sequence[RecoveryRecord]) -> RecoveryRecord:
    """The record of stages that followed one another: before the first, after the last, and the sums and
    curves of all.
    """
    if len(records) == 1:
        return records[0]
    first, last = records[0], records[-1]
    curve, heldout, steps, tokens, seconds = [], [], 0, 0, 0.0
    for record in records:
        curve += [
            p.model_copy(update={"step": p.step + steps, "tokens": p.tokens + tokens, "seconds": p.seconds + seconds})
            for p in record.curve
        ]
        heldout += [p.model_copy(update={"step": p.step + steps, "tokens": p.tokens + tokens}) for p in record.heldout]
        steps, tokens, seconds = (
            steps + int(record.settings["steps"]),
            tokens + record.tokens_trained,
            seconds + record.seconds,
        )
    texts = list({record.text.hash: record.text for record in reversed(records)}.values())[
        ::-1
    ]  # of equal ones the first, which took the seconds
    text = (
        first.text
        if len(texts) == 1
        else first.text.model_copy(
            update={
                "name": "; ".join(dict.fromkeys(text.name for text in texts)),
                "windows": sum(text.windows for text in texts),
                "tokens": sum(text.tokens for text in texts),
                "seconds": sum(text.seconds for text in texts),
                "sampled": all(text.sampled for text in texts),
                "hash": None,
            }
        )
    )
    return last.model_copy(
        update={
            "text": text,
            "settings": {"stages": [record.settings for record in records]},
            "tokens_trained": tokens,
            "seconds": seconds,
            "cpu_seconds": sum(record.cpu_seconds for record in records),
            "curve": curve,
            "heldout": heldout,
            "swapped": first.swapped,
            "dense": first.dense,
        }
    )

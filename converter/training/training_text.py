"""The text of a training stage: a mixture of files and data sets, or what the dense model writes itself."""

from __future__ import annotations

from pathlib import Path

import torch

from ...runtime_onnx.untrusted import read_json
from .. import progress
from ..checkpoint.source import Source
from ..evaluation.recovery_record import TrainingText
from ..text.generated import GENERATED, SECONDS, generated
from ..text.mixture import FOLDER as MIXTURE
from ..text.mixture import mixture_batches
from ..text.windows import Batches
from .settings import Recovery

CUTS = 4
"""Offsets at which sampled text is cut into windows."""


@progress.stage("text", apart=True)
def training_text(
    source: Source, recovery: Recovery, seed: int, work: Path, processes: int = 1
) -> tuple[Batches, TrainingText]:
    """The windows to train on and their record: of the recipe's mixture, or text that the dense source writes itself,
    in `processes` of this machine.
    """
    data = recovery.data
    if data.mixture:
        batches = mixture_batches(source.tokenizer(), data, seed, work)
        name, made = ", ".join(f"{part.name} {part.share:g}" for part in data.mixture), MIXTURE
    else:
        batches = shifted(generated(source, data.windows, data.length, seed, work, data.temperature, True, processes))
        name, made = f"text sampled from the dense model at temperature {data.temperature:g}", GENERATED
    seconds = float(read_json(work / made / SECONDS, "The time that the text took")["seconds"])
    sampled = not data.mixture
    count = (
        data.windows * data.length if sampled else batches.count
    )  # a token of sampled text stands in several windows
    return batches, TrainingText(
        name=name, windows=len(batches.tokens), tokens=count, sampled=sampled, seconds=seconds, hash=batches.sha256
    )


def shifted(batches: Batches) -> Batches:
    """Sampled windows [N, S], neighbours in their texts, joined and cut at CUTS offsets: [CUTS N - CUTS + 1, S], so
    that passes differ.
    """
    count, length = batches.tokens.shape
    stream = batches.tokens.flatten()
    cuts = [
        stream[start : start + (count - bool(start)) * length].view(-1, length)
        for start in range(0, length, -(-length // CUTS))
    ]
    tokens = torch.cat(cuts)
    return Batches(tokens, torch.ones_like(tokens, dtype=torch.bool))

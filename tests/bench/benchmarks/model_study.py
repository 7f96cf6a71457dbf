"""What benchmarks of a real model measure: the dense model, windows of texts, and what records say of both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import provenance
from records.model_results import TextFile
from sparsegate.converter.checkpoint.source import Source, open_source
from sparsegate.converter.checkpoint.stage import hash_file
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.text.windows import Batches, make_batches
from sparsegate.converter.training.inputs import Models

EVERY = 1 << 30
"""Windows: more than any text has."""


@dataclass(frozen=True)
class WindowSizes:
    """Windows: their length in tokens, how many are calibrated on and measured on at most, and the seed that draws
    them. A training takes `steps` at every density; where they are None, as many as a benchmark fits into `minutes`.
    """

    length: int = 256
    calibration: int = 128
    heldout: int = 64
    seed: int = 0
    minutes: float = 30.0
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelStudy(ABC):
    """A model folder, and where stages are kept. `name` is None where the model has the folder's, `origin` None where
    its weights come from there.
    """

    folder: Path
    work: Path
    sizes: WindowSizes
    name: str | None = None
    origin: str | None = None

    @property
    @abstractmethod
    def calibration_file(self) -> Path:
        """The text to calibrate on."""

    @property
    @abstractmethod
    def calibration_text(self) -> str:
        """What is read of it."""

    @property
    @abstractmethod
    def training(self) -> Batches:
        """The windows to train on; a training draws them in random order."""

    @cached_property
    def source(self) -> Source:
        return open_source(self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        return self.source.tokenizer()

    @cached_property
    def calibration(self) -> Batches:
        return self.windows(self.calibration_text, self.sizes.calibration)

    def windows(self, text: str, count: int, name: str = "Calibration text") -> Batches:
        """At most `count` windows of a text, in its order. Raises InputError, which names the text, where it is too
        short.
        """
        return make_batches(self.tokenizer, text, count, self.sizes.length, self.sizes.seed, name)

    @property
    def parameters(self) -> int:
        """Of the model, tied ones once."""
        return sum(torch.Size(info.shape).numel() for info in self.source.tensors.values())

    def model(self) -> Any:
        """The dense model, loaded anew: training freezes its weights."""
        return load_dense(self.folder)

    def models(self) -> Models:
        """What a training takes that begins with the dense model, which teaches itself."""
        arch = self.source.arch
        return Models(self.model(), None, arch, arch.activation(self.source.config))

    def facts(self, command: str) -> dict[str, Any]:
        """Fields of `ModelResult`, without what is missing."""
        return {
            "model": self.name or self.source.name,
            "origin": self.origin or f"the folder {self.folder.name}",
            "fingerprint": self.source.fingerprint,
            "length": self.sizes.length,
            "calibration": text_file(self.calibration_file, self.calibration),
            "command": command,
            **provenance(),
        }


def text_file(path: Path, batches: Batches) -> TextFile:
    """The record of a text and of the windows taken from it."""
    windows = len(batches.tokens)
    return TextFile(
        file=path.name, sha256=hash_file(path), windows=windows, tokens=batches.count, batches=batches.sha256
    )

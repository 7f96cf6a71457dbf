"""What the benchmark of budgets measures: its rows, and its texts.

A row is made for a share of the bytes; its density is the one at which what it costs equals that share. One row is one
entry of ROWS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.model_study import EVERY, ModelStudy, WindowSizes
from sparsegate.converter.checkpoint.source import Source
from sparsegate.converter.methods import load_method, make_config
from sparsegate.converter.methods.tune import Tune, tune_of
from sparsegate.converter.pipeline.rotate import rotated
from sparsegate.converter.pipeline.texts import write_out
from sparsegate.converter.text.documents import read_whole
from sparsegate.converter.text.windows import Batches, make_batches
from sparsegate.runtime_onnx.errors import InputError

SHARES = (0.8, 0.67, 0.5, 0.4)
_LEAST = 0.05  # density below which a row is left out
SIZES = WindowSizes(minutes=60.0)
"""Minutes are of each training, or of the one that goes through all shares."""


def of_gate(share: float, source: Source, config: Any) -> float:
    """The gate is computed in full: of m matrices one is touched whole, the others at the density."""
    matrices = source.arch.matrices
    return (matrices * share - 1) / (matrices - 1)


def of_inputs(share: float, source: Source, config: Any) -> float:
    """Every matrix is touched at the density of its input channels."""
    return share


def of_predictor(share: float, source: Source, config: Any) -> float:
    """The predictor's r (d + n) weights are touched beside the density of all m d n."""
    hidden, units = (source.arch.size(source.config, name) for name in ("hidden", "units"))
    matrices = source.arch.matrices
    rank = load_method("predictor").rank(config, hidden, units, matrices)
    return share - rank * (hidden + units) / (matrices * hidden * units)


@dataclass(frozen=True)
class Kind:
    """One row of ROWS: the method, its density at a share of the bytes, values of its configuration (those of `tune`
    over its defaults), whether the residual stream is rotated first, which bytes the share is of, and the row that it
    is an ablation of.
    """

    method: str
    density: Callable[[float, Source, Any], float]
    values: Mapping[str, Any] = field(default_factory=dict)
    rotate: bool = False
    of: Literal["networks", "blocks"] = "networks"
    varies: str | None = None


_NETWORKS = {"linears": ("gate_proj", "up_proj", "down_proj")}
_GREEDY = {"allocation": "greedy"}
_ALONE = {"residual": "none"}
_BEST = "trained_input rotated"
_THRESHOLDS = {"tune": {"updates": "none", "offsets": False}}
_NO_OFFSETS = {"tune": {"offsets": False}}

ROWS = {
    "gate": Kind("gate", of_gate),
    "chess": Kind("chess", of_gate),
    "chess greedy": Kind("chess", of_gate, _GREEDY),
    "teal": Kind("teal", of_inputs, _NETWORKS),
    "teal greedy": Kind("teal", of_inputs, _NETWORKS | _GREEDY),
    "teal rotated": Kind("teal", of_inputs, _NETWORKS, rotate=True),
    "wina": Kind("wina", of_inputs, _NETWORKS),
    "wina rotated": Kind("wina", of_inputs, _NETWORKS, rotate=True),
    "svd": Kind("svd", of_predictor),
    "trained_gate": Kind("trained_gate", of_gate, _ALONE),
    "trained_input": Kind("trained_input", of_inputs, _NETWORKS),
    "trained_input rotated": Kind("trained_input", of_inputs, _NETWORKS, rotate=True),
    "predictor": Kind("predictor", of_predictor),
    "predictor from svd": Kind("predictor", of_predictor, {"begin": "svd", "tune": {"rate": 5e-4}}),
    "teal block": Kind("teal", of_inputs, of="blocks"),
    "teal block greedy": Kind("teal", of_inputs, _GREEDY, of="blocks"),
    "teal block rotated": Kind("teal", of_inputs, rotate=True, of="blocks"),
    "trained_input block rotated": Kind("trained_input", of_inputs, rotate=True, of="blocks"),
    "trained_input block": Kind("trained_input", of_inputs, of="blocks"),
    "trained_gate thresholds alone": Kind("trained_gate", of_gate, _ALONE | _THRESHOLDS, varies="trained_gate"),
    "trained_gate without offsets": Kind("trained_gate", of_gate, _ALONE | _NO_OFFSETS, varies="trained_gate"),
    "trained_gate whole logits": Kind(
        "trained_gate", of_gate, _ALONE | {"tune": {"likeliest": 0}}, varies="trained_gate"
    ),
    "trained_input thresholds alone": Kind(
        "trained_input", of_inputs, _NETWORKS | _THRESHOLDS, rotate=True, varies=_BEST
    ),
    "trained_input weights alone": Kind(
        "trained_input", of_inputs, _NETWORKS | {"tune": {"rate": 1e-9}}, rotate=True, varies=_BEST
    ),
    "trained_input without offsets": Kind(
        "trained_input", of_inputs, _NETWORKS | _NO_OFFSETS, rotate=True, varies=_BEST
    ),
    "trained_input low rank": Kind(
        "trained_input", of_inputs, _NETWORKS | {"tune": {"updates": "low_rank"}}, rotate=True, varies=_BEST
    ),
}
MAIN = tuple(name for name, kind in ROWS.items() if kind.of == "networks" and kind.varies is None)
"""The rows that are made where none are named."""


@dataclass(frozen=True, kw_only=True)
class Study(ModelStudy):
    """The texts to train on, of which the first is calibrated on, and those to measure on by name; `is_rotated` where
    `folder` is already the rotated model of a row; `tune` are values of every training's settings, `descend` lets one
    training go through all shares.
    """

    texts: tuple[Path, ...]
    judge_texts: Mapping[str, Path]
    sizes: WindowSizes = SIZES
    shares: tuple[float, ...] = SHARES
    tune: Mapping[str, Any] = field(default_factory=dict)
    descend: bool = False
    is_rotated: bool = False

    def of(self, name: str) -> Study:
        """The study of a row's own model: the rotated one, which is made once, or this."""
        return self._on_axes if ROWS[name].rotate and not self.is_rotated else self

    @cached_property
    def _on_axes(self) -> Study:
        folder = rotated(self.source, self.calibration, self.work / "rotated").folder
        return replace(self, folder=folder, is_rotated=True)

    def _read(self, path: Path) -> str:
        return read_whole(path, lambda conversations: write_out(self.tokenizer, conversations))[0]

    @property
    def calibration_file(self) -> Path:
        return self.texts[0]

    @property
    def calibration_text(self) -> str:
        return self._read(self.texts[0])

    @cached_property
    def parts(self) -> list[Batches]:
        """The windows of every text to train on: together at most those that a training takes."""
        most = max(1, Tune().model_copy(update=dict(self.tune)).data // len(self.texts))
        return [self.windows(self._read(path), most, f"Text {path.name}") for path in self.texts]

    @cached_property
    def training(self) -> Batches:
        return Batches(*(torch.cat([getattr(part, name) for part in self.parts]) for name in ("tokens", "mask")))

    @cached_property
    def judges(self) -> dict[str, Batches]:
        """Full windows of every text to measure on, in an order drawn by the seed. Raises InputError for a text
        without one.
        """
        judges = {}
        for name, path in self.judge_texts.items():
            every = make_batches(
                self.tokenizer,
                self._read(path),
                EVERY,
                self.sizes.length,
                self.sizes.seed + 1,
                f"Text {path.name}",
                text_order=False,
            )
            full = every.mask.all(dim=1).nonzero().flatten()[: self.sizes.heldout]
            if not len(full):
                raise InputError(f"--judge {name} must hold a window of {self.sizes.length} tokens, got none.")
            judges[name] = Batches(every.tokens[full], every.mask[full])
        return judges

    def config(self, name: str, density: float | None = None) -> Any:
        """The configuration of a row. Raises InputError for settings that there are not."""
        kind = ROWS[name]
        values = dict(kind.values) | ({} if density is None else {"sparsity": round(1 - density, 9)})
        tune = tune_of(make_config(kind.method, {}))
        if tune is not None:
            values["tune"] = tune.model_dump() | dict(self.tune) | values.get("tune", {})
        return make_config(kind.method, values)

    def density(self, name: str, share: float) -> float | None:
        """The density at which a row costs a share of the bytes; None where it would skip all but everything."""
        density = round(ROWS[name].density(share, self.source, self.config(name)), 4)
        return density if _LEAST <= density < 1 else None

    def densities(self, name: str) -> dict[float, float]:
        """The densities of a row by the shares at which it can be made."""
        found = {share: self.density(name, share) for share in self.shares}
        return {share: density for share, density in found.items() if density is not None}


def is_trained(name: str) -> bool:
    """Whether a row is trained end to end."""
    return hasattr(load_method(ROWS[name].method), "start")

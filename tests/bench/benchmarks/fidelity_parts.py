"""The parts of the benchmark of where the loss sits: which masks are measured, each part of a group of windows a stage.

Nothing is trained, and every block has the same share, so that what is seen is the model's and not a method's.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.fidelity_runs import Masks, Runs, States, Taus, touched
from benchmarks.real_model_plans import Study
from records.folders import ROOT
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.stage import (
    Header,
    atomic_folder,
    hash_file,
    is_finished,
    read_json,
    write_header,
    write_json,
    write_tensors,
)
from sparsegate.converter.checkpoint.tensor_files import load_tensors
from sparsegate.converter.stats import Stats
from sparsegate.converter.stats.bins import cut
from sparsegate.converter.stats.collect import collect
from sparsegate.converter.text.windows import Batches

CHUNK = 8
"""Windows that run together."""
COSTS = (0.8, 0.667, 0.5)
MIDDLE = 0.667
"""The cost of single blocks and positions."""
HUGE = 10.0
"""A token is huge where the largest entry of a hidden state is this many times as large as that of the median token in
front of the same block (compare the massive activations of arXiv 2402.17762).
"""
WHOLE = ("dense", "kinds")
"""Parts that take whole windows."""
EXAMPLE, QUESTIONS = (ROOT / "examples" / name for name in ("compare_scores.py", "questions.txt"))
Shares = dict[str, float]
"""Kept shares: of neurons by the gate as `ffn`, of input channels by the linear's name."""


def _gate(cost: float) -> Shares:
    return {"ffn": (3 * cost - 1) / 2}


def _channels(cost: float) -> Shares:
    return {"gate_proj": cost, "up_proj": cost, "down_proj": cost}


def _fewer_down(cost: float) -> Shares:
    return {"gate_proj": cost + 0.08, "up_proj": cost + 0.08, "down_proj": cost - 0.16}


def _both(cost: float) -> Shares:
    return {"gate_proj": cost, "ffn": cost}


def _three(cost: float) -> Shares:
    return {"gate_proj": cost + 0.08, "ffn": cost + 0.08, "down_proj": cost - 0.16}


KINDS: dict[str, Callable[[float], Shares]] = {
    "gate": _gate,
    "channels": _channels,
    "channels, fewer of down": _fewer_down,
    "both": _both,
    "both, fewer of down": _three,
}
"""Kind of sparsity -> kept shares at a cost. `both`: input channels of the gate matrix, and neurons by the gate that
these give; of `down` the inputs of the down matrix by their own size, among the neurons that stay.
"""
SWEPT = ("gate", "channels")
"""Kinds that are masked block by block."""


@dataclass(frozen=True)
class Measured:
    """A part of a group of windows: losses [3, N, S - 1] (NLL, KL, equal argmax) and realised cost, by name."""

    losses: dict[str, Tensor]
    costs: dict[str, float]


@dataclass(frozen=True)
class Bench:
    """A study whose held-out windows run in groups of CHUNK: whole for the kinds of sparsity, and of each group the
    first `few` windows up to `short` tokens for what takes many runs.
    """

    study: Study
    few: int
    short: int
    scores: dict[str, list[str]]

    @cached_property
    def stats(self) -> Stats:
        study = self.study
        names = ["histogram:gate", "histogram:input"]
        return collect(study.source, study.calibration, names, study.work / "stats" / "fidelity", study.sizes.seed)

    @cached_property
    def model(self) -> Any:
        return self.study.model()

    @property
    def chunks(self) -> int:
        return -(-len(self.study.heldout.tokens) // CHUNK)

    @property
    def layers(self) -> int:
        return self.study.source.arch.size(self.study.source.config, "layers")

    def taus(self, kind: str, cost: float) -> Taus:
        """Thresholds of a kind in all blocks, from the calibration windows of the dense model."""
        found = {}
        for name, share in KINDS[kind](cost).items():
            score, form = ("gate", "ffn") if name == "ffn" else ("input", f"linear:{name}")
            for layer in range(self.layers):
                site = Site(layer, kind=form)
                found[site], _ = cut(self.stats[site][f"histogram:{score}.count"], share)
        return found

    @property
    def names(self) -> list[str]:
        """The parts of a group of windows, in the order in which they are measured."""
        blocks = [(form, kind, layer) for form in SWEEPS for kind in SWEPT for layer in range(self.layers)]
        return [*WHOLE, *(f"positions {kind}" for kind in SWEPT), *(" ".join(map(str, block)) for block in blocks)]

    def batches(self, number: int, name: str) -> Batches:
        """A group of windows, as long as a part takes them."""
        heldout, start = self.study.heldout, number * CHUNK
        count, length = (CHUNK, heldout.tokens.shape[1]) if name in WHOLE else (self.few, self.short)
        part = slice(start, start + min(count, CHUNK))
        return Batches(heldout.tokens[part, :length], heldout.mask[part, :length])

    def header(self, name: str, number: int) -> Header:
        config: dict[str, Any] = {"part": name, "calibration": self.study.calibration.sha256}
        if name == "kinds":
            config |= {"shares": {kind: [shares(cost) for cost in COSTS] for kind, shares in KINDS.items()}}
        elif name != "dense":
            config |= {"shares": KINDS[name.split()[1]](MIDDLE)}
        if name.startswith("positions"):
            config |= {"huge": HUGE}
        parents = {"model": self.study.source.fingerprint}
        return Header(format="losses", parents=parents, config=config, calibration=self.batches(number, name).sha256)

    def folder(self, name: str, number: int) -> Path:
        return self.study.work / "fidelity" / str(number) / name.replace(" ", "_")

    def is_measured(self, name: str, number: int) -> bool:
        return is_finished(self.folder(name, number), self.header(name, number))

    def measured(self, name: str, number: int) -> Measured:
        folder = self.folder(name, number)
        return Measured(load_tensors(folder / "losses.safetensors"), read_json(folder / "costs.json", "Stored costs"))


def measure(bench: Bench, is_over: Callable[[], bool]) -> None:
    """Store every part of every group of windows where it is not stored yet, until `is_over`."""
    for number in range(bench.chunks):
        runs: dict[int, Runs] = {}
        for name in bench.names:
            if bench.is_measured(name, number):
                continue
            if is_over():
                return
            tokens = bench.batches(number, name).tokens
            if tokens.shape[1] not in runs:
                runs = {tokens.shape[1]: Runs(bench.model, bench.study.source.arch, tokens)}
            found = _part(bench, runs[tokens.shape[1]], name)
            with atomic_folder(bench.folder(name, number)) as partial_folder:
                write_tensors(partial_folder / "losses.safetensors", found.losses)
                write_json(partial_folder / "costs.json", found.costs)
                write_header(partial_folder, bench.header(name, number))
            print(f"windows {number * CHUNK} on: {name}", flush=True)


def _part(bench: Bench, runs: Runs, name: str) -> Measured:
    if name == "dense":
        return Measured({"nll": runs.dense_nll(), "peaks": runs.peaks, "tokens": runs.tokens.clone()}, {})
    if name == "kinds":
        return _kinds(bench, runs)
    form, kind, *layer = name.split()
    taus = bench.taus(kind, MIDDLE)
    if form == "positions":
        states = {where: runs.run(Masks(taus, at)) for where, at in places(runs.peaks).items() if at.any()}
        return Measured(dict(zip(states, runs.losses(list(states.values())), strict=True)), {})
    return Measured({"losses": runs.losses([SWEEPS[form](runs, taus, int(*layer), kind)])[0]}, {})


def _kinds(bench: Bench, runs: Runs) -> Measured:
    masks = {f"{kind} {cost}": Masks(bench.taus(kind, cost)) for kind in KINDS for cost in COSTS}
    losses = runs.losses([runs.run(one) for one in masks.values()])
    costs = {name: touched(one.shares(), range(bench.layers)) for name, one in masks.items()}
    return Measured(dict(zip(masks, losses, strict=True)), costs)


def huge(peaks: Tensor) -> Tensor:
    """The tokens [N, S] that are huge in front of any block, of `peaks` [blocks, N, S]."""
    median = peaks.flatten(1).median(dim=1).values
    return (peaks > HUGE * median[:, None, None]).any(0)


def places(peaks: Tensor) -> dict[str, Tensor]:
    """Sets of positions [N, S], by what is said of them."""
    at = torch.arange(peaks.shape[-1]).expand(peaks.shape[1:])
    large = huge(peaks)
    return {
        "all": at >= 0,
        "all but the first": at >= 1,
        "all but the first four": at >= 4,
        "only the first": at < 1,
        "only the first four": at < 4,
        "only the second to fourth": (at >= 1) & (at < 4),
        "all but huge tokens": ~large,
        "only huge tokens": large,
        "only huge tokens after the first": large & (at >= 1),
    }


SWEEPS: dict[str, Callable[[Runs, Taus, int, str], States]] = {
    "alone": lambda runs, taus, layer, kind: runs.alone(taus, layer),
    "but": lambda runs, taus, layer, kind: runs.all_but(taus, layer, kind),
}
"""How blocks are masked one by one."""


# The comparison of scores


def compare_scores(bench: Bench, name: str) -> None:
    """Run the example of the comparison of scores with the words of `name`, a stage."""
    folder, header = _scores_stage(bench, name)
    if is_finished(folder, header):
        return
    study = bench.study
    words = [str(study.folder), "--text", str(study.heldout_file), "--calibration", str(study.text)]
    words += [*bench.scores[name], *(["--questions", str(QUESTIONS)] if "--answers" in bench.scores[name] else [])]
    with atomic_folder(folder) as partial_folder:
        runpy.run_path(str(EXAMPLE))["main"]([*words, "--out", str(partial_folder)])
        write_header(partial_folder, header)


def stored_scores(bench: Bench, name: str) -> dict[str, Any] | None:
    """What the comparison gave, where it has run."""
    folder, header = _scores_stage(bench, name)
    return read_json(folder / "scores.json", "The stored scores") if is_finished(folder, header) else None


def _scores_stage(bench: Bench, name: str) -> tuple[Path, Header]:
    study, words = bench.study, bench.scores[name]
    texts = {"calibration": hash_file(study.text), "heldout": hash_file(study.heldout_file)}
    parents = {"model": study.source.fingerprint, **texts}
    if "--answers" in words:
        parents["questions"] = hash_file(QUESTIONS)
    return study.work / "fidelity" / name, Header(format="scores", parents=parents, config={"words": words})

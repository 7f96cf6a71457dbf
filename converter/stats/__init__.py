"""Streaming statistics of a site. One file per statistic, one row per file; `collect.py` is the one pass that feeds
them.

1. A statistic's module exports `init(setup) -> state`, `update(state, values, keep, positions)` and
   `finish(state) -> {name: tensor}`. It is additive over batches, so that data-parallel runs only sum.
2. Its full name is `<statistic>:<score>`, and its tensors are stored as `<full name>.<tensor>`.
3. It belongs to the sites that its score's KIND names: feed-forward networks or linears.
4. The export FIELDS is optional: it names inner values that `update` finds in `state["fields"]`.
5. The export `settle(states by site, probe, score)` is optional: it looks once more, with all states of a layer summed
   and the block still in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ..arch.site import Site

STATS = {
    "histogram": ".histogram",
    "samples": ".samples",
    "moments": ".moments",
    "unit_histogram": ".unit_histogram",
    "dropped": ".dropped",
    "scale": ".scale",
    "greedy": ".greedy",
    "sizes": ".sizes",
}


@dataclass(frozen=True)
class StatSetup:
    """What a statistic is told at the start: widths d of the input, n of the score and `outputs` of what the site
    gives, the tokens it will see, the seed, and a folder for what does not fit in memory.
    """

    hidden: int
    units: int
    tokens: int
    seed: int
    folder: Path
    name: str
    outputs: int = 0


@dataclass(frozen=True)
class Probe:
    """A block in memory, and a few of the tokens that enter it.

    `block` gives its output [T, d] with the inputs of linears zeroed where |x_j| is not above {linear: tau [d_in]};
    `neurons` gives a score [T, n], the products z [T, n] and the down projection [n, d] of its dense network.
    """

    block: Callable[[Mapping[str, Tensor]], Tensor]
    neurons: Callable[[str], tuple[Tensor, Tensor, Tensor]]


def load_stat(name: str) -> tuple[Any, str]:
    """The module and the score's name of a full statistic name. Raises InputError for an unknown one."""
    kind, _, score = name.partition(":")
    if kind not in STATS:
        raise InputError(f"A statistic must be one of {', '.join(STATS)}, got {kind!r}. Mend the method's NEEDS.")
    return import_module(STATS[kind], __name__), score


def file_name(name: str) -> str:
    """The file of a statistic inside its site's folder."""
    return name.replace(":", ".") + ".safetensors"


class SiteStats(Mapping[str, Tensor]):
    """A site's tensors by `<statistic>:<score>.<tensor>`, read from disk when asked for."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self._files: dict[str, tuple[Path, str]] = {}
        for name in names:
            path = folder / file_name(name)
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    self._files[f"{name}.{key}"] = (path, key)

    def __getitem__(self, name: str) -> Tensor:
        path, key = self._files[name]
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


Stats = dict[Site, Mapping[str, Tensor]]


def of_kind(stats: Stats, kind: str) -> Stats:
    """The sites of one kind: `ffn` or `linear`."""
    return {site: tensors for site, tensors in stats.items() if site.kind.partition(":")[0] == kind}

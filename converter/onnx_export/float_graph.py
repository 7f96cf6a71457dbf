"""The float graph of a checkpoint as a stage of its own, known by what it is made of: checkpoints of the same weights
share one, whatever their plans.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import read_json
from ..checkpoint.source import CONFIGS, INDEX, TOKENIZER_FILES, Source, without_code
from ..checkpoint.sparsity import base_config
from ..checkpoint.stage import Header, atomic_folder, hash_json, is_finished, known_hash, read_header, write_header
from .base_graph import build_base, check_base, load_stock

COMPARED = (2, 32)
"""Rows and tokens, drawn at random, on which a graph is compared with torch where no text is at hand."""
_SEED = 0


def graph_header(checkpoint: Source, precision: str = "fp32", target: str = "cpu") -> Header:
    """The header of a checkpoint's float graph: of its `weights`, and of its `settings`, which are the configuration
    under the base model's names without the plan, the tokenizer's files and the generation settings.
    """
    folder, settings = checkpoint.folder, dict[str, Any]()
    for name in (*TOKENIZER_FILES, INDEX):
        if (folder / name).is_file():
            settings[name] = known_hash(folder / name)
    for name in CONFIGS:  # by their content: a checkpoint's name no code
        if (folder / name).is_file():
            raw = without_code(read_json(folder / name, name))
            settings[name] = base_config(raw) if name == "config.json" else raw
    files = sorted({info.file for info in checkpoint.tensors.values()})
    weights = hash_json({path.name: known_hash(path) for path in files})
    built = {} if target == "cpu" else {"precision": precision, "target": target}
    return Header(format="base", parents={"weights": weights, "settings": hash_json(settings)}, config=built)


def float_graph(
    checkpoint: Source,
    folder: Path,
    precision: str = "fp32",
    target: str = "cpu",
    check: Callable[[Path], Any] | None = None,
) -> Path:
    """The float graph of a checkpoint's dense model as the stage `folder`: taken where it is finished, else built, and
    refused by `check` where it is not the model; returns `folder`.

    `precision` is the builder's (`Precision.builder`). Without `check` a graph is compared with torch on random tokens;
    one for CUDA, which may not run here, by its twin in fp32. Raises InputError as `build_base` and `check_base`.
    """
    header = graph_header(checkpoint, precision, target)
    if is_finished(folder, header):
        return folder
    with atomic_folder(folder) as partial:
        build_base(checkpoint.folder, partial, precision, target)
        if check is None:
            _compare(checkpoint, partial, target)
        else:
            check(partial)
        write_header(partial, header)
    return folder


def check_same(folder: Path, header: Header) -> None:
    """Raise InputError where a folder holds the float graph of another checkpoint than `header`'s."""
    stored = read_header(folder)
    if stored is None or stored == header:
        return
    differs = next((name for name, value in header.parents.items() if stored.parents.get(name) != value), "target")
    raise InputError(
        f"base must be new or hold the float graph of this very checkpoint, got {folder}, a graph of other {differs}. "
        "Choose another folder, or none."
    )


def _compare(checkpoint: Source, graph: Path, target: str) -> None:
    config = checkpoint.config
    rows, length = COMPARED
    length = min(length, int(getattr(config, "max_position_embeddings", length)))
    tokens = torch.randint(
        checkpoint.arch.size(config, "vocab"), (rows, length), generator=torch.Generator().manual_seed(_SEED)
    )
    with TemporaryDirectory() as scratch:
        if target != "cpu":
            graph = build_base(checkpoint.folder, Path(scratch) / "fp32")
        check_base(graph, load_stock(checkpoint.folder), tokens)

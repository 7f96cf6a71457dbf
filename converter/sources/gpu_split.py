"""PowerInfer's side file `<model>.generated.gpuidx`, which says which neurons live on the GPU, and their placement.

It has `blk.N.gpu_idx` int32 [n], 0 or 1, `blk.N.gpu_bucket` int32 [k], where it is 1, and `split.vram_capacity` in
bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...runtime_onnx.errors import InputError
from .powerinfer_file import Tensors, gguf_package, write_file

CAPACITY = "split.vram_capacity"
SIDE_FILE = ".generated.gpuidx"
GROUP = 256  # neurons that are placed together


def place(counts: Mapping[int, Tensor], neurons: int) -> dict[int, Tensor]:
    """The neurons that a GPU with room for `neurons` of them holds: int32 [n] of 0 and 1 by layer.

    Each layer's neurons fall into groups of 256 by falling `counts` [n]; the groups with the largest sums are taken
    while they fit, the lower layer first where sums are equal.
    """
    order = {layer: values.sort(descending=True, stable=True).indices for layer, values in counts.items()}
    groups = [(float(counts[k][group].sum()), k, group) for k in sorted(order) for group in order[k].split(GROUP)]
    split = {layer: torch.zeros(len(values), dtype=torch.int32) for layer, values in sorted(counts.items())}
    for _, layer, group in sorted(groups, key=lambda item: (-item[0], item[1])):
        if len(group) <= neurons:
            split[layer][group] = 1
            neurons -= len(group)
    return split


def write_gpu_split(path: str | Path, split: Mapping[int, Tensor], vram_bytes: int) -> Path:
    """Write the side file of the model file `path` for `split`, int32 [n] of 0 and 1 by layer; returns the side file's
    path.

    Raises InputError for layers that are not 0, 1, 2 and so on, and for other values.
    """
    gguf, side = gguf_package(), Path(f"{path}{SIDE_FILE}")
    _check_split(side, dict(split))
    writer = gguf.GGUFWriter(None, "generic.gpu_index")
    writer.add_block_count(len(split))
    writer.add_uint64(CAPACITY, vram_bytes)

    def tensors() -> Tensors:
        for layer, index in sorted(split.items()):
            for name, values in (("gpu_idx", index), ("gpu_bucket", index.nonzero()[:, 0])):
                yield f"blk.{layer}.{name}", tuple(values.shape), lambda values=values: values.int()

    write_file(gguf, writer, side, tensors(), "int32")
    return side


def _check_split(side: Path, split: dict[int, Tensor]) -> None:
    if sorted(split) != list(range(len(split))) or not split:
        raise InputError(
            f"{side.name} must hold layers 0, 1, 2 and so on, got {', '.join(map(str, sorted(split))) or 'none'}. Give "
            "every layer."
        )
    for layer, index in split.items():
        if index.dim() != 1 or not bool(((index == 0) | (index == 1)).all()):
            raise InputError(
                f"blk.{layer}.gpu_idx must be a vector of 0 and 1, got other values for {side}. Make it again."
            )

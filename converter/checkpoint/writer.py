"""The only writer of weights: a source folder, a plan and perhaps new weights become a checkpoint folder.

Kinds that only gate leave the source's safetensors untouched; they are copied byte for byte. New weights keep names,
shapes and files.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import read_json, regular
from .plan import Plan, on_swaps
from .source import COPIED, HEAD, INDEX, SINGLE, Source, drop_code
from .sparsity import write_sparsity
from .stage import write_json, write_tensors

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""torch's dtypes by safetensors' names of them."""


def as_stored(source: Source, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` by name in the dtypes that the source's files have them in."""
    return {name: tensor.to(DTYPES[source.tensors[name].dtype]) for name, tensor in weights.items()}


def write_checkpoint(
    source: Source, plan: Plan, out: Path, weights: Mapping[str, Tensor] | None = None, untied: bool = False
) -> None:
    """Fill the folder `out` with a transformers checkpoint that holds the plan; no remote code and no pickle is carried
    over.

    1. `weights` replace the source's by name, in their own dtype.
    2. What the source's files lack is left out where it is tied to something that they hold.
    3. A source with swapped activations keeps them: `plan` is put on top.
    4. `untied` writes a tied source's head too, which `weights` must hold, beside the embedding.

    Raises InputError where `plan` gives one of those sites another activation without new weights, and for weights of
    another model.
    """
    fixed = {
        site: swapped
        for site, swapped in source.swaps.items()
        if weights is None or not (site in plan and plan[site].edits)
    }
    activation = source.arch.activation(source.config)
    plan = on_swaps(plan, fixed, activation)
    _check_weights(source, weights or {})
    for name in COPIED:
        if (source.folder / name).is_file():
            shutil.copyfile(regular(source.folder / name), out / name)
    drop_code(out)
    files = sorted({info.file for info in source.tensors.values()})
    for path in files:
        replaced = {name: tensor for name, tensor in (weights or {}).items() if _file_of(source, name, untied) == path}
        if not replaced:
            shutil.copyfile(path, out / path.name)
            continue
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata()
            held = {name: file.get_tensor(name) for name in names if name not in replaced}
        held |= {name: tensor.detach().cpu() for name, tensor in replaced.items()}
        write_tensors(
            out / path.name,
            {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in held.items()},
            metadata,
        )
    if [path.name for path in files] != [SINGLE]:
        shutil.copyfile(regular(source.folder / INDEX), out / INDEX)
    if untied:
        _untie(source, out)
    _name_dtype(out, weights or {})
    write_sparsity(out, plan, activation)


def _file_of(source: Source, name: str, untied: bool) -> Path | None:
    """The file of a weight, the embedding's for a head that is stored apart from now on; None for what has none."""
    if name == HEAD and untied and HEAD not in source.tensors:
        name = source.arch.embedding
    return source.tensors[name].file if name in source.tensors else None


def _untie(source: Source, out: Path) -> None:
    """Say in a written folder that its head is stored apart."""
    raw = read_json(out / "config.json", "config.json")
    write_json(out / "config.json", raw | {"tie_word_embeddings": False})
    if (out / INDEX).is_file():
        index = read_json(out / INDEX, INDEX)
        file = _file_of(source, HEAD, True)
        assert file is not None
        write_json(out / INDEX, index | {"weight_map": {**index["weight_map"], HEAD: file.name}})


def _check_weights(source: Source, weights: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if name in source.tensors:
            if source.tensors[name].shape != tuple(tensor.shape):
                raise InputError(
                    f"{name} must have shape {list(source.tensors[name].shape)}, got {list(tensor.shape)}. Take "
                    "weights of this very model."
                )
        elif not getattr(source.config, "tie_word_embeddings", False):
            raise InputError(
                f"New weights must be named as in {source.name}, got {name}, which it has not. Take weights of this "
                "very model."
            )


def _name_dtype(out: Path, weights: Mapping[str, Tensor]) -> None:
    """Name the dtype in config.json that transformers loads in: the new weights' one, where they have one."""
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in weights.values() if tensor.is_floating_point()}
    raw = read_json(out / "config.json", "config.json")
    if len(dtypes) == 1:
        raw.pop("torch_dtype", None)
        write_json(out / "config.json", raw | {"dtype": dtypes.pop()})

"""The only writer of weights: a source folder and a plan become a checkpoint folder.

Kinds that only gate leave the source's safetensors untouched; they are copied byte for byte.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from .checkpoint import write_sparsity
from .plans import Plan, on_swaps
from .source import INDEX, SINGLE, TOKENIZER_FILES, Source

_STOCK = (
    "config.json", "generation_config.json", *TOKENIZER_FILES,
    "LICENSE", "LICENSE.txt", "LICENSE.md", "LICENSE.PSF.txt", "USE_POLICY.md", "NOTICE",
)  # fmt: skip


def write_checkpoint(source: Source, plan: Plan, out: Path) -> None:
    """Fill the folder `out` with a transformers checkpoint that holds the plan; no remote code and no pickle is carried over.

    A source with swapped activations keeps them: `plan` is put on top. Raises InputError where it gives one of those sites another activation.
    """
    for name in _STOCK:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, out / name)
    files = sorted({info.file for info in source.tensors.values()})
    for path in files:
        shutil.copyfile(path, out / path.name)
    if [path.name for path in files] != [SINGLE]:
        shutil.copyfile(source.folder / INDEX, out / INDEX)
    write_sparsity(out, on_swaps(plan, source.swaps), source.arch.activation(source.config))

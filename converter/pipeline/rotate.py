"""A recipe's rotation of the model, before anything is planned: a stage from a model folder to one that computes the
same (`modeling.rotation`).
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.source import HEAD, Source, open_source
from ..checkpoint.sparsity import write_stock
from ..checkpoint.stage import CheckError, Header, atomic_folder, is_finished, write_header
from ..checkpoint.writer import write_checkpoint
from ..modeling.gated import load_dense
from ..modeling.rotation import AT_ONCE, error_bound, logit_error, principal_axes, rotated_weights
from ..progress import resumed, stage
from ..text.windows import Batches

ROTATED = "rotated"
"""The rotated model's folder below OUT.work."""
WINDOWS = 64
"""Full windows whose principal axes are taken, at most."""


def rotated(source: Source, batches: Batches, folder: Path, device: str = "cpu") -> Source:
    """The model of `source` with its residual stream on the principal axes of `batches`, as the stage `folder`.

    Raises InputError where the architecture cannot absorb a rotation, and CheckError where logits are not the model's.
    """
    header = Header(format="rotated", parents={"model": source.fingerprint}, calibration=batches.sha256)
    with stage("rotate"):
        if is_finished(folder, header):
            resumed()
        else:
            with atomic_folder(folder) as partial:
                _write(source, batches.tokens[batches.mask.all(1)][:WINDOWS], partial, device)
                write_header(partial, header)
    return replace(open_source(folder), id=source.id, revision=source.revision, label=source.name)


def _write(source: Source, tokens: Tensor, folder: Path, device: str) -> None:
    """Rotate, write, and compare the logits of one group of windows."""
    model = load_dense(source.folder).to(device)
    axes = principal_axes(model, source.arch, tokens)
    few = tokens[:AT_ONCE].to(device)
    with torch.no_grad():
        expected = model(input_ids=few, use_cache=False).logits
    del model
    gc.collect()  # a model and another one need not be held together
    untied = bool(getattr(source.config, "tie_word_embeddings", False)) or HEAD not in source.tensors
    write_checkpoint(source, {}, folder, dict(rotated_weights(source, axes)), untied)
    if not source.swaps:
        write_stock(folder)
    with torch.no_grad():
        logits = load_dense(folder).to(device)(input_ids=few, use_cache=False).logits
    error, bound = logit_error(logits, expected), error_bound(source)
    if not error <= bound:
        raise CheckError(
            f"The rotated model must have the model's logits within {bound:.0e} of their energy, got {error:.1e}. "
            "Leave rotate out."
        )

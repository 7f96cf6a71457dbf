"""Passes that keep the inputs of blocks instead of all activations and compute a block again when its gradient is taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from .artifact import InputError

SOURCE = "Chen et al. 2016, Training deep nets with sublinear memory cost (arXiv 1604.06174), one segment a block; torch's variant without reentry."


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Within the block, passes of a transformers model in evaluation mode checkpoint its blocks; gradients may be taken later.

    transformers checkpoints only blocks in training mode: that flag is set on the blocks themselves and not on what they hold, where dropout lies. What a
    block's parts append to lists is appended again when it is computed again. Raises InputError for a model without such blocks.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise InputError(f"Gradient checkpointing must find blocks that transformers can checkpoint, got {type(model).__name__}. Turn it off.")
    before = [block.training for block in blocks]
    try:
        for block in blocks:
            block.training, block.gradient_checkpointing = True, True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for block, training in zip(blocks, before, strict=True):
            block.training = training
            for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                vars(block).pop(name, None)

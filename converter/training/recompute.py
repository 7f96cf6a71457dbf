"""Passes that keep the inputs of blocks instead of all activations and compute a block again when its gradient is
taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ...runtime_onnx.errors import InputError
from ..modeling.taps import replace, replacements, restore

SOURCE = (
    "Chen et al. 2016, Training deep nets with sublinear memory cost (arXiv 1604.06174), one segment a block; "
    "torch's variant without reentry."
)


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Within the block, passes of a transformers model in evaluation mode checkpoint its blocks; gradients may be taken
    later.

    transformers checkpoints only blocks in training mode: that flag is set on the blocks themselves and not on what
    they hold, where dropout lies. A block is computed again with the `forward` functions that were set on its modules
    in the pass, also where they are gone by then. Those functions run twice: what they read must still be the same, and
    what they write is written again. Raises InputError for a model without such blocks.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise InputError(
            f"Gradient checkpointing must find blocks that transformers can checkpoint, got {type(model).__name__}. "
            "Turn it off."
        )
    before = [block.training for block in blocks]
    try:
        for block in blocks:
            block.training, block.gradient_checkpointing = True, True
            block._gradient_checkpointing_func = _checkpoint(block)
        yield
    finally:
        for block, training in zip(blocks, before, strict=True):
            block.training = training
            for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                vars(block).pop(name, None)


def _checkpoint(block: nn.Module) -> Callable[..., Any]:
    """What transformers calls with a block's forward and its inputs."""

    def run(function: Callable[..., Any], *inputs: Any) -> Any:
        again = _Forwards(block)
        return checkpoint(
            function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), again)
        )

    return run


class _Forwards:
    """The `forward` functions set on the modules of a block when this is made; a context, to be entered any number of
    times, in which they are set again.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block, self.then = block, replacements(block)

    def __enter__(self) -> None:
        self.now = replacements(self.block)
        self._set(self.then)

    def __exit__(self, *error: object) -> None:
        self._set(self.now)

    def _set(self, forwards: dict[nn.Module, Any]) -> None:
        for module in self.block.modules():
            restore(module)
        for module, forward in forwards.items():
            replace(module, forward)

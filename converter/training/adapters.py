"""What of a student is trained: every weight, or low-rank updates of the blocks' linear maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..arch import Arch
from ..modeling.lora import add_lora, linear_names, lora_tensors
from .settings import Recovery


def trainable(student: Any, arch: Arch, recovery: Recovery, seed: int) -> Callable[[], dict[str, Tensor]]:
    """Make ready what is trained, and return how to ask for it by name when the model is in its place."""
    if recovery.lora is None:
        return lambda: dict(student.named_parameters())
    student.requires_grad_(False)
    add_lora(student, block_linears(student, arch), recovery.lora.rank, recovery.lora.alpha, seed)
    return lambda: lora_tensors(student)


def block_linears(student: Any, arch: Arch) -> list[str]:
    """Names of the linear maps of all blocks."""
    return linear_names(student, arch.block.partition("{layer}")[0])

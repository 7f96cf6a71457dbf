"""Optimizers of named tensors: AdamW, or Muon for the matrices of hidden layers and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...runtime_onnx.errors import InputError
from ..modeling.distributed import is_sharded

SOURCE = (
    "Loshchilov, Hutter 2017, AdamW (arXiv 1711.05101). Jordan et al. 2024, Muon; rates matched to AdamW's by 0.2 "
    "sqrt(max(rows, columns)) after Liu et al. "
    "2025 (arXiv 2502.16982, section 2.2)."
)


class Trained(NamedTuple):
    """A trained leaf: its rate relative to the others', and whether it is a matrix of a hidden layer (no embedding, no
    head), which Muon may take.
    """

    tensor: Tensor
    share: float = 1.0
    hidden: bool = False


def make_optimizers(
    trained: Mapping[str, Trained], rate: float, optimizer: str, betas: tuple[float, float], weight_decay: float
) -> list[Optimizer]:
    """The optimizers of `trained`; every group of theirs has its peak rate as `peak`. Only matrices decay.

    `optimizer` adamw takes everything; muon takes the hidden matrices by Muon with momentum 0.95. Raises InputError
    where torch has no Muon.
    """
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise InputError(
            f"torch must have Muon (2.9 and later), got {torch.__version__}. Install a newer one, or take adamw."
        )
    groups: dict[tuple[bool, float, bool, bool], list[Tensor]] = {}
    for tensor, share, hidden in trained.values():
        by_muon = optimizer == "muon" and hidden and tensor.ndim == 2
        groups.setdefault((by_muon, share, tensor.ndim == 2, is_sharded(tensor)), []).append(tensor)
    made: list[Optimizer] = []
    for by_muon in (False, True):
        param_groups = [
            {
                "params": tensors,
                "lr": share * rate,
                "peak": share * rate,
                "weight_decay": weight_decay if matrix else 0.0,
            }
            for (muon, share, matrix, _), tensors in groups.items()
            if muon == by_muon
        ]
        if param_groups:
            made.append(
                torch.optim.Muon(param_groups, adjust_lr_fn="match_rms_adamw")
                if by_muon
                else torch.optim.AdamW(param_groups, betas=betas)
            )
    return made


def moments(optimizers: list[Optimizer], tensor: Tensor) -> dict[str, Tensor]:
    """What the optimizers remember of a tensor, by name; empty before its first step."""
    return next((one.state[tensor] for one in optimizers if tensor in one.state), {})


def remember(optimizers: list[Optimizer], tensor: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Make the entries of `moments`, zero and to be filled: counts [] on the CPU, everything else like the tensor."""
    one = next(
        one for one in optimizers if any(tensor is each for group in one.param_groups for each in group["params"])
    )
    one.state[tensor] = {name: torch.zeros(()) if name == "step" else torch.zeros_like(tensor) for name in names}
    return one.state[tensor]

"""Low-rank updates of linear maps, trained in place of whole weights: W + alpha / rank B A, as a parametrization of the
module's weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...runtime_onnx.errors import InputError
from .distributed import is_sharded

SOURCE = (
    "Hu et al. 2021, LoRA (arXiv 2106.09685), equation 3; A is drawn with variance 1 / d_in, so that A x has the "
    "rms of x."
)


class LowRank(nn.Module):
    """Maps a weight [out, in] to weight + `scale` B A with A [rank, in] and B [out, rank], in fp32 or, with a weight in
    fp64, in that.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.scale = scale
        self.a = nn.Parameter((torch.randn(rank, columns, generator=generator) / columns**0.5).to(weight.device, dtype))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=weight.device, dtype=dtype))

    def forward(self, weight: Tensor) -> Tensor:
        """The updated weight [out, in], in the weight's dtype."""
        return (weight + self.scale * (self.b @ self.a)).to(weight.dtype)


def linear_names(model: nn.Module, prefix: str = "") -> list[str]:
    """Names of the linear maps whose names start with `prefix`, in the model's order."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(prefix)]


def add_lora(model: nn.Module, names: Iterable[str], rank: int, alpha: float, seed: int) -> dict[str, Tensor]:
    """Give the named linear maps low-rank updates, which are 0 at first, and freeze the maps' own weights; returns
    `lora_tensors`.

    An update's start depends on the seed and the map's name alone. Raises InputError for a name that is no linear map
    or has an update already, and for no name.
    """
    names = list(names)
    modules = dict(model.named_modules())
    for name in names:
        if not isinstance(modules.get(name), nn.Linear):
            raise InputError(
                f"Low-rank updates must be given to linear maps, got {name} ({type(modules.get(name)).__name__}). "
                "Leave it out."
            )
        if parametrize.is_parametrized(modules[name], "weight"):
            raise InputError(f"A linear map must have one low-rank update, got another for {name}. Merge the first.")
    if not names:
        raise InputError(
            "Low-rank updates must be given to some linear map, got no name. Name one, or train the weights."
        )
    for name in names:
        module = cast(nn.Linear, modules[name])
        module.weight.requires_grad_(False)
        generator = torch.Generator().manual_seed(int(hashlib.sha256(f"{seed}.{name}".encode()).hexdigest()[:15], 16))
        parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank, alpha / rank, generator))
    return lora_tensors(model)


def lora_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trained leaves of a model's low-rank updates: `<map>.lora_a` [rank, in] and `<map>.lora_b` [out, rank]. Ask
    again after sharding.
    """
    tensors: dict[str, Tensor] = {}
    for name, update in _updates(model).items():
        tensors |= {f"{name}.lora_a": update.a, f"{name}.lora_b": update.b}
    return tensors


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Put the updates into the weights and take the parametrization away: module classes and names are those of before;
    merged weights stay frozen.

    Where weights are sharded the parametrization stays, with an update of 0; `plain_state` has the names of before.
    """
    modules = dict(model.named_modules())
    for name, update in _updates(model).items():
        module = cast(Any, modules[name])
        original = module.parametrizations.weight.original
        if is_sharded(original):
            original += (update.scale * (update.b @ update.a)).to(original.dtype)
            update.b.zero_()
            continue
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        module.weight.requires_grad_(False)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state under the names that it has without low-rank updates, which must be merged."""
    inside = ".parametrizations.weight."
    return {
        name.replace(f"{inside}original", ".weight"): tensor
        for name, tensor in model.state_dict().items()
        if f"{inside}0." not in name
    }


def _updates(model: nn.Module) -> dict[str, LowRank]:
    ending = ".parametrizations.weight.0"
    return {
        name.removesuffix(ending): module
        for name, module in model.named_modules()
        if isinstance(module, LowRank) and name.endswith(ending)
    }

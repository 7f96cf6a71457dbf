"""What training adds to a frozen linear map, beside it instead of in it: a low-rank update, or a whole weight in its
place.

A pass costs a frozen map its two products and no gradient of the weight. `modeling/lora.py` puts the same update into
the weight, which costs that gradient.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SOURCE = (
    "Hu et al. 2021, LoRA (arXiv 2106.09685), equation 3, with alpha = rank; A is drawn with variance 1 / d_in, so "
    "that A x has the rms of x."
)


@dataclass
class Update:
    """The trained tensors of one map, fp32: `a` [rank, in] and `b` [out, rank] of a low-rank update, or `weight`
    [out, in] in place of the map's own.
    """

    tensors: dict[str, Tensor]

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
        """The updated map's `rows` applied to x [..., in]: [..., rows], in x's dtype. `weight` [out, in] is the map's
        own.
        """
        bias = None if bias is None else bias[rows]
        if "weight" in self.tensors:
            return F.linear(x, self.tensors["weight"][rows].to(x.dtype), bias)
        narrow = F.linear(x, self.tensors["a"].to(x.dtype))
        return F.linear(x, weight[rows], bias) + F.linear(narrow, self.tensors["b"][rows].to(x.dtype))

    def merged(self, weight: Tensor) -> Tensor:
        """The updated weight [out, in] as one fp32 matrix on the CPU; `weight` is the map's own."""
        if "weight" in self.tensors:
            return self.tensors["weight"].detach().cpu().clone()
        return weight.detach().float().cpu() + (self.tensors["b"] @ self.tensors["a"]).detach().cpu()


def low_rank(name: str, weight: Tensor, rank: int, seed: int) -> Update:
    """A low-rank update that is 0 at first; its start depends on the seed and the map's name alone."""
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(int(hashlib.sha256(f"{seed}.{name}".encode()).hexdigest()[:15], 16))
    a = torch.randn(rank, columns, generator=generator) / columns**0.5
    leaves = {"a": a.to(weight.device), "b": torch.zeros(rows, rank, device=weight.device)}
    return Update({part: leaf.requires_grad_() for part, leaf in leaves.items()})


def whole(weight: Tensor) -> Update:
    """The weight itself, to be trained in fp32."""
    return Update({"weight": weight.detach().float().clone().requires_grad_()})

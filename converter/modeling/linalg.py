"""Linear algebra in fp64: ridge regression from accumulated Gram matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...runtime_onnx.errors import InputError


@dataclass
class Gram:
    """Sums over tokens of hidden^T hidden [r, r] and hidden^T target [r, d], fp64: all that a ridge regression needs,
    so batches need not be kept.
    """

    hidden: Tensor
    cross: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, rank: int, width: int) -> Gram:
        """No tokens yet; r = rank, d = width."""
        return cls(torch.zeros(rank, rank, dtype=torch.float64), torch.zeros(rank, width, dtype=torch.float64))

    def add(self, hidden: Tensor, target: Tensor) -> None:
        """Add tokens: hidden [T, r], target [T, d]."""
        wide = hidden.detach().cpu().double()
        self.hidden += wide.T @ wide
        self.cross += wide.T @ target.detach().cpu().double()
        self.tokens += len(hidden)

    def solve(self, l2: float) -> Tensor:
        """The weight B [r, d] fp64 that minimises norm(hidden B - target)^2 + l2 norm(B)^2.

        Where directions are not determined (l2 = 0 and dead columns of hidden), the solution of least norm. Raises
        InputError for a negative l2.
        """
        if not l2 >= 0:
            raise InputError(f"l2 must be at least 0, got {l2}. Give the penalty on squared weights.")
        matrix = self.hidden + l2 * torch.eye(len(self.hidden), dtype=torch.float64)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        diagonal = factor.diagonal().square()
        if not int(failed) and float(diagonal.min()) > 1e-12 * float(diagonal.max()):
            return torch.cholesky_solve(self.cross, factor)
        return torch.linalg.pinv(matrix, hermitian=True, rtol=1e-12) @ self.cross


def ridge(hidden: Tensor, target: Tensor, l2: float) -> Tensor:
    """The weight B [r, d] fp64 that minimises norm(hidden B - target)^2 + l2 norm(B)^2; hidden [T, r],
    target [T, d].
    """
    gram = Gram.empty(hidden.shape[1], target.shape[1])
    gram.add(hidden, target)
    return gram.solve(l2)

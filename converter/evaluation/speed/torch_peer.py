"""torch: the transformers model with its cache, and one MLP, both dense, in float32 or bfloat16."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...modeling.gated import load_dense

DTYPES = {"fp32": torch.float32}
"""Our precision -> torch's; bfloat16 for all that are smaller."""


def dtype_of(precision: str) -> torch.dtype:
    """What torch runs beside a precision of ours."""
    return DTYPES.get(precision, torch.bfloat16)


class Torch:
    """A Hugging Face folder in transformers, on the CPU."""

    def __init__(self, path: Path, threads: int, precision: str) -> None:
        torch.set_num_threads(threads)
        self._model = load_dense(path, dtype_of(precision))

    @torch.inference_mode()
    def run(self, ids: Sequence[int], following: Sequence[int]) -> tuple[float, float]:
        """Seconds of the prompt `ids` in one call with logits of its last token, and of the tokens `following` in one
        call each.
        """
        from transformers import DynamicCache

        cache, prompt = DynamicCache(config=self._model.config), torch.tensor([list(ids)])
        single = [torch.tensor([[token]]) for token in following]
        start = time.perf_counter()
        self._model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        for token in single:
            self._model(token, past_key_values=cache, use_cache=True)
        return middle - start, time.perf_counter() - middle


def open_mlp(
    weights: Mapping[str, NDArray[np.float32]], threads: int, precision: str
) -> Callable[[NDArray[np.float32]], Any]:
    """What runs x [t, d] through down(silu(gate x) * up x), weights [n, d] by role; x comes and y goes as
    numpy fp32.
    """
    torch.set_num_threads(threads)
    dtype = dtype_of(precision)
    gate, up, down = (torch.from_numpy(weights[role]).to(dtype) for role in ("w_gate", "w_up", "w_down"))
    down = down.T.contiguous()  # [d, n], as nn.Linear keeps it

    @torch.inference_mode()
    def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = torch.from_numpy(x).to(dtype)
        hidden = torch.nn.functional.silu(torch.nn.functional.linear(rows, gate)) * torch.nn.functional.linear(rows, up)
        return torch.nn.functional.linear(hidden, down).float().numpy()

    return run

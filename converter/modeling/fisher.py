"""What a small change of values inside a model costs at its output, to second order, for all places from one pass.

With the labels y drawn from the model's own distribution and g the gradient of the summed log p(y) by a value v, a
change e of v costs KL(p || p') = E_y[(g . e)^2] / 2, summed over the positions: E[g g^T] is the Fisher information.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .taps import tapped_outputs

SOURCE = (
    "Martens 2020, New Insights and Perspectives on the Natural Gradient Method, arXiv 1412.1193, sections 5 and 6: "
    "KL(p || p') = e^T F e / 2 + O(e^3), F = E_y[g g^T]"
)


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """The model's parameters take no gradients inside the block."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def fisher_gradients(
    model: Any, modules: Sequence[Any], tokens: Tensor, draws: int, generator: torch.Generator
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """For every draw of labels what the modules give [B, S, d], and the gradients [B, S, d] of the labels' summed log
    probability there, for windows [B, S] without padding.

    One forward with its graph serves all draws, one backward pass each.
    """
    values: list[Tensor] = [torch.empty(0)] * len(modules)
    leaves = list(values)

    def add_leaf(number: int, value: Tensor) -> Tensor:
        values[number] = value.detach()
        leaves[number] = torch.zeros_like(value, requires_grad=True)
        return value + leaves[number]

    taps = {module: partial(add_leaf, number) for number, module in enumerate(modules)}
    with torch.enable_grad(), frozen(model):
        with tapped_outputs(taps):
            logits = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        p = log_p.detach().exp()
        for draw in range(draws):
            labels = torch.multinomial(p, 1, generator=generator)
            chosen = log_p.gather(1, labels).sum()
            yield values, list(torch.autograd.grad(chosen, leaves, retain_graph=draw + 1 < draws))

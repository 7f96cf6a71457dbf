"""Windows, settings and loops that the tests of the analysis executor share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import VOCAB
from torch import Tensor

from sparsegate.converter.arch import Arch, load_arch
from sparsegate.converter.evaluation.analysis.setting import Outcome, Setting
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.scores import load_score
from sparsegate.converter.text.windows import Batches

LENGTH = 20
Make = Callable[[str], Path]


def windows(seed: int = 0, rows: int = 3, padded: bool = True) -> Batches:
    tokens = torch.randint(3, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(rows, LENGTH, dtype=torch.bool)
    if padded:
        mask[-1, 13:] = False
    return Batches(torch.where(mask, tokens, 0), mask)


def tiny(tiny_model: Make, model_type: str = "llama") -> tuple[Any, Arch]:
    return load_dense(tiny_model(model_type)), load_arch(model_type)


def every_score(name: str, density: float, label: str = "greedy", prompt: int = 6) -> Setting:
    module = load_score(name)
    if module.PHASE == "prompt":
        return Setting(name, density, positions="prefill", prompt=prompt, label=label)
    return Setting(
        name, density, kinds=("linear",) if getattr(module, "KIND", "ffn") == "linear" else ("ffn",), label=label
    )


def by_hand(
    model: Any, arch: Arch, batches: Batches, keep: Callable[[int, int, Tensor], Tensor], first: int = 0
) -> dict[str, float]:
    """Quality of one row and position after the other; `keep(row, layer, z [S, n])` says what stays."""
    found: dict[str, list[float]] = {name: [] for name in ("nll_dense", "nll", "kl", "agreement", "second_choice")}
    for row in range(len(batches.tokens)):
        tokens = batches.tokens[row][batches.mask[row]]
        hooks = [
            model.get_submodule(f"{arch.ffn_module(layer)}.{arch.ffn.down}").register_forward_pre_hook(
                lambda _, args, row=row, layer=layer: (args[0] * keep(row, layer, args[0][0]).float(),)
            )
            for layer in range(2)
        ]
        with torch.no_grad():
            sparse = model(input_ids=tokens[None]).logits[0]
            for hook in hooks:
                hook.remove()
            dense = model(input_ids=tokens[None]).logits[0]
        for t in range(first, len(tokens) - 1):
            p, q = (np.asarray(logits[t].double().softmax(-1)) for logits in (dense, sparse))
            order = np.argsort(-p)
            found["nll_dense"].append(-np.log(p[tokens[t + 1]]))
            found["nll"].append(-np.log(q[tokens[t + 1]]))
            found["kl"].append(float((p * (np.log(p) - np.log(q))).sum()))
            found["agreement"].append(float(q.argmax() == order[0]))
            found["second_choice"].append(float(q.argmax() == order[1]))
    return {name: float(np.mean(values)) for name, values in found.items()}


def check(outcome: Outcome, expected: dict[str, float], tokens: int) -> None:
    assert outcome.tokens == tokens
    for name, value in expected.items():
        assert getattr(outcome, name) == pytest.approx(value, rel=1e-4, abs=1e-5), name

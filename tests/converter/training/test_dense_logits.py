"""What the dense model says to windows: kept once, the same whenever they come again."""

from __future__ import annotations

import pytest
import torch
from models import VOCAB
from selection_cases import Load, logits, windows

from sparsegate.converter.methods.tune import Tune
from sparsegate.converter.modeling.losses import Kept, kept_divergence, kl_divergence
from sparsegate.converter.modeling.taps import tapped_outputs
from sparsegate.converter.training.dense_logits import DenseLogits


def test_kept_windows_need_no_second_pass(load: Load) -> None:
    model, tokens = load("llama")[0], windows(4)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    dense, passes = DenseLogits(model, Tune(precision="fp32", likeliest=5)), list[int]()
    with tapped_outputs({model.get_output_embeddings(): lambda y: passes.append(len(y))}):
        first = dense.of(tokens[:2], mask[:2])
        again = dense.of(tokens[[1, 2, 0]], mask[[1, 2, 0]])
        padded = mask.clone()
        padded[0, 5:] = False
        dense.of(tokens[:1], padded[:1])
    assert passes == [2, 1, 1], "one row for the new window, and one for the same tokens with other padding"
    assert isinstance(first, Kept) and isinstance(again, Kept)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other[[2, 0]])
    wide = logits(model, tokens[:2]).log_softmax(-1)
    assert torch.allclose(first.log_p, wide.gather(-1, first.tokens.long()), atol=1e-5)
    assert torch.allclose(first.rest, 1 - first.log_p.exp().sum(-1), atol=1e-5)


@pytest.mark.parametrize("count", [0, VOCAB + 5])
def test_whole_distributions(count: int, load: Load) -> None:
    model, tokens = load("llama")[0], windows(3)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    dense = DenseLogits(model, Tune(precision="fp32", likeliest=count))
    other = logits(load("llama")[0], tokens) * 1.1
    found = dense.of(tokens, mask)
    distance = kept_divergence(found, other) if isinstance(found, Kept) else kl_divergence(found, other)
    assert float(distance) == pytest.approx(float(kl_divergence(logits(model, tokens), other)), rel=1e-4)

"""Losses against their definitions, golden values and hand-made gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sparsegate.converter.modeling.losses import (
    dejavu_loss,
    dejavu_weight,
    expected_difference,
    keep_likeliest,
    kept_divergence,
    kl_divergence,
    straight_through,
    token_nll,
)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dejavu_case() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [64, 100] and labels with a tenth of positives: the draws of the golden value."""
    torch.manual_seed(0)
    logits = torch.randn(64, 100)
    return logits, torch.rand(64, 100) < 0.1


def test_f11_dejavu_loss_golden() -> None:
    logits, labels = dejavu_case()
    weight = dejavu_weight(labels)
    assert weight == pytest.approx(0.1109375, abs=1e-7)
    assert dejavu_weight(labels, margin=0) == pytest.approx(0.1059375, abs=1e-7)
    loss = dejavu_loss(logits, labels, weight)
    assert loss.item() == pytest.approx(0.1652327, abs=1e-7)
    y = labels.float()
    on_probabilities = F.binary_cross_entropy(torch.sigmoid(logits), y, weight=y * (1 - weight) + weight)
    each = torch.where(labels, torch.tensor(1.0), torch.tensor(weight))
    assert loss.item() == pytest.approx(on_probabilities.item(), abs=1e-6)
    assert loss.item() == pytest.approx(F.binary_cross_entropy_with_logits(logits, y, weight=each).item(), abs=1e-6)
    as_pos_weight = F.binary_cross_entropy_with_logits(logits, y, pos_weight=each)
    assert as_pos_weight.item() == pytest.approx(
        F.binary_cross_entropy_with_logits(logits, y).item(), abs=1e-6
    )  # unweighted in truth
    assert abs(as_pos_weight.item() - loss.item()) > 0.5


def test_dejavu_loss_takes_a_weight_per_unit() -> None:
    logits, labels = dejavu_case()
    weight = torch.linspace(0.1, 0.9, 100)
    by_unit = torch.stack([dejavu_loss(logits[:, i], labels[:, i], float(weight[i])) for i in range(100)])
    torch.testing.assert_close(dejavu_loss(logits, labels, weight), by_unit.mean())


def test_expected_difference_and_nll_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.5, 0.25])
    wanted = 0.5 * math.log(2)
    room = torch.full((3,), math.nan)
    for out in (None, room):
        assert expected_difference(p, p.log(), q.log(), out).item() == pytest.approx(wanted, abs=1e-6)
    assert math.isinf(expected_difference(q, q.log(), p.log()).item())
    logits, target = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 6, 3]] * 2)
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(2, 3)
    torch.testing.assert_close(token_nll(logits.log_softmax(-1), target), nll)
    wide = token_nll(logits, target, logits.double().logsumexp(-1))
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), nll)


def test_kl_divergence_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert kl_divergence(p.log()[None], q.log()[None] + 3.0).item() == pytest.approx(expected, abs=1e-6)
    assert kl_divergence(p.log()[None], p.log()[None]).item() == pytest.approx(0, abs=1e-7)


def test_kl_divergence_is_a_mean_over_the_masked_positions() -> None:
    torch.manual_seed(1)
    dense, sparse = torch.randn(3, 5, 11), torch.randn(3, 5, 11)
    mask = torch.rand(3, 5) < 0.6
    each = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=dense), torch.distributions.Categorical(logits=sparse)
    )
    assert kl_divergence(dense, sparse).item() == pytest.approx(each.mean().item(), abs=1e-6)
    assert kl_divergence(dense, sparse, mask).item() == pytest.approx(each[mask].mean().item(), abs=1e-6)
    assert abs(each[mask].mean().item() - each.mean().item()) > 1e-3
    with pytest.raises(ValueError, match="At least one position must count"):
        kl_divergence(dense, sparse, torch.zeros(3, 5, dtype=torch.bool))


def test_kl_divergence_gradient_is_q_minus_p() -> None:
    torch.manual_seed(2)
    dense, sparse = torch.randn(4, 7), torch.randn(4, 7, requires_grad=True)
    kl_divergence(dense, sparse).backward()
    torch.testing.assert_close(sparse.grad, (sparse.detach().softmax(-1) - dense.softmax(-1)) / 4)


def test_kl_divergence_with_tokens_ruled_out() -> None:
    torch.manual_seed(3)
    dense, sparse = torch.randn(2, 6), torch.randn(2, 6)
    padded = [torch.cat([x, torch.full((2, 3), -math.inf)], -1).requires_grad_() for x in (dense, sparse)]
    loss = kl_divergence(*padded)
    assert loss.item() == pytest.approx(kl_divergence(dense, sparse).item(), abs=1e-6)
    loss.backward()
    assert padded[1].grad is not None and bool(padded[1].grad.isfinite().all())


def test_kl_divergence_sums_half_precision_in_fp32() -> None:
    torch.manual_seed(4)
    dense, sparse = torch.randn(2, 4096, dtype=torch.bfloat16), torch.randn(2, 4096, dtype=torch.bfloat16)
    found = kl_divergence(dense, sparse)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(
        kl_divergence(dense.double(), sparse.double()).item(), abs=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_straight_through_is_hard_forward_and_soft_backward(dtype: torch.dtype) -> None:
    logits = (
        torch.cat([torch.linspace(-6, 6, 997), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 90.0, -90.0])])
        .to(dtype)
        .requires_grad_()
    )
    mask = straight_through(logits)
    assert mask.dtype == dtype and torch.equal(mask.detach(), (logits.detach() > 0).to(dtype))
    pull = torch.linspace(-1, 1, len(logits)).to(dtype)
    (mask * pull).sum().backward()
    s = torch.sigmoid(logits.detach())
    torch.testing.assert_close(logits.grad, pull * s * (1 - s))


def test_straight_through_gradient_reaches_units_that_are_off() -> None:
    logits = torch.tensor([-2.0, -0.1, 0.1, 2.0], requires_grad=True)
    straight_through(logits).sum().backward()
    assert logits.grad is not None
    assert bool((logits.grad > 0.1).all()) and logits.grad[1] > logits.grad[0] and logits.grad[2] > logits.grad[3]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_kept_divergence_counts_the_rest_as_one(count: int) -> None:
    dense, sparse = draw(2, 5, 8, seed=1), draw(2, 5, 8, seed=2).requires_grad_()
    kept = keep_likeliest(dense, count)
    p, q = dense.double().softmax(-1), sparse.detach().double().softmax(-1)
    order = p.argsort(-1, descending=True)
    p, q = p.gather(-1, order), q.gather(-1, order)
    pairs = [(p[..., k], q[..., k]) for k in range(count)]
    if count < 8:
        pairs.append((p[..., count:].sum(-1), q[..., count:].sum(-1)))
    expected = sum((a * (a.log() - b.log())).mean() for a, b in pairs)
    found = kept_divergence(kept, sparse)
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-4)
    assert float(found.detach()) <= float(kl_divergence(dense, sparse.detach())) + 1e-6
    (gradient,) = torch.autograd.grad(found, sparse)
    wide = sparse.detach().double().requires_grad_()
    named = torch.zeros(2, 5, 8, dtype=torch.bool).scatter_(-1, kept.tokens.long(), True)
    log_q = wide.log_softmax(-1)
    rest = log_q.exp().masked_fill(named, 0.0).sum(-1)
    loss = -(dense.double().softmax(-1) * log_q).masked_fill(~named, 0.0).sum(-1)
    if count < 8:
        loss = loss - dense.double().softmax(-1).masked_fill(named, 0.0).sum(-1) * rest.log()
    (exact,) = torch.autograd.grad(loss.mean(), wide)
    assert float((gradient - exact).abs().max()) < 1e-5
    mask = torch.tensor([[True] * 5, [True, False, False, True, False]])
    masked = kept_divergence(kept, sparse.detach(), mask)
    assert float(masked) == pytest.approx(
        float(kept_divergence(keep_likeliest(dense[mask], count), sparse.detach()[mask])), rel=1e-5
    )

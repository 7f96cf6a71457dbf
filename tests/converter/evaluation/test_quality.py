"""Measured quality against full softmaxes in fp64: values, standard errors, the stop rule, replays, and that memory
limits change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import VOCAB
from torch import Tensor

from sparsegate.converter.arch import load_arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Plan, SitePlan, Threshold, uniform_tau
from sparsegate.converter.evaluation import quality
from sparsegate.converter.evaluation.checks import ExecutorQuality
from sparsegate.converter.evaluation.quality import (
    Reference,
    Totals,
    clustered_error,
    measure_executor,
    measure_qualities,
    measure_quality,
    paired_rise,
)
from sparsegate.converter.modeling.gated import apply_plan, dense, load_dense, remove_plan
from sparsegate.converter.text.windows import Batches

N, LENGTH = 176, 24


def windows(rows: int = 20, short: bool = True) -> Batches:
    """Windows of which the second has padding, and the third a single token."""
    tokens = torch.randint(3, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if short:
        mask[1, 9:] = False
        mask[2, 1:] = False
    return Batches(tokens, mask)


def plan_of(tau: float) -> Plan:
    return {Site(layer): SitePlan(gate=Threshold("gate", uniform_tau(tau, N), 0.5)) for layer in range(2)}


PLANS = {"few": plan_of(0.4), "many": plan_of(1.2)}


def rows_of(batches: Batches) -> list[Tensor]:
    return [row[mask] for row, mask in zip(batches.tokens, batches.mask, strict=True) if int(mask.sum()) > 1]


@torch.no_grad()
def brute_force(model: Any, batches: Batches, original: Any | None = None) -> np.ndarray:
    """[windows, 5] fp64: tokens, NLL dense, NLL, KL, equal argmax of a gated model."""
    found = []
    for row in rows_of(batches):
        if original is None:
            with dense(model):
                p = model(input_ids=row[None]).logits[0, :-1].double().log_softmax(-1)
        else:
            p = original(input_ids=row[None]).logits[0, :-1].double().log_softmax(-1)
        q = model(input_ids=row[None]).logits[0, :-1].double().log_softmax(-1)
        target = row[1:, None]
        agree = (p.argmax(-1) == q.argmax(-1)).sum()
        found.append(
            [len(target), -p.gather(1, target).sum(), -q.gather(1, target).sum(), (p.exp() * (p - q)).sum(), agree]
        )
    return np.array(found, dtype=np.float64)


def values(found: quality.Quality) -> tuple[float, ...]:
    return found.nll_dense, found.nll, found.kl, found.agreement


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "phi", "phi3", "nemotron", "gpt2"])
def test_every_plan_equals_a_full_softmax(
    model_type: str, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through scaled logits, soft caps and biases of the head; types without an architecture file as ungated models."""
    monkeypatch.setattr(quality, "GROUP_TOKENS", 5 * LENGTH)
    monkeypatch.setattr(quality, "_LOGITS_AT_ONCE", 7 * VOCAB)
    model, batches = load_dense(tiny_model(model_type)), windows()
    if model_type in ("nemotron", "gpt2"):
        reference = Reference(model, batches)
        row = rows_of(batches)[0]
        with torch.no_grad():
            whole = model(input_ids=row[None]).logits[0, :-1].double()
            sides = [(rows, side) for window, rows, side in reference.sides(0) if window == 0]
        for rows, side in sides:
            top = side.logits.double() - side.normaliser[:, None]
            assert torch.allclose(top, whole[rows].log_softmax(-1), atol=2e-6, rtol=0)
        return
    arch = load_arch(model_type)
    found = measure_qualities(model, PLANS, batches, error=0.0)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)], "dense again"
    for name, plan in PLANS.items():
        apply_plan(model, plan, arch, arch.activation(model.config))
        sums = brute_force(model, batches)
        single = measure_quality(model, plan, batches, error=0.0)
        remove_plan(model)
        means = sums[:, 1:].sum(0) / sums[:, 0].sum()
        assert values(found[name]) == pytest.approx(tuple(means), rel=1e-6), name
        assert found[name].tokens == sums[:, 0].sum() == 18 * 23 + 8 and found[name].windows == 19
        assert single == found[name], "alone or with others"
        difference, share = sums[:, 2] - sums[:, 1], (sums[:, 2] - sums[:, 1]).sum() / sums[:, 0].sum()
        wanted = np.sqrt(19 / 18 * ((difference - share * sums[:, 0]) ** 2).sum()) / sums[:, 0].sum()
        assert found[name].nll_error == pytest.approx(wanted, rel=1e-5) and wanted > 1e-4
    assert found["few"].kl < found["many"].kl and found["few"].density > found["many"].density


def test_another_model_may_be_the_dense_one(tiny_model: Callable[[str], Path]) -> None:
    model, original, arch = load_dense(tiny_model("llama")), load_dense(tiny_model("qwen3")), load_arch("llama")
    found = measure_qualities(model, {"many": PLANS["many"]}, windows(), original, error=0.0)["many"]
    sums = brute_force(apply_plan(model, PLANS["many"], arch, "silu"), windows(), original)
    assert values(found) == pytest.approx(tuple(sums[:, 1:].sum(0) / sums[:, 0].sum()), rel=1e-6) and found.kl > 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [("_LOGITS_AT_ONCE", 1), ("_LOGITS_AT_ONCE", 5 * VOCAB), ("_LOGITS_IN_CACHE", 1), ("GROUP_TOKENS", 1)],
)
def test_limits_change_nothing(
    name: str, value: int, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_dense(tiny_model("gemma2"))
    wanted = measure_qualities(model, PLANS, windows(), error=0.0)
    monkeypatch.setattr(quality, name, value)
    for plan, found in measure_qualities(model, PLANS, windows(), error=0.0).items():
        assert values(found) == pytest.approx(values(wanted[plan]), rel=2e-6)
        assert (
            found.nll_error == pytest.approx(wanted[plan].nll_error, rel=1e-4) and found.windows == wanted[plan].windows
        )


@pytest.mark.parametrize("keep_bytes", [2e5, 1e9])
def test_a_kept_dense_side_gives_the_same(keep_bytes: float, tiny_model: Callable[[str], Path]) -> None:
    """Hidden states, then logits: the second plan finds them there."""
    model, arch = load_dense(tiny_model("llama")), load_arch("llama")
    reference = Reference(model, windows(), keep_bytes=keep_bytes)
    assert (reference.keeps_hidden, reference.keeps_logits) == (keep_bytes < 1e6, keep_bytes > 1e6)
    apply_plan(model, PLANS["many"], arch, "silu")
    first, second = (measure_quality(model, PLANS["many"], windows(), error=0.0, reference=reference) for _ in range(2))
    assert first == second == measure_quality(model, PLANS["many"], windows(), error=0.0)


def test_the_error_is_that_of_a_bootstrap_over_windows() -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(5, 40, 400).astype(np.float64)
    sums = counts * (0.3 + generator.normal(0, 0.2, 400))
    drawn = generator.integers(0, 400, (4000, 400))
    spread = (sums[drawn].sum(1) / counts[drawn].sum(1)).std()
    assert clustered_error(torch.from_numpy(sums), torch.from_numpy(counts)) == pytest.approx(spread, rel=0.04)
    equal = torch.full((400,), 23.0, dtype=torch.float64)
    drawn_values = torch.from_numpy(sums)
    assert clustered_error(drawn_values, equal) == pytest.approx(float((drawn_values / 23).std() / 20), rel=1e-12)


def test_measuring_stops_when_every_plan_is_known(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "GROUP_TOKENS", 4 * LENGTH)
    model, batches = load_dense(tiny_model("llama")), windows(120, short=False)
    every = measure_qualities(model, PLANS, batches, error=0.0)
    assert {found.windows for found in every.values()} == {120}
    worst = max(found.nll_error for found in every.values())
    assert min(found.nll_error for found in every.values()) < 0.8 * worst
    wanted = worst * 1.5  # reached by both after about 120 / 1.5^2 windows
    found = measure_qualities(model, PLANS, batches, error=wanted)
    count = found["few"].windows
    assert found["many"].windows == count and quality.LEAST_WINDOWS <= count < 90 and count % 4 == 0
    assert max(f.nll_error for f in found.values()) < wanted
    before = measure_qualities(model, PLANS, Batches(batches.tokens[: count - 4], batches.mask[: count - 4]), error=0.0)
    assert max(f.nll_error for f in before.values()) >= wanted, "not one group more than needed"
    again = measure_qualities(model, PLANS, Batches(batches.tokens[:count], batches.mask[:count]), error=0.0)
    assert again == found, "a replay on the same windows gives the same"
    assert measure_qualities(model, PLANS, batches, error=1e9)["few"].windows == quality.LEAST_WINDOWS
    assert measure_qualities(model, PLANS, batches, error=0.0, most=10 * 23)["few"].windows == 12


class _Torch:
    """An executor that is a torch model of its own."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, 0

    def reset(self) -> None:
        """Every call starts anew."""

    @torch.no_grad()
    def __call__(self, ids: Any) -> Any:
        self.calls += 1
        return self.model(input_ids=torch.as_tensor(ids)[None]).logits[0].numpy()


def test_executors_are_measured_on_one_dense_pass(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "_LOGITS_AT_ONCE", 7 * VOCAB)
    arch, batches = load_arch("llama"), windows(60, short=False)
    model = apply_plan(load_dense(tiny_model("llama")), PLANS["many"], arch, "silu")
    other = apply_plan(load_dense(tiny_model("llama")), PLANS["few"], arch, "silu")
    executor = _Torch(other)
    found = measure_executor(executor, model, batches, count=10)  # type: ignore[arg-type]
    first = Batches(batches.tokens[:10], batches.mask[:10])
    sparse, onnx = brute_force(model, first), brute_force(other, first)
    assert (found.tokens, found.windows, executor.calls) == (230, 10, 10), (
        "a window runs once, however many chunks it has"
    )
    assert found.nll_torch == pytest.approx(sparse[:, 2].sum() / 230, rel=1e-6)
    assert (found.nll, found.kl, found.agreement) == pytest.approx(tuple(onnx[:, 2:].sum(0) / 230), rel=1e-6)
    known = measure_executor(executor, model, batches, count=10, nll_torch=found.nll_torch)  # type: ignore[arg-type]
    assert known == found, "without the sparse torch model's pass"
    assert measure_executor(executor, model, batches, count=None, error=1e9).windows == 60, "one group"  # type: ignore[arg-type]


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(quality.InputError, match="a window of two tokens or more, got none"):
        Totals().means()


def test_two_files_are_compared_in_pairs_on_the_windows_that_both_have() -> None:
    generator = np.random.default_rng(3)
    counts, dense_rises, own = generator.integers(5, 30, 7), generator.normal(2, 5, 7), generator.normal(0.5, 0.1, 7)
    fields = {"tokens": 1, "nll_torch": 1.0, "nll": 1.0, "kl": 0.0, "agreement": 1.0}
    dense_file = ExecutorQuality(
        **fields, rises=[(int(n), float(rise)) for n, rise in zip(counts, dense_rises, strict=True)]
    )
    sparse_file = ExecutorQuality(
        **fields, rises=[(int(n), float(rise)) for n, rise in zip(counts[:5], (dense_rises + own)[:5], strict=True)]
    )
    paired = paired_rise(sparse_file, dense_file)
    n, sums = counts[:5], own[:5]
    mean = sums.sum() / n.sum()
    expected = np.sqrt(5 / 4 * np.square(sums - mean * n).sum()) / n.sum()
    assert paired is not None and paired == pytest.approx((mean, expected))
    assert clustered_error(torch.tensor(dense_rises), torch.tensor(counts)) > 10 * expected, (
        "what the windows share cancels"
    )
    assert paired_rise(ExecutorQuality(**fields), dense_file) is None
    assert paired_rise(
        sparse_file.model_copy(update={"rises": [(4, 2.0)]}), dense_file.model_copy(update={"rises": [(4, 1.0)]})
    ) == (0.25, None)

"""The training loop: schedule, order of windows, resume to the same bits, and AdamW against its formula."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsegate.converter.checkpoint.stage import Header, write_json
from sparsegate.converter.text.windows import Batches
from sparsegate.converter.training import loop as training
from sparsegate.converter.training.loop import train
from sparsegate.converter.training.optimizers import Trained
from sparsegate.converter.training.settings import Recovery, Settings, settings_of
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.untrusted import read_json

HEADER = Header(format="test")
RATES = {"a": 1.0, "b": 0.25}
WINDOWS = Batches(
    torch.randint(0, 50, (12, 4), generator=torch.Generator().manual_seed(5)), torch.ones(12, 4, dtype=torch.bool)
)


class Quadratic:
    """|a - c(tokens)|^2 / 8 + (1 + memory) |b|^4 / 8, fp64; `memory` is carried from step to step beside the tensors.
    `cut` raises in that step.
    """

    def __init__(
        self, cut: int | None = None, twist: Callable[[Tensor, int], Tensor] = lambda loss, step: loss
    ) -> None:
        g = torch.Generator().manual_seed(1)
        self.tensors = {
            name: torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
            for name, shape in {"a": (3, 4), "b": (5,)}.items()
        }
        self.memory, self.cut, self.twist = 0.0, cut, twist
        self.seen: list[tuple[int, list[list[int]]]] = []

    def parameters(self) -> dict[str, tuple[Tensor, float] | Trained]:
        return {"a": Trained(self.tensors["a"], RATES["a"], hidden=True), "b": (self.tensors["b"], RATES["b"])}

    def loss(self, tokens: Tensor, mask: Tensor, step: int) -> Tensor:
        if step == self.cut:
            raise KeyboardInterrupt
        assert mask.shape == tokens.shape and bool(mask.all())
        self.seen.append((step, tokens.tolist()))
        a, b = self.tensors.values()
        value = ((a - tokens.double().mean(0) / 25).square().sum() + (1 + self.memory) * b.square().sum().square()) / 8
        self.memory = 0.5 * self.memory + float(value.detach()) / 7
        return self.twist(value, step)

    def after(self, step: int) -> dict[str, float]:
        return {"memory": self.memory}

    def state(self) -> dict[str, float]:
        return {"memory": self.memory}

    def restore(self, state: dict[str, float]) -> None:
        self.memory = state["memory"]

    @property
    def values(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.tensors.items()}


def asked(**changes: float | str) -> Settings:
    return Settings(**({"steps": 40, "windows": 3, "rate": 0.05, "warm_up": 4, "levels": 2, "save_every": 8} | changes))  # type: ignore[arg-type]


def run(
    objective: Quadratic, folder: Path, settings: Settings | None = None, header: Header = HEADER
) -> tuple[list[dict[str, float]], list[int]]:
    levels: list[int] = []
    return train(objective, WINDOWS, settings or asked(), folder, header, levels.append), levels


# Schedule


def test_factor_by_hand() -> None:
    settings = Settings(steps=20, windows=1, rate=1.0, warm_up=2, levels=2, floor=0.2)
    assert settings.bounds() == [10, 20]
    level = [1 / 3, 2 / 3, *(0.2 + 0.8 * left / 8 for left in (8, 7, 6, 5, 4, 3, 2, 1))]
    assert [settings.factor(step) for step in range(20)] == pytest.approx(level + level)


def test_cosine_by_hand() -> None:
    found = Settings(steps=16, windows=1, rate=1.0, warm_up=4, floor=0.2, schedule="cosine")
    assert [found.factor(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [found.factor(step) for step in (4, 6, 8, 10)] == pytest.approx([1.0, 0.6 + 0.4 * 0.8660254, 0.8, 0.6])
    assert found.factor(14) == pytest.approx(0.6 - 0.4 * 0.8660254)


@given(
    st.integers(1, 200), st.integers(1, 4), st.integers(0, 60), st.floats(0, 1), st.sampled_from(["linear", "cosine"])
)
@settings(max_examples=40)
def test_factor_rises_to_one_and_falls_to_the_floor_in_every_level(
    steps: int, levels: int, warm_up: int, floor: float, schedule: str
) -> None:
    found = Settings(
        steps=steps * levels, windows=1, rate=1.0, warm_up=warm_up, levels=levels, floor=floor, schedule=schedule
    )  # type: ignore[arg-type]
    assert found.bounds() == [steps * (k + 1) for k in range(levels)]
    factors = [found.factor(step) for step in range(steps * levels)]
    one = factors[:steps]
    assert factors == one * levels, "every level runs alike"
    peak = one.index(max(one))
    assert one[peak] == pytest.approx(1.0) and peak == min(warm_up, steps // 4), (
        "warm-up takes a quarter of a level at most"
    )
    assert one[: peak + 1] == sorted(one[: peak + 1]) and one[peak:] == sorted(one[peak:], reverse=True)
    last = 1 / (steps - peak)
    last = last if schedule == "linear" else math.sin(math.pi / 2 * last) ** 2
    assert min(one[peak:]) >= floor and one[-1] - floor == pytest.approx((1 - floor) * last, abs=1e-12)


# Order of the windows


def test_every_window_comes_once_a_pass_in_an_order_of_its_own(tmp_path: Path) -> None:
    objective = Quadratic()
    run(objective, tmp_path, asked(windows=3))
    rows = [row for _, step in objective.seen for row in map(tuple, step)]
    passes = [rows[k : k + 12] for k in range(0, len(rows), 12)]
    assert len(passes) == 10 and all(sorted(one) == sorted(map(tuple, WINDOWS.tokens.tolist())) for one in passes)
    assert len({tuple(one) for one in passes}) == 10, "no pass repeats another's order"


def test_windows_that_fill_no_step_are_others_in_every_pass(tmp_path: Path) -> None:
    objective = Quadratic()
    run(objective, tmp_path, asked(windows=5, steps=60))
    for k in range(0, 60, 2):
        rows = [tuple(row) for _, step in objective.seen[k : k + 2] for row in step]
        assert len(set(rows)) == 10
    counts = Counter(tuple(row) for _, step in objective.seen for row in step)
    assert len(counts) == 12 and min(counts.values()) > 15


def test_order_depends_on_seed_and_step_only(tmp_path: Path) -> None:
    def order(name: str, **changes: float) -> list[tuple[int, list[list[int]]]]:
        objective = Quadratic()
        run(objective, tmp_path / name, asked(**changes))
        return objective.seen

    first = order("a")
    torch.manual_seed(123)  # the process's own generator plays no part
    assert order("b", rate=0.5, levels=1, save_every=3, steps=20) == first[:20]
    assert order("c", seed=1) != first


def test_more_windows_a_step_than_there_are(tmp_path: Path) -> None:
    objective = Quadratic()
    run(objective, tmp_path, asked(windows=100, steps=4))
    assert all(sorted(step) == sorted(WINDOWS.tokens.tolist()) for _, step in objective.seen)


# Resume


@pytest.mark.parametrize(
    ("cut", "changes"),
    [
        *((cut, {}) for cut in (3, 8, 13, 20, 21, 39)),
        (13, {"accumulate": 2}),
        (21, {"optimizer": "muon", "weight_decay": 0.1}),
        (21, {"optimizer": "muon", "accumulate": 3, "schedule": "cosine", "betas": (0.9, 0.95)}),
    ],
)
def test_an_interrupted_run_ends_with_the_same_bits(cut: int, changes: dict[str, Any], tmp_path: Path) -> None:
    whole, wanted = Quadratic(), asked(**changes)
    curve, levels = run(whole, tmp_path / "whole", wanted)
    assert levels == [0, 1] and [row["step"] for row in curve] == [10, 20, 30, 40]
    with pytest.raises(KeyboardInterrupt):
        run(Quadratic(cut), tmp_path / "cut", wanted)
    resumed = Quadratic()
    again, _ = run(resumed, tmp_path / "cut", wanted)
    assert resumed.seen[0][0] == cut // 8 * 8, "it goes on from the last stored step"
    assert again == curve and resumed.memory == whole.memory
    assert all(torch.equal(resumed.values[name], value) for name, value in whole.values.items())


@pytest.mark.parametrize("forgotten", ["moments", "memory", "step"])
def test_control_a_resume_that_forgets_something_ends_elsewhere(
    forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Quadratic()
    run(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Quadratic(13), tmp_path / "cut")
    resumed = Quadratic()
    if forgotten == "memory":
        monkeypatch.setattr(resumed, "restore", lambda state: None)
    else:
        plain = torch.optim.AdamW.step

        def step(self: torch.optim.AdamW, *arguments: object) -> object:
            for moments in self.state.values() if not getattr(self, "told", False) else ():
                for name in ("exp_avg", "exp_avg_sq") if forgotten == "moments" else ("step",):
                    moments[name].zero_()
            self.told = True  # type: ignore[attr-defined]
            return plain(self)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run(resumed, tmp_path / "cut")
    assert any(not torch.allclose(resumed.values[name], value, rtol=1e-6) for name, value in whole.values.items())


def test_levels_end_at_their_steps_and_not_again(tmp_path: Path) -> None:
    levels: list[tuple[int, int]] = []

    def go(cut: int | None) -> None:
        objective = Quadratic(cut)
        train(
            objective,
            WINDOWS,
            asked(levels=3, steps=42),
            tmp_path,
            HEADER,
            lambda level: levels.append((level, objective.seen[-1][0] + 1)),
        )

    with pytest.raises(KeyboardInterrupt):
        go(30)
    go(None)
    assert levels == [(0, 14), (1, 28), (1, 28), (2, 42)], "stored after step 24: level 1 ends anew, level 0 does not"


def test_another_header_starts_anew_and_removes_the_other_state(tmp_path: Path) -> None:
    whole = Quadratic()
    curve, _ = run(whole, tmp_path / "whole")
    other = HEADER.model_copy(update={"seed": 1})
    for header in (HEADER, other):  # both stored nothing, or not their own, before they were cut
        with pytest.raises(KeyboardInterrupt):
            run(Quadratic(13 if header == HEADER else 5), tmp_path / "cut", header=header)
    again = Quadratic()
    assert run(again, tmp_path / "cut")[0] == curve
    assert again.seen[0][0] == 0, "the first run's state is gone: what it left elsewhere may have been overwritten"
    assert all(torch.equal(again.values[name], value) for name, value in whole.values.items())


def test_the_state_is_stored_by_the_clock_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cut(Quadratic):
        def after(self, step: int) -> dict[str, float]:
            clock[0] += 7.0
            return super().after(step)

    clock = [100.0]
    monkeypatch.setattr(training, "monotonic", lambda: clock[0])
    wanted = asked(save_every=100, save_seconds=20.0, timed=True)
    with pytest.raises(KeyboardInterrupt):
        run(Cut(14), tmp_path, wanted)
    assert read_json(tmp_path / "training.json", "state")["step"] == 12, "21 seconds are three steps"
    clock[0] = 5.0  # another process's clock
    resumed = Cut()
    curve, _ = run(resumed, tmp_path, wanted)
    assert resumed.seen[0][0] == 12
    assert [row["seconds"] for row in curve] == [70.0, 140.0, 210.0, 280.0], "as if it had not been cut"
    assert [row["tokens"] for row in curve] == [10 * 12, 20 * 12, 30 * 12, 40 * 12]


def test_a_state_of_another_version_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Quadratic(13), tmp_path)
    write_json(tmp_path / "training.json", read_json(tmp_path / "training.json", "state") | {"version": 1})
    again = Quadratic()
    run(again, tmp_path)
    assert again.seen[0][0] == 0


# Micro-batches


class Masked:
    """Mean over positions that are not padding of (w . f(token) - token / 50)^2, fp64; tensor `idle` gets
    no gradient.
    """

    def __init__(self, weighs: bool = True) -> None:
        g = torch.Generator().manual_seed(2)
        self.w, self.idle = (
            torch.randn(6, generator=g, dtype=torch.float64).requires_grad_(),
            torch.ones(2, requires_grad=True),
        )
        self.weighs, self.calls = weighs, 0

    def parameters(self) -> dict[str, tuple[Tensor, float]]:
        return {"w": (self.w, 1.0), "idle": (self.idle, 1.0)}

    def loss(self, tokens: Tensor, mask: Tensor, step: int) -> Tensor:
        self.calls += 1
        features = torch.cos(tokens[..., None].double() * torch.arange(1, 7))
        return ((features @ self.w - tokens / 50).square() * mask).sum() / mask.sum()

    def after(self, step: int) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: dict[str, float]) -> None:
        assert not state


def padded() -> Batches:
    mask = torch.arange(4)[None] < torch.tensor([4, 1, 2, 4, 3, 1, 4, 4, 2, 1, 4, 3])[:, None]
    return Batches(WINDOWS.tokens, mask)


@pytest.mark.parametrize(("windows", "accumulate", "calls"), [(2, 3, 3), (4, 2, 2), (1, 6, 6), (6, 9, 2)])
def test_micro_batches_are_one_batch(windows: int, accumulate: int, calls: int, tmp_path: Path) -> None:
    joint, parts = Masked(), Masked()
    whole = min(windows * accumulate, 12)
    expected = train(joint, padded(), asked(windows=whole, levels=1), tmp_path / "a", HEADER, lambda level: None)
    curve = train(
        parts,
        padded(),
        asked(windows=windows, accumulate=accumulate, levels=1),
        tmp_path / "b",
        HEADER,
        lambda level: None,
    )
    assert parts.calls == 40 * calls and joint.calls == 40
    assert float((parts.w - joint.w).detach().abs().max()) < 1e-12 and torch.equal(parts.idle, torch.ones(2))
    assert [row["loss"] for row in curve] == pytest.approx([row["loss"] for row in expected], rel=1e-12)
    assert [row["tokens"] for row in curve] == [row["tokens"] for row in expected] and curve[-1][
        "tokens"
    ] < 40 * whole * 4


def test_control_micro_batches_weigh_by_positions(tmp_path: Path) -> None:
    joint, parts = Masked(), Masked()
    train(joint, padded(), asked(windows=6), tmp_path / "a", HEADER, lambda level: None)
    even = Batches(padded().tokens, torch.ones(12, 4, dtype=torch.bool))
    plain, masks = (
        parts.loss,
        {tuple(row.tolist()): mask for row, mask in zip(padded().tokens, padded().mask, strict=True)},
    )
    parts.loss = lambda tokens, mask, step: plain(
        tokens, torch.stack([masks[tuple(row)] for row in tokens.tolist()]), step
    )  # type: ignore[method-assign]
    train(parts, even, asked(windows=2, accumulate=3), tmp_path / "b", HEADER, lambda level: None)
    assert float((parts.w - joint.w).detach().abs().max()) > 1e-3, "a mean of means is another"


def test_a_tensor_without_gradient_resumes(tmp_path: Path) -> None:
    whole, cut = Masked(), Masked()
    train(whole, padded(), asked(), tmp_path / "a", HEADER, lambda level: None)
    plain = cut.loss
    cut.loss = lambda tokens, mask, step: plain(tokens, mask, step) if step < 13 else int("cut")  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(ValueError, match="cut"):
        train(cut, padded(), asked(), tmp_path / "b", HEADER, lambda level: None)
    again = Masked()
    train(again, padded(), asked(), tmp_path / "b", HEADER, lambda level: None)
    assert again.calls == 32 and torch.equal(again.w, whole.w) and torch.equal(again.idle, whole.idle)


# Settings


def test_settings_of_a_recipe() -> None:
    found = settings_of(
        Recovery(
            steps=7,
            windows=3,
            accumulate=4,
            rate=0.3,
            floor=0.2,
            warm_up=2,
            schedule="linear",
            optimizer="muon",
            betas=(0.8, 0.7),
            weight_decay=0.1,
        ),
        seed=9,
    )
    assert found == Settings(7, 3, 0.3, 2, 1, 0.2, 9, 100, 4, "linear", "muon", (0.8, 0.7), 0.1, 1.0, 60.0, True)


def test_defaults_are_plain_adamw_bit_for_bit(tmp_path: Path) -> None:
    trained, plain = Quadratic(), Quadratic()
    run(trained, tmp_path)
    groups = [{"params": [plain.tensors[name]], "lr": 0.05 * share} for name, share in RATES.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    for step, rows in trained.seen:
        inside = step % 20
        for group, share in zip(optimizer.param_groups, RATES.values(), strict=True):
            group["lr"] = share * 0.05 * ((inside + 1) / 5 if inside < 4 else 0.05 + (1 - 0.05) * (20 - inside) / 16)
        loss = plain.loss(torch.tensor(rows), torch.ones(3, 4, dtype=torch.bool), step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(plain.tensors.values()), 1.0)
        optimizer.step()
    assert all(torch.equal(plain.values[name], value) for name, value in trained.values.items())
    other = Quadratic()
    run(other, tmp_path / "other", asked(betas=(0.9, 0.95)))
    assert any(not torch.equal(other.values[name], value) for name, value in trained.values.items())


# Numbers


@pytest.mark.parametrize(("bad", "word"), [(float("nan"), "loss"), (float("inf"), "loss"), (0.0, "gradient")])
def test_numbers_that_are_not_finite(bad: float, word: str, tmp_path: Path) -> None:
    def twist(loss: Tensor, step: int) -> Tensor:
        if step != 11:
            return loss
        return loss * bad if word == "loss" else loss + 0 * (loss * 0).sqrt()  # the root's slope at 0 is infinite

    objective = Quadratic(twist=twist)
    with pytest.raises(InputError, match=rf"{word} must be .*finite.* at step 11\. Lower the rate\.$"):
        run(objective, tmp_path)
    assert all(bool(value.isfinite().all()) for value in objective.values.values()), "tensors are not touched"


@pytest.mark.parametrize("clip", [True, False])
def test_adamw_against_its_formula(clip: bool, tmp_path: Path) -> None:
    trained = Quadratic()
    run(trained, tmp_path)
    by_hand, windows, norms = Quadratic(), {step: torch.tensor(rows) for step, rows in trained.seen}, []
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in by_hand.values.items()}
    for step in range(40):
        value = by_hand.loss(windows[step], torch.ones(3, 4, dtype=torch.bool), step)
        gradients = dict(zip(RATES, torch.autograd.grad(value, list(by_hand.tensors.values())), strict=True))
        norms.append(float(sum(g.square().sum() for g in gradients.values()) ** 0.5))
        inside = step % 20
        factor = (inside + 1) / 5 if inside < 4 else 0.05 + 0.95 * (20 - inside) / 16
        for name, gradient in gradients.items():
            gradient = gradient * min(1.0, 1.0 / (norms[-1] + 1e-6)) if clip else gradient
            first, second = moments[name]
            first, second = 0.9 * first + 0.1 * gradient, 0.98 * second + 0.02 * gradient.square()
            moments[name] = first, second
            change = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.98 ** (step + 1))).sqrt() + 1e-8)
            by_hand.tensors[name].data -= 0.05 * factor * RATES[name] * change
    assert max(norms) > 1.5 and min(norms) < 0.9, "some gradients are clipped and some are not"
    error = max(float((by_hand.values[name] - value).abs().max()) for name, value in trained.values.items())
    assert error < 1e-12 if clip else error > 1e-3

"""What enters, leaves and is computed by modules, watched and changed; afterwards all is as it was."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsegate.converter.modeling.taps import (
    linear_by_parts,
    masked,
    replace,
    replaced,
    replacements,
    restore,
    tapped_inputs,
    tapped_outputs,
)


class Pair(nn.Module):
    """x -> (2 x + shift, x)."""

    def forward(self, x: Tensor, shift: float = 0.0) -> tuple[Tensor, Tensor]:
        return 2 * x + shift, x


def hooks(module: nn.Module) -> int:
    return len(module._forward_pre_hooks) + len(module._forward_hooks)


def test_replaced_nests_and_respects_a_forward_that_was_set() -> None:
    module, x = nn.Identity(), torch.ones(2)
    own = lambda x: x + 10  # noqa: E731
    replace(module, own)
    with replaced({module: lambda x: x * 3}):
        before = module.forward
        assert replacements(nn.Sequential(module, nn.Identity())) == {module: before}
        with replaced({module: lambda x: before(x) + 1}):
            assert module(x).tolist() == [4, 4]
        assert module(x).tolist() == [3, 3]
    assert vars(module)["forward"] is own and module(x).tolist() == [11, 11]
    restore(module)
    assert "forward" not in vars(module) and module(x).tolist() == [1, 1]
    restore(module)
    with replaced({module: own}):
        assert module(x).tolist() == [11, 11]
    assert "forward" not in vars(module)


def test_inputs_are_watched_and_changed() -> None:
    module, seen = Pair(), []
    with tapped_inputs({module: seen.append}):
        assert module(torch.ones(1), shift=1.0)[0] == 3
        with tapped_inputs({module: lambda x: x + 1}):
            assert module(torch.ones(1), 1.0)[0] == 5
        assert module(x=torch.zeros(1))[0] == 0  # no positional argument: not seen
    assert [float(x) for x in seen] == [1, 1]
    assert module(torch.ones(1))[0] == 2


def test_outputs_are_watched_and_changed() -> None:
    pair, identity, seen = Pair(), nn.Identity(), []
    with tapped_outputs({pair: lambda y: y - 1, identity: lambda y: y * 5}), tapped_outputs({pair: seen.append}):
        changed, x = pair(torch.ones(1))
        assert changed == 1 and x == 1 and identity(torch.ones(1)) == 5
    assert [float(y) for y in seen] == [1]
    assert pair(torch.ones(1))[0] == 2 and identity(torch.ones(1)) == 1


@pytest.mark.parametrize("context", [replaced, tapped_inputs, tapped_outputs])
def test_an_exception_leaves_the_modules_as_they_were(context: Any) -> None:
    first, second = nn.Identity(), nn.Identity()

    def refuse(x: Tensor) -> Tensor:
        raise ArithmeticError

    manager: AbstractContextManager[None] = context({first: refuse, second: refuse})
    with pytest.raises(ArithmeticError), manager:
        first(torch.ones(1))
    assert hooks(first) == hooks(second) == 0 and not {"forward"} & (vars(first).keys() | vars(second).keys())
    assert first(torch.ones(1)) == 1


def test_masked_drops_what_is_not_finite() -> None:
    values = torch.tensor([1.0, torch.inf, torch.nan], dtype=torch.bfloat16)
    dropped = masked(values, torch.tensor([True, False, False]))
    assert dropped.tolist() == [1, 0, 0] and dropped.dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [False, True])
def test_parts_of_a_linear_have_inputs_of_their_own(bias: bool) -> None:
    torch.manual_seed(0)
    linear, x, other = nn.Linear(4, 6, bias=bias), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    y = linear_by_parts(linear, [slice(0, 2), slice(2, 6)], [x, other])
    assert torch.allclose(y, torch.cat([linear(x)[..., :2], linear(other)[..., 2:]], dim=-1), atol=1e-6)
    assert torch.equal(linear_by_parts(linear, [slice(None)], [x]), linear(x))

"""The one judgement end to end: an executor's NLL against torch's, window by window, beside what rounding alone does to
torch.

1. Logits of a deep thresholded model can't be equal: rounding moves a score over its threshold, and everything after it
   moves along.
2. What rounding does is therefore measured in the same run: torch once more, with noise of the executor's kind on every
   gated op's input.
3. The mean difference of an executor that computes the same model lies within STANDARD_ERRORS standard errors of that
   noise. A wrong wiring lies far outside.
4. Crossings are rare and their effects differ much. So the standard error is that of the noise's and the executor's
   differences together: a single window can't raise an alarm, a shift of all does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...runtime_onnx.ops.vocabulary import GROUP
from ...runtime_onnx.session import Decoder
from ..modeling.gated import gated_modules, gates_of
from ..modeling.taps import tapped_inputs
from ..text.windows import Batches
from .checks import ACTIVATION_NLL, NLL_BOUND, Check
from .quality import Reference, onnx_logits, torch_logits
from .quality import compare as compare_windows

WINDOWS, LENGTH = 32, 128
"""Windows that are compared, and their tokens at most."""
STANDARD_ERRORS = 3.0
LAST_BITS = 2.0**-21
"""Relative noise on an op's input: what float32 sums of a few hundred terms before it differ by between two executors.
"""
ACTIVATION_KL = 0.05
"""Nats per token that rounding activations to 8 bits or half precision outside the ops may cost, beside ACTIVATION_NLL;
measured on the bundled model: .0003 to .002 with one op a layer, .024 with six, whose thresholds pass rounding on.
"""

Noise = Callable[[Tensor], Tensor]


def last_bits(seed: int) -> Noise:
    """Uniform relative noise of LAST_BITS."""
    generator = torch.Generator().manual_seed(seed)

    def put(x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=generator, dtype=torch.float32) * 2 - 1
        return x * (1 + LAST_BITS * noise.to(x.device, x.dtype))

    return put


def eight_bits(x: Tensor) -> Tensor:
    """X [..., d] rounded to int8 in groups of 32 channels, as kernels with integer weights do."""
    width = x.shape[-1]
    grouped = F.pad(x, (0, -width % GROUP)).unflatten(-1, (-1, GROUP))
    step = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return ((grouped / step).round() * step).flatten(-2)[..., :width]


def half_precision(x: Tensor) -> Tensor:
    """X rounded to float16."""
    return x.half().to(x.dtype)


@torch.no_grad()
def compare(name: str, decoder: Decoder, model: Any, batches: Batches, noise: Noise, rounded: bool) -> list[Check]:
    """The judgement on one executor, on the first WINDOWS full windows; where activations are `rounded` outside the ops
    too, also on its divergence.

    `model` is gated and holds the file's weights; `noise` is of the executor's kind.
    """
    tokens = batches.tokens[batches.mask.all(1)][:WINDOWS, :LENGTH]
    noisy, executed = _sums(decoder, model, tokens, noise)
    count = executed[:, 0]
    torch_nll, noisy_nll, nll, noise_kl, kl = (
        sums / count for sums in (executed[:, 1], noisy[:, 2], executed[:, 2], noisy[:, 3], executed[:, 3])
    )
    noise_error, error = standard_error(noisy_nll - torch_nll), standard_error(nll - torch_nll)
    off, moved = abs(float((nll - torch_nll).mean())), abs(float((noisy_nll - torch_nll).mean()))
    bound = STANDARD_ERRORS * (noise_error**2 + error**2) ** 0.5 + (moved + ACTIVATION_NLL if rounded else NLL_BOUND)
    note = (
        f"NLL {float(nll.mean()):.4f} (torch {float(torch_nll.mean()):.4f}) over {len(tokens)} windows; noise alone "
        f"{moved:.2g} +- {noise_error:.2g}; "
        f"KL from torch {float(kl.mean()):.2g}, noise alone {float(noise_kl.mean()):.2g}"
    )
    checks = [Check(name=f"{name} NLL", value=off, bound=bound, passed=off <= bound, note=note)]
    if rounded:
        value, most = max(float(kl.mean()), 0.0), ACTIVATION_KL + STANDARD_ERRORS * float(noise_kl.mean())
        checks.append(
            Check(
                name=f"{name} KL",
                value=value,
                bound=most,
                passed=value <= most,
                note="from torch with the same weights",
            )
        )
    return checks


def _sums(decoder: Decoder, model: Any, tokens: Tensor, noise: Noise) -> Tensor:
    """Sums [2, N, 5] as `quality.compare` gives them over windows [N, T], from the gated torch model to itself under
    noise and to the executor.
    """
    gates, parts = gates_of(model), []
    reference = Reference(model, Batches(tokens, torch.ones_like(tokens, dtype=torch.bool)), gates=gates)
    for number, group in enumerate(reference.groups):
        with noised(model, noise):
            noisy = torch_logits(model, gates, group)
        parts.append(compare_windows(reference, number, [noisy, onnx_logits(decoder, group)]))
    return torch.cat(parts, dim=1)


def standard_error(differences: Tensor) -> float:
    """Standard error of the mean of differences [N]; 0 of a single one, which has none."""
    if len(differences) < 2:
        return 0.0
    return float(differences.double().std() / len(differences) ** 0.5)


@contextmanager
def noised(model: Any, noise: Noise) -> Iterator[None]:
    """Noise on what enters the model's gated modules, inside the block."""
    with tapped_inputs(dict.fromkeys(gated_modules(model), noise)):
        yield

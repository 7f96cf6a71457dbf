"""Greedy answers under masks, by the protocol of "Achieving Sparse Activation in Small Language Models", arXiv
2406.06562.

The prompt's pass runs dense and gives the answer's first token; token t >= 1 is made under the mask of step t. A dense
mask of step t comes from the dense model's own answer up to there (for oracles with its token t as label), whatever the
sparse model has written by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ....runtime_onnx.errors import InputError
from ...arch import Arch
from ...arch.site import Site
from ...modeling.taps import Fields, tapped
from ...text.windows import Batches
from .dense import DenseRun, moments, score_site, taus
from .executor import Choice
from .setting import Setting, check


@torch.no_grad()
def sparse_answers(
    model: Any,
    arch: Arch,
    prompts: Tensor,
    new: int,
    settings: Sequence[Setting],
    calibration: Batches | None = None,
    steps: int = 10,
) -> tuple[Tensor, list[Tensor]]:
    """The dense model's greedy answers [B, new] to prompts [B, P], and those of every setting; their positions and
    prompt fields are not looked at.

    Answers do not stop at an end of text. Raises InputError for fewer than two new tokens.
    """
    if new < 2:
        raise InputError(
            f"new must be at least 2, got {new}: the first token of an answer is always dense. Ask for more tokens."
        )
    length = prompts.shape[1]
    settings = [replace(setting, positions="prefill", prompt=length) for setting in settings]
    for setting in settings:
        check(setting, length + new, calibration is not None)
    prompts = prompts.to(model.device)
    dense = _generate(model, prompts, new)
    windows = torch.cat([prompts, dense[:, :-1]], dim=1).cpu()
    up_moments = moments(model, arch, settings, calibration)
    seen = DenseRun(model, arch, windows, torch.ones_like(windows, dtype=torch.bool), settings, up_moments, steps)
    answers = []
    for setting, tau in zip(settings, taus(model, arch, settings, calibration, up_moments, steps), strict=True):
        choice = Choice(setting, tau)
        answers.append(
            _generate(
                model,
                prompts,
                new,
                _Steps(arch, choice, choice.all(seen.scores(setting)) if setting.source == "dense" else None, seen),
            )
        )
    return dense, answers


class _Steps:
    """Masks of one setting at single steps: those of the dense run at `position`, or by the scores of the
    step itself.
    """

    def __init__(self, arch: Arch, choice: Choice, fixed: dict[Site, Tensor] | None, dense: DenseRun) -> None:
        self.arch, self.choice, self.fixed, self.moments, self.position = arch, choice, fixed, dense.moments, 0

    def see(self, site: Site, fields: Fields) -> Tensor:
        if self.fixed is not None:
            return self.fixed[site][:, self.position : self.position + 1]
        return self.choice.one(site, score_site(self.choice.setting.score, site, fields, self.moments))


def _generate(model: Any, prompts: Tensor, new: int, steps: _Steps | None = None) -> Tensor:
    """Greedy tokens [B, new] with a cache, the prompt's pass dense."""
    out = model(input_ids=prompts, use_cache=True)
    tokens = [out.logits[:, -1].argmax(-1)]
    for t in range(1, new):
        if steps is None:
            out = model(input_ids=tokens[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
        else:
            steps.position = prompts.shape[1] + t - 1
            with tapped(model, steps.arch, steps.choice.setting.kinds, steps.see):
                out = model(input_ids=tokens[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
        tokens.append(out.logits[:, -1].argmax(-1))
    return torch.stack(tokens, dim=1)

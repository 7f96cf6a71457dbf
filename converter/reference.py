"""The torch executor: a dense transformers model whose feed-forward modules multiply by the plan's mask, and `load`.

It computes every neuron and zeroes those that are skipped, so it is the reference for quality, not for speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .arch import Arch, Site, load_arch
from .artifact import InputError, read_json
from .blocks import ffn_down, ffn_parts
from .checkpoint import read_sparsity
from .plans import Entry, Plan, Predictor, Threshold
from .source import first_line

NEAR = 1e-5
"""A score within NEAR * (|tau| + rms of its row) of its threshold is near: executors that round differently may disagree there."""


@dataclass
class Recorder:
    """What the gated modules saw: kept and seen units by site, and per site the tokens [B, S] with a score near its threshold, of the last call."""

    kept: dict[Site, int] = field(default_factory=dict)
    seen: dict[Site, int] = field(default_factory=dict)
    near: dict[Site, Tensor] = field(default_factory=dict)

    def density(self) -> dict[Site, float]:
        """Realised share of kept units by site."""
        return {site: self.kept[site] / self.seen[site] for site in self.seen}


def threshold_scores(entry: Threshold, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """|act(gate)| [..., n], and no residual."""
    return gate.abs(), None


def predictor_scores(entry: Predictor, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """fc2 relu(fc1 x) [..., n], and residual^T relu(fc1 x) [..., d] where there is one."""
    inner = F.relu(x @ entry.fc1.T)
    return inner @ entry.fc2.T, None if entry.residual is None else inner @ entry.residual


EXECUTORS = {Threshold: threshold_scores, Predictor: predictor_scores}


class _Gated:
    """The forward of one gated feed-forward module."""

    def __init__(self, site: Site, entry: Entry, arch: Arch, activation: str, module: Any) -> None:
        self.site, self.arch, self.activation, self.module = site, arch, activation, module
        self.entry = entry
        self.enabled = True
        self.recorder: Recorder | None = None

    def __call__(self, x: Tensor) -> Tensor:
        parts = ffn_parts(self.module, self.arch, self.activation, x)
        if not self.enabled:
            return ffn_down(self.module, self.arch, parts.z)
        # scores and thresholds stay fp32 in a half-precision model, as in the op
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.entry.tau.device != x.device or self.entry.tau.dtype != wide:
            moved = {name: t.to(x.device, wide) for name, t in vars(self.entry).items() if isinstance(t, Tensor)}
            self.entry = type(self.entry)(**(vars(self.entry) | moved))
        scores, residual = EXECUTORS[type(self.entry)](self.entry, parts.gate.to(wide), x.to(wide))  # type: ignore[arg-type]
        keep = scores > self.entry.tau
        if self.recorder is not None:
            self._record(scores, keep)
        y = ffn_down(self.module, self.arch, torch.where(keep, parts.z, torch.zeros((), dtype=parts.z.dtype, device=x.device)))
        return y if residual is None else y + residual.to(y.dtype)

    def _record(self, scores: Tensor, keep: Tensor) -> None:
        record = self.recorder
        assert record is not None
        record.kept[self.site] = record.kept.get(self.site, 0) + int(keep.sum())
        record.seen[self.site] = record.seen.get(self.site, 0) + keep.numel()
        room = NEAR * (self.entry.tau.abs() + scores.square().mean(-1, keepdim=True).sqrt())
        record.near[self.site] = ((scores - self.entry.tau).abs() <= room).any(-1)


def apply_plan(model: Any, plan: Plan, arch: Arch, activation: str) -> Any:
    """Gate a transformers model in place: every site's feed-forward module gets the plan's mask. Weights and their names stay as they are.

    Raises InputError, before anything is changed, for a site or a shape that the model does not have.
    """
    sites, units, hidden = arch.sites(model.config), arch.size(model.config, "units"), arch.size(model.config, "hidden")
    for site, entries in plan.items():
        if site not in sites or len(entries) != 1:
            raise InputError(
                f"A plan must hold one entry a site for sites up to {sites[-1].key}, got {len(entries)} for {site.key}. Take the plan of this very model."
            )
        found = {role: tuple(t.shape) for role, t in entries[0].tensors().items()}
        width = (entries[0].rank,) if isinstance(entries[0], Predictor) else ()
        expected = {"tau": (units,), "predictor.fc1.weight": (*width, hidden), "predictor.fc2.weight": (units, *width), "residual.weight": (*width, hidden)}
        for role, shape in found.items():
            if shape != expected[role]:
                raise InputError(f"{site.key}.{role} must have shape {list(expected[role])}, got {list(shape)}. Take the plan of this very model.")
    for site, (entry,) in plan.items():
        module = model.get_submodule(arch.ffn_module(site.layer))
        module.forward = _Gated(site, entry, arch, activation, module)
    return model


def remove_plan(model: Any) -> Any:
    """Make a gated model dense again."""
    for gated in _gated(model):
        del gated.module.forward
    return model


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The sparse checkpoint at `path` as a transformers model with its gating, `generate` included. Raises InputError for anything that is not one."""
    folder = Path(path)
    plan, activations = read_sparsity(folder)
    model = load_dense(folder, dtype)
    arch = load_arch(str(read_json(folder / "config.json", "config.json").get("model_type")))
    activation = arch.activation(model.config)
    for key, named in activations.items():
        if named != activation:
            raise InputError(f"{key}'s activation must be {activation} as in the base model, got {named}. Update sparsegate or convert again.")
    return apply_plan(model, plan, arch, activation)


def load_dense(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The stock transformers model of a folder, in evaluation mode. Raises InputError with transformers' own reason when it does not load."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True).eval()
    except Exception as error:  # transformers raises many kinds for damaged folders
        raise InputError(f"The model must load from {folder}, got: {first_line(error)}. Fetch the folder again.") from error


def _gated(model: Any) -> list[_Gated]:
    return [module.forward for module in model.modules() if isinstance(getattr(module, "forward", None), _Gated)]


@contextmanager
def dense(model: Any) -> Iterator[Any]:
    """The model with its gating switched off inside the block; blocks nest."""
    before = [(gated, gated.enabled) for gated in _gated(model)]
    for gated, _ in before:
        gated.enabled = False
    try:
        yield model
    finally:
        for gated, enabled in before:
            gated.enabled = enabled


@contextmanager
def recording(model: Any) -> Iterator[Recorder]:
    """A Recorder that sees what the gated modules do inside the block."""
    recorder = Recorder()
    gated = _gated(model)
    for g in gated:
        g.recorder = recorder
    try:
        yield recorder
    finally:
        for g in gated:
            g.recorder = None

"""The torch executor: a dense transformers model whose feed-forward and linear modules apply the plan's masks, and
`load`.

It computes every neuron and zeroes those that are skipped, and multiplies whole inputs with skipped channels zeroed:
the reference for quality, not for speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.ops.activation import is_relu, jump
from ...runtime_onnx.untrusted import read_json
from ..arch import PREFIX, Arch, load_arch
from ..arch.shapes import linear_rows, linear_shapes
from ..arch.site import Site
from ..checkpoint.plan import Entry, Plan, Predictor, Swap, Threshold, activation_at, check_plan, deciding
from ..checkpoint.source import check_weights
from ..checkpoint.sparsity import read_sparsity
from ..checkpoint.tensor_files import first_line
from .blocks import ffn_activation, ffn_down, ffn_parts, ffn_products
from .swapped import register

NEAR = 1e-5
"""A score within NEAR * (|tau| + rms of its row) of its threshold is near: executors that round differently may
disagree there.
"""


@dataclass
class Recorder:
    """What the gated modules saw: kept and seen units (neurons, or a linear's input channels) by site, and per site the
    tokens [B, S] with a score near its threshold, of the last call, unless `counts_only`. `opened` counts the non-zero
    gates of sites that keep what is not zero.
    """

    kept: dict[Site, int] = field(default_factory=dict)
    seen: dict[Site, int] = field(default_factory=dict)
    near: dict[Site, Tensor] = field(default_factory=dict)
    opened: dict[Site, int] = field(default_factory=dict)
    counts_only: bool = False

    def density(self) -> dict[Site, float]:
        """Realised share of kept units by site."""
        return {site: self.kept[site] / self.seen[site] for site in self.seen}

    def opened_share(self) -> dict[Site, float]:
        """Realised share of units whose up projection is needed, of the sites that keep what is not zero."""
        return {site: count / self.seen[site] for site, count in self.opened.items()}

    def add(self, site: Site, scores: Tensor, tau: Tensor, keep: Tensor, faint: float = 0.0) -> None:
        """Count the kept units of scores [..., n] against tau [n]; a threshold of at most `faint` times the scores' rms
        is never near.
        """
        self.count(site, keep)
        if self.counts_only:
            return
        near = is_near(scores, tau)
        self.near[site] = (near & (tau > faint * _rms(scores)) if faint else near).any(-1)

    def count(self, site: Site, keep: Tensor) -> None:
        """Count the kept units [..., n]."""
        self.kept[site] = self.kept.get(site, 0) + int(keep.count_nonzero())
        self.seen[site] = self.seen.get(site, 0) + keep.numel()


def is_near(scores: Tensor, tau: Tensor | float) -> Tensor:
    """Which of scores [..., n] lie so close to tau, [n] or one for all, that executors may disagree."""
    distance = (scores - tau).abs()
    return (distance <= NEAR * (abs(tau) + _rms(scores))) & distance.isfinite()


def _rms(scores: Tensor) -> Tensor:
    return scores.square().mean(-1, keepdim=True).sqrt()


def threshold_scores(entry: Threshold, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """|act(gate)| [..., n], and residual^T relu(fc1 x) [..., d] where there is one; at a linear site |x|
    [..., d_in].
    """
    if entry.score == "input":
        return x.abs(), None
    if entry.fc1 is None or entry.residual is None:
        return gate.abs(), None
    return gate.abs(), F.relu(x @ entry.fc1.T) @ entry.residual


def predictor_scores(entry: Predictor, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """fc2 relu(fc1 x) [..., n], and residual^T relu(fc1 x) [..., d] where there is one."""
    inner = F.relu(x @ entry.fc1.T)
    return inner @ entry.fc2.T, None if entry.residual is None else inner @ entry.residual


def exact_scores(entry: Swap, z: Tensor, x: Tensor) -> tuple[Tensor, None]:
    """|z| [..., n], which has no threshold: what is not 0 is kept. The others take the gate; a swap, which sees z,
    needs no other decision.
    """
    return z.abs(), None


EXECUTORS = {Threshold: threshold_scores, Predictor: predictor_scores, Swap: exact_scores}


def _on_device(entry: Threshold | Predictor, device: torch.device, dtype: torch.dtype) -> Threshold | Predictor:
    """The entry with its tensors where the activations are; itself when they already are."""
    if entry.tau.device == device and entry.tau.dtype == dtype:
        return entry
    moved = {name: t.to(device, dtype) for name, t in vars(entry).items() if isinstance(t, Tensor)}
    return replace(entry, **moved)


class _Gated:
    """The forward of one gated feed-forward module; `base` is the stock model's activation, which is what an ungated
    stock module computes with.
    """

    def __init__(self, site: Site, entries: list[Entry], arch: Arch, base: str, module: Any) -> None:
        self.site, self.arch, self.base, self.module = site, arch, base, module
        self.activation, self.entry = activation_at(entries, base), deciding(entries)
        self.enabled = True
        self.recorder: Recorder | None = None

    def __call__(self, x: Tensor) -> Tensor:
        parts = ffn_parts(self.module, self.arch, self.activation if self.enabled else self.base, x)
        if not self.enabled:
            return ffn_down(self.module, self.arch, parts.z)
        entry = self.entry
        if isinstance(entry, Swap):
            if self.recorder is not None:
                self.recorder.count(self.site, parts.z != 0)
                self.recorder.opened[self.site] = self.recorder.opened.get(self.site, 0) + int(
                    parts.gate.count_nonzero()
                )
                self._see_jump(x)
            return ffn_down(self.module, self.arch, parts.z)  # what is left out is 0
        # scores and thresholds stay fp32 in a half-precision model, as in the op
        wide = torch.promote_types(x.dtype, torch.float32)
        entry = self.entry = _on_device(entry, x.device, wide)
        scores, residual = EXECUTORS[type(entry)](entry, parts.gate.to(wide), x.to(wide))  # type: ignore[arg-type]
        keep = scores > entry.tau
        if self.recorder is not None:
            # most gates of a ReLU are 0: with a threshold of about 0 each would be near, though what one of that size
            # adds is nothing
            faint = (
                NEAR if isinstance(entry, Threshold) and is_relu(ffn_activation(self.module, self.activation)) else 0.0
            )
            self.recorder.add(self.site, scores, entry.tau, keep, faint)
            self._see_jump(x)
        y = ffn_down(
            self.module, self.arch, torch.where(keep, parts.z, torch.zeros((), dtype=parts.z.dtype, device=x.device))
        )
        return y if residual is None else y + residual.to(y.dtype)

    def _see_jump(self, x: Tensor) -> None:
        """Tokens near a jump of the activation, where a rounding error decides between 0 and b, are near too."""
        b = jump(ffn_activation(self.module, self.activation))
        if b and self.recorder is not None and not self.recorder.counts_only:
            before, _ = ffn_products(self.module, self.arch, x)
            at = is_near(before.to(torch.promote_types(x.dtype, torch.float32)), float(np.float32(b))).any(-1)
            near = self.recorder.near
            near[self.site] = at | near[self.site] if isinstance(self.entry, Threshold | Predictor) else at


class _Masked:
    """The forward of one linear module with a mask on its input; the parts of a packed weight have masks of their own.

    `rows` maps a part's site to its rows of the weight, in order; a site without an entry is computed from the whole
    input.
    """

    def __init__(self, module: Any, rows: Mapping[Site, slice], entries: Mapping[Site, Entry]) -> None:
        self.module, self.rows, self.entries = module, dict(rows), dict(entries)
        self.enabled = True
        self.recorder: Recorder | None = None

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.module.weight, self.module.bias
        if not self.enabled:
            return F.linear(x, weight, bias)
        if len(self.rows) == 1:
            return F.linear(self._masked(next(iter(self.rows)), x), weight, bias)
        return torch.cat(
            [
                F.linear(self._masked(site, x), weight[at], None if bias is None else bias[at])
                for site, at in self.rows.items()
            ],
            dim=-1,
        )

    def _masked(self, site: Site, x: Tensor) -> Tensor:
        if site not in self.entries:
            return x
        wide, entry = torch.promote_types(x.dtype, torch.float32), self.entries[site]
        assert not isinstance(entry, Swap)
        entry = self.entries[site] = _on_device(entry, x.device, wide)
        scores = x.to(wide).abs()
        keep = scores > entry.tau
        if self.recorder is not None:
            self.recorder.add(site, scores, entry.tau, keep)
        return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))


def apply_plan(model: Any, plan: Plan, arch: Arch, activation: str) -> Any:
    """Gate a transformers model in place: every site's module gets the plan's mask. Weights and their names stay as
    they are.

    `activation` is the base model's. A swap on a stock model is a transform at load time: the ungated model (`dense`)
    still computes with the stock activation. A model whose activation is swapped already must have the same one there.

    Raises InputError, before anything is changed, for a site, a shape or an activation that the model does not have,
    and when `check_plan` does.
    """
    for module, forward in make_gates(model, plan, arch, activation).items():
        module.forward = forward
    return model


Gates = dict[Any, _Gated | _Masked]
"""The gated forward of every module that a plan gates."""


def make_gates(model: Any, plan: Plan, arch: Arch, activation: str) -> Gates:
    """What `apply_plan` would set, for `switched`; the model stays as it is. Raises InputError as `apply_plan` does."""
    _check_fit(model.config, plan, arch)
    _check_swaps(model, plan, arch)
    rows = linear_rows(arch, model.config)
    forwards: dict[str, _Gated | _Masked] = {}
    for site, entries in plan.items():
        if site.kind == "ffn":
            name = arch.ffn_module(site.layer)
            forwards[name] = _Gated(site, entries, arch, activation, model.get_submodule(name))
            continue
        below, _ = arch.linears()[site.kind.removeprefix("linear:")]
        name = arch.block_prefix(site.layer) + below
        if name not in forwards:
            parts = {Site(site.layer, kind=f"linear:{part}"): at for part, at in rows[below].items()}
            forwards[name] = _Masked(
                model.get_submodule(name), parts, {other: deciding(plan[other]) for other in parts if other in plan}
            )
    return {forward.module: forward for forward in forwards.values()}


def gates_of(model: Any) -> Gates:
    """What gates a model now."""
    return {gated.module: gated for gated in _gated(model)}


@contextmanager
def switched(model: Any, gates: Gates, recorder: Recorder | None = None) -> Iterator[Any]:
    """The model with these gates and no others inside the block (none: dense), seen by `recorder`; afterwards as
    before.
    """
    before = gates_of(model)
    _set(before, gates)
    for gated in gates.values():
        gated.recorder = recorder
    try:
        yield model
    finally:
        for gated in gates.values():
            gated.recorder = None
        _set(gates, before)


def _set(old: Gates, new: Gates) -> None:
    for module in old:
        del module.forward
    for module, gated in new.items():
        module.forward = gated


def _check_fit(config: Any, plan: Plan, arch: Arch) -> None:
    check_plan(plan)
    shapes = linear_shapes(arch, config)
    sites, units, hidden = arch.sites(config), arch.size(config, "units"), arch.size(config, "hidden")
    known = {*sites, *(Site(site.layer, kind=f"linear:{name}") for site in sites for name in shapes)}
    for site, entries in plan.items():
        if site not in known:
            raise InputError(
                f"A plan must hold sites up to {sites[-1].key}, got {site.key}. Take the plan of this very model."
            )
        arch.check_activation(activation_at(entries, ""), site.key)
        entry = deciding(entries)
        width = () if isinstance(entry, Threshold) and entry.fc1 is None else (entry.rank,)
        expected = {
            "tau": (units if site.kind == "ffn" else shapes[site.kind.removeprefix("linear:")][1],),
            "predictor.fc2.weight": (units, *width),
        }
        for role, tensor in entry.tensors().items():
            shape = expected.get(role, (*width, hidden))
            if tuple(tensor.shape) != shape:
                raise InputError(
                    f"{site.key}.{role} must have shape {list(shape)}, got {list(tensor.shape)}. Take the plan of this "
                    "very model."
                )


def _check_swaps(model: Any, plan: Plan, arch: Arch) -> None:
    for site, entries in plan.items():
        if site.kind == "ffn" and isinstance(entries[0], Swap):
            own = ffn_activation(model.get_submodule(arch.ffn_module(site.layer)), "")
            if own and own != entries[0].activation:
                raise InputError(
                    f"{site.key}'s activation must be {own} as in the model, got {entries[0].activation}. Take the "
                    "plan of this very model."
                )


def remove_plan(model: Any) -> Any:
    """Make a gated model dense again."""
    for gated in _gated(model):
        del gated.module.forward
    return model


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The sparse checkpoint at `path` as a transformers model with its gating, `generate` included. Raises InputError
    for anything that is not one.
    """
    folder = Path(path)
    plan, activations = read_sparsity(folder)
    model = load_dense(folder, dtype)
    arch = load_arch(str(read_json(folder / "config.json", "config.json").get("model_type")))
    activation, swapped = arch.activation(model.config), model.config.model_type.startswith(PREFIX)
    for site, entries in plan.items():
        named, expected = activations.get(site.key), activation_at(entries, activation) if swapped else activation
        if named not in (None, expected):
            raise InputError(
                f"{site.key}'s activation must be {expected} as in the base model, got {named}. Update sparsegate or "
                "convert again."
            )
    return apply_plan(model, plan, arch, activation)


def load_dense(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a folder, in evaluation mode: a stock one, or one with swapped activations.

    Raises InputError as `check_weights` does, so that no weight is made up, and with transformers' own reason when it
    does not load.
    """
    from transformers import AutoModelForCausalLM

    register()
    check_weights(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, seen = loaded
    except Exception as error:  # transformers raises many kinds for damaged folders
        raise InputError(
            f"The model must load from {folder}, got: {first_line(error)}. Fetch the folder again."
        ) from error
    made_up = sorted(map(str, {*seen["missing_keys"], *seen["mismatched_keys"]}))
    if made_up:
        raise InputError(
            f"The model must load from {folder} as it is stored, got {made_up[0]} made up by transformers. Fetch the "
            "folder again."
        )
    return model.eval()


def _gated(model: Any) -> list[_Gated | _Masked]:
    return [
        module.forward for module in model.modules() if isinstance(getattr(module, "forward", None), _Gated | _Masked)
    ]


def gated_modules(model: Any) -> list[Any]:
    """The modules that a plan gates, in the model's order."""
    return [gated.module for gated in _gated(model)]


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

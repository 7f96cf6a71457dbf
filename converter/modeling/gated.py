"""The torch executor: a dense transformers model whose feed-forward and linear modules apply the plan's masks, and
`load`.

It computes every neuron and zeroes those that are skipped, and multiplies whole inputs with skipped channels zeroed:
the reference for quality, not for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from ..arch.site import Site
from ..checkpoint.cost import site_units
from ..checkpoint.plan import (
    OFFSET,
    Exact,
    Plan,
    Predictor,
    Residual,
    SitePlan,
    Swap,
    Threshold,
    check_exact,
    check_plan,
    threshold_of,
)
from ..checkpoint.source import check_weights
from ..checkpoint.sparsity import read_sparsity
from ..checkpoint.tensor_files import first_line
from .blocks import Parts, ffn_activation, ffn_down, ffn_parts, ffn_products
from .swapped import register
from .taps import linear_by_parts, linear_parts, masked, replace, replacements, restore

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


def threshold_scores(gate: Threshold, parts: Parts, x: Tensor) -> tuple[Tensor, None]:
    """|act(gate)| [..., n], or |x| [..., d_in] at a linear site; there is no hidden layer."""
    return (x if gate.score == "input" else parts.gate).abs(), None


def predictor_scores(gate: Predictor, parts: Parts, x: Tensor) -> tuple[Tensor, Tensor]:
    """fc2 relu(fc1 x) [..., n], and the hidden layer relu(fc1 x) [..., r]."""
    hidden = F.relu(x @ gate.fc1.T)
    return hidden @ gate.fc2.T, hidden


def exact_scores(gate: Exact, parts: Parts, x: Tensor) -> tuple[Tensor, None]:
    """|z| [..., n]: what is not 0 is kept; there is no hidden layer."""
    return parts.z.abs(), None


EXECUTORS: dict[type, Callable[[Any, Parts, Tensor], tuple[Tensor, Tensor | None]]] = {
    Threshold: threshold_scores,
    Predictor: predictor_scores,
    Exact: exact_scores,
}
"""Kind of gate -> what computes its scores from a module's inner values and x, and the hidden layer that it has."""


def residual_output(residual: Residual | None, hidden: Tensor | None, x: Tensor) -> Tensor | None:
    """weight^T relu(fc1 x) [..., d], None without a residual; `hidden` [..., r] is the predictor's."""
    if residual is None:
        return None
    if residual.fc1 is not None:
        hidden = F.relu(x @ residual.fc1.T)
    assert hidden is not None
    return hidden @ residual.weight


class _Gated:
    """The forward of one gated feed-forward module; `base` is the stock model's activation, which is what an ungated
    stock module computes with.
    """

    def __init__(self, site: Site, entry: SitePlan, arch: Arch, base: str, module: Any) -> None:
        self.site, self.entry, self.arch, self.base, self.module = site, entry, arch, base, module
        self.activation = base
        self.enabled = True
        self.recorder: Recorder | None = None
        for edit in entry.edits:
            EDITORS[type(edit)](self, edit)

    def __call__(self, x: Tensor) -> Tensor:
        parts = ffn_parts(self.module, self.arch, self.activation if self.enabled else self.base, x)
        if not self.enabled:
            return ffn_down(self.module, self.arch, parts.z)
        if isinstance(self.entry.gate, Exact):
            self._see_exact(parts, x)
            return ffn_down(self.module, self.arch, parts.z)  # what is left out is 0
        # scores and thresholds stay fp32 in a half-precision model, as in the op
        wide = torch.promote_types(x.dtype, torch.float32)
        entry = self.entry = self.entry.to(x.device, wide)
        gate: Any = entry.gate
        wide_x = x.to(wide)
        scores, hidden = EXECUTORS[type(gate)](gate, parts._replace(gate=parts.gate.to(wide)), wide_x)
        residual = residual_output(entry.residual, hidden, wide_x)
        keep = scores > gate.tau
        if self.recorder is not None:
            # most gates of a ReLU are 0: with a threshold of about 0 each would be near, though what one of that size
            # adds is nothing
            zeros = isinstance(gate, Threshold) and is_relu(ffn_activation(self.module, self.activation))
            self.recorder.add(self.site, scores, gate.tau, keep, NEAR if zeros else 0.0)
            self._see_jump(x)
        y = ffn_down(self.module, self.arch, masked(parts.z, keep))
        for more in (residual, entry.offset):
            y = y if more is None else y + more.to(y.dtype)
        return y

    def _see_exact(self, parts: Parts, x: Tensor) -> None:
        """Count the non-zero units, and the non-zero gates."""
        if self.recorder is not None:
            self.recorder.count(self.site, parts.z != 0)
            opened = int(parts.gate.count_nonzero())
            self.recorder.opened[self.site] = self.recorder.opened.get(self.site, 0) + opened
            self._see_jump(x)

    def _see_jump(self, x: Tensor) -> None:
        """Tokens near a jump of the activation, where a rounding error decides between 0 and b, are near too."""
        b = jump(ffn_activation(self.module, self.activation))
        if b and self.recorder is not None and not self.recorder.counts_only:
            before, _ = ffn_products(self.module, self.arch, x)
            at = is_near(before.to(torch.promote_types(x.dtype, torch.float32)), float(np.float32(b))).any(-1)
            near = self.recorder.near
            near[self.site] = at if isinstance(self.entry.gate, Exact) else at | near[self.site]


def _swap(gated: _Gated, edit: Swap) -> None:
    gated.activation = edit.activation


EDITORS: dict[type, Callable[[_Gated, Any], None]] = {Swap: _swap}
"""Kind of edit -> what makes a stock module compute as it says."""


class _MaskedLinear:
    """The forward of one linear module with a mask on its input; the parts of a packed weight have masks of their own.

    `rows` maps a part's site to its rows of the weight, in order; a site without a gate is computed from the whole
    input.
    """

    def __init__(self, module: Any, rows: Mapping[Site, slice], gates: Mapping[Site, SitePlan]) -> None:
        self.module, self.rows, self.gates = module, dict(rows), dict(gates)
        self.enabled = True
        self.recorder: Recorder | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return F.linear(x, self.module.weight, self.module.bias)
        return linear_by_parts(self.module, list(self.rows.values()), [self._masked(site, x) for site in self.rows])

    def _masked(self, site: Site, x: Tensor) -> Tensor:
        if site not in self.gates:
            return x
        wide = torch.promote_types(x.dtype, torch.float32)
        self.gates[site] = self.gates[site].to(x.device, wide)
        scores, tau = x.to(wide).abs(), threshold_of(self.gates[site]).tau
        keep = scores > tau
        if self.recorder is not None:
            self.recorder.add(site, scores, tau, keep)
        return masked(x, keep)


def apply_plan(model: Any, plan: Plan, arch: Arch, activation: str) -> Any:
    """Gate a transformers model in place: every site's module gets the plan's mask. Weights and their names stay as
    they are.

    `activation` is the base model's. A swap on a stock model is a transform at load time: the ungated model (`dense`)
    still computes with the stock activation. A model whose activation is swapped already must have the same one there.

    Raises InputError, before anything is changed, for a site, a shape or an activation that the model does not have,
    and when `check_plan` does.
    """
    for module, forward in make_gates(model, plan, arch, activation).items():
        replace(module, forward)
    return model


Gates = dict[Any, _Gated | _MaskedLinear]
"""The gated forward of every module that a plan gates."""


def make_gates(model: Any, plan: Plan, arch: Arch, activation: str) -> Gates:
    """What `apply_plan` would set, for `switched`; the model stays as it is. Raises InputError as `apply_plan` does."""
    _check_fit(model.config, plan, arch)
    _check_activations(model, plan, arch, activation)
    forwards: dict[str, _Gated | _MaskedLinear] = {}
    for site, entry in plan.items():
        if site.kind == "ffn":
            name = arch.ffn_module(site.layer)
            forwards[name] = _Gated(site, entry, arch, activation, model.get_submodule(name))
            continue
        below, _ = arch.linears()[site.kind.removeprefix("linear:")]
        name = arch.block_prefix(site.layer) + below
        if name not in forwards:
            parts = linear_parts(model, arch, site.layer)[name]
            gates = {other: plan[other] for other in parts if other in plan}
            forwards[name] = _MaskedLinear(model.get_submodule(name), parts, gates)
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
        restore(module)
    for module, gated in new.items():
        replace(module, gated)


def _check_fit(config: Any, plan: Plan, arch: Arch) -> None:
    check_plan(plan)
    sites, hidden = arch.sites(config), arch.size(config, "hidden")
    linears = arch.linears()
    known = {*sites, *(Site(site.layer, kind=f"linear:{name}") for site in sites for name in linears)}
    units = site_units([site for site in plan if site in known], arch, config)
    for site, entry in plan.items():
        if site not in known:
            raise InputError(
                f"A plan must hold sites up to {sites[-1].key}, got {site.key}. Take the plan of this very model."
            )
        arch.check_activation(entry.activation(""), site.key)
        width = () if entry.rank == 0 else (entry.rank,)
        expected = {"tau": (units[site],), "predictor.fc2.weight": (units[site], *width), OFFSET: (hidden,)}
        for role, tensor in entry.tensors().items():
            shape = expected.get(role, (*width, hidden))
            if tuple(tensor.shape) != shape:
                raise InputError(
                    f"{site.key}.{role} must have shape {list(shape)}, got {list(tensor.shape)}. Take the plan of this "
                    "very model."
                )


def _check_activations(model: Any, plan: Plan, arch: Arch, base: str) -> None:
    for site, entry in plan.items():
        if site.kind != "ffn":
            continue
        present = ffn_activation(model.get_submodule(arch.ffn_module(site.layer)), "")
        if present and entry.edits and present != entry.activation(""):
            raise InputError(
                f"{site.key}'s activation must be {present} as in the model, got {entry.activation('')}. Take the plan "
                "of this very model."
            )
        if isinstance(entry.gate, Exact):
            check_exact(present or entry.activation(base))


def remove_plan(model: Any) -> Any:
    """Make a gated model dense again."""
    for gated in _gated(model):
        restore(gated.module)
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
    for site, entry in plan.items():
        named, expected = activations.get(site.key), entry.activation(activation) if swapped else activation
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


def _gated(model: Any) -> list[_Gated | _MaskedLinear]:
    return [forward for forward in replacements(model).values() if isinstance(forward, _Gated | _MaskedLinear)]


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

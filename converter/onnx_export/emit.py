"""What a site's plan becomes in the graph: a score that an op computes and the tensors that it reads, one emitter per
plan kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime_onnx.errors import InputError
from ..arch import Arch
from ..arch.site import Site
from ..checkpoint.cost import site_units
from ..checkpoint.plan import Exact, Plan, Predictor, SitePlan, Swap, Threshold, check_plan


@dataclass(frozen=True)
class Emission:
    """A score and its inputs by the op's roles, all float32; `activation` is what the MLP computes with where that is
    not the base model's.

    GatedMLP has the scores gate and predictor, with tau [n], p1 [r, d], p2 [n, r], res [r, d], b_down [d] (on top of a
    bias of the model's own), and exact, with nothing;
    SparseLinear has input, with tau [d_in].
    """

    score: str
    tensors: dict[str, NDArray[np.float32]]
    activation: str | None = None


def threshold(gate: Threshold) -> Emission:
    """A threshold on |act(gate)| or on |x|. Raises InputError for a score that no op computes."""
    if gate.score not in ("gate", "input"):
        raise InputError(
            f"A threshold's score must be gate or input to be exported, got {gate.score}. Use the method gate, "
            "predictor, teal or wina."
        )
    return Emission(gate.score, {"tau": _array(gate.tau)})


def predictor(gate: Predictor) -> Emission:
    """A threshold on fc2 relu(fc1 x)."""
    return Emission("predictor", {"tau": _array(gate.tau), "p1": _array(gate.fc1), "p2": _array(gate.fc2)})


def exact(gate: Exact) -> Emission:
    """What is not zero is kept."""
    return Emission("exact", {})


def swap(emission: Emission, edit: Swap) -> Emission:
    """The same under another activation."""
    return replace(emission, activation=edit.activation)


EMITTERS: dict[type, Callable[[Any], Emission]] = {Threshold: threshold, Predictor: predictor, Exact: exact}
"""Kind of gate -> what emits it."""
EDIT_EMITTERS: dict[type, Callable[[Emission, Any], Emission]] = {Swap: swap}
"""Kind of edit -> what changes the emission of the gate behind it."""


def emissions(plan: Plan, arch: Arch, config: Any) -> dict[Site, Emission]:
    """The emission of every site of a plan, in order. Raises InputError for a plan that names no site of the model or
    that the ops cannot express.
    """
    known = {"ffn", *(f"linear:{name}" for name in arch.linears())}
    layers = [site.layer for site in arch.sites(config)]
    strangers = [
        site.key for site in plan if site.kind not in known or site.expert is not None or site.layer not in layers
    ]
    if strangers:
        raise InputError(
            f"A plan's sites must be ffn or linear sites of layers.0 to layers.{layers[-1]}, got "
            f"{', '.join(strangers)}. The plan belongs to another model."
        )
    units, hidden = site_units(plan, arch, config), arch.size(config, "hidden")
    channels = {site: hidden if site.kind == "ffn" else units[site] for site in plan}
    emitted = {site: emit(site, plan[site], channels[site], units[site]) for site in sorted(plan)}
    check_plan(plan)
    return emitted


def emit_parts(entry: SitePlan) -> Emission:
    """The emission of a site's gate, residual, offset and edits."""
    emission, residual = EMITTERS[type(entry.gating)](entry.gating), entry.residual
    if residual is not None:
        head = {} if residual.fc1 is None else {"p1": _array(residual.fc1)}
        emission = replace(emission, tensors=emission.tensors | head | {"res": _array(residual.weight)})
    if entry.offset is not None:
        emission = replace(emission, tensors=emission.tensors | {"b_down": _array(entry.offset)})
    for edit in entry.edits:
        emission = EDIT_EMITTERS[type(edit)](emission, edit)
    return emission


def emit(site: Site, entry: SitePlan, d: int, n: int) -> Emission:
    """The emission of a site's plan, for an MLP of n neurons over d channels or a linear of n = d input channels.

    Raises InputError when the site has no gate and for tensors of a wrong shape or with NaN.
    """
    if entry.gate is None:
        raise InputError(f"Site {site.key} must have a gate to be exported, got none. Make another plan.")
    emission = emit_parts(entry)
    r = len(emission.tensors["p1"]) if "p1" in emission.tensors else 0
    shapes = {"tau": (n,), "p1": (r, d), "p2": (n, r), "res": (r, d), "b_down": (d,)}
    for role, array in emission.tensors.items():
        if array.shape != shapes[role]:
            raise InputError(
                f"Site {site.key}'s {role} must have shape {list(shapes[role])}, got {list(array.shape)}. The plan "
                "belongs to another model."
            )
        if np.isnan(array).any():
            raise InputError(f"Site {site.key}'s {role} must be a number everywhere, got NaN. Make the plan again.")
    return emission


def _array(tensor: Any) -> NDArray[np.float32]:
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())

"""What a plan's entry becomes in the graph: a score that an op computes and the tensors that it reads, one emitter per
plan kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime_onnx.errors import InputError
from ..arch.site import Site
from ..checkpoint.plan import Entry, Predictor, Swap, Threshold, activation_at, deciding


@dataclass(frozen=True)
class Emission:
    """A score and its inputs by the op's roles, all float32; `activation` is what the MLP computes with where that is
    not the base model's.

    GatedMLP has the scores gate and predictor, with tau [n], p1 [r, d], p2 [n, r], res [r, d], and exact, with nothing;
    SparseLinear has input, with tau [d_in].
    """

    score: str
    tensors: dict[str, NDArray[np.float32]]
    activation: str | None = None


def threshold(entry: Threshold) -> Emission:
    """A threshold on |act(gate)|, with the residual where there is one, or on |x|. Raises InputError for a score that
    no op computes.
    """
    tensors = {"tau": _array(entry.tau)}
    if entry.score not in ("gate", "input"):
        raise InputError(
            f"A threshold's score must be gate or input to be exported, got {entry.score}. Use the method gate, "
            "predictor, teal or wina."
        )
    if entry.fc1 is not None and entry.residual is not None:
        tensors |= {"p1": _array(entry.fc1), "res": _array(entry.residual)}
    return Emission(entry.score, tensors)


def predictor(entry: Predictor) -> Emission:
    """A threshold on fc2 relu(fc1 x), with the residual where there is one."""
    tensors = {"tau": _array(entry.tau), "p1": _array(entry.fc1), "p2": _array(entry.fc2)}
    return Emission("predictor", tensors if entry.residual is None else tensors | {"res": _array(entry.residual)})


def swap(entry: Swap) -> Emission:
    """Another activation, of which what is not zero is kept."""
    return Emission("exact", {}, entry.activation)


EMITTERS: dict[str, Callable[[Any], Emission]] = {"threshold": threshold, "predictor": predictor, "swap": swap}
"""Plan kind -> the function that emits it."""


def emit(site: Site, entries: list[Entry], d: int, n: int) -> Emission:
    """The emission of a site's plan, for an MLP of n neurons over d channels or a linear of n = d input channels: of
    its last entry, under the activation of a swap before it.

    Raises InputError when the site has not one entry, or a swap and one after it, for a kind that has no emitter, and
    for tensors of a wrong shape or with NaN.
    """
    kinds = [str(entry.fields()["kind"]) for entry in entries]
    if [kind for kind in kinds if kind not in EMITTERS] or not (
        len(kinds) == 1 or (len(kinds) == 2 and kinds[0] == "swap" != kinds[1])
    ):
        raise InputError(
            f"Site {site.key} must have one entry of kind {' or '.join(EMITTERS)}, or a swap before it, to be "
            "exported, "
            f"got {', '.join(kinds) or 'none'}. Make another plan."
        )
    decides = deciding(entries)
    found = EMITTERS[kinds[-1]](decides)
    if decides is not entries[0]:
        found = replace(found, activation=activation_at(entries, ""))
    r = len(found.tensors["p1"]) if "p1" in found.tensors else 0
    shapes = {"tau": (n,), "p1": (r, d), "p2": (n, r), "res": (r, d)}
    for role, array in found.tensors.items():
        if array.shape != shapes[role]:
            raise InputError(
                f"Site {site.key}'s {role} must have shape {list(shapes[role])}, got {list(array.shape)}. The plan "
                "belongs to another model."
            )
        if np.isnan(array).any():
            raise InputError(f"Site {site.key}'s {role} must be a number everywhere, got NaN. Make the plan again.")
    return found


def _array(tensor: Any) -> NDArray[np.float32]:
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())

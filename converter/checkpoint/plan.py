"""A plan says which units of a site are kept and by whom: {site: ordered list of entries}.

The kinds are closed. A row of KINDS names the class; `writer.py`, `modeling/gated.py` and `onnx_export/` hold one
function each per kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...runtime_onnx.errors import InputError, either
from ...runtime_onnx.ops.activation import is_relu
from ...runtime_onnx.ops.vocabulary import RELUS, forms
from ...runtime_onnx.untrusted import read_json
from ..arch.site import Site
from .stage import Header, write_header, write_json, write_tensors
from .tensor_files import load_tensors

PLAN = "plan.json"
TENSORS = "plan.safetensors"
_SHARE_ERROR = 0.01
"""What a share by a histogram is off by at most."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FFN_LINEARS = LINEARS[4:]
"""Linear sites that a gated feed-forward network of the same layer excludes: both would skip the same weights."""


@dataclass(frozen=True)
class Threshold:
    """Keep unit i of a token when score_i > tau_i, tau [n] fp32; `density` is the calibrated share.

    `score` names a score that an op computes: "gate" = |act(gate_i)| at a feed-forward site (n neurons), "input" =
    |x_j| at a linear site (n = d_in channels). At a feed-forward site, fc1 [r, d] and residual [r, d], given both or
    neither, add residual^T relu(fc1 x) for what is skipped.
    """

    score: str
    tau: Tensor
    density: float
    fc1: Tensor | None = None
    residual: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.fc1 is None) != (self.residual is None):
            found = "fc1" if self.residual is None else "residual"
            raise InputError(
                f"A threshold must have fc1 and residual or neither, got only {found}. Give both, or make the plan "
                "again."
            )

    @property
    def rank(self) -> int:
        """Width r of the residual's hidden layer; 0 without a residual."""
        return 0 if self.fc1 is None else int(self.fc1.shape[0])

    def fields(self) -> dict[str, Any]:
        """The entry without its tensors, for JSON."""
        return {"kind": "threshold", "score": self.score, "density": self.density}

    def tensors(self) -> dict[str, Tensor]:
        """The entry's tensors by role."""
        found = {"tau": self.tau}
        if self.fc1 is not None and self.residual is not None:
            found |= {"residual.fc1.weight": self.fc1, "residual.weight": self.residual}
        return found


@dataclass(frozen=True)
class Predictor:
    """Keep unit i when (fc2 relu(fc1 x))_i > tau_i; fc1 [r, d], fc2 [n, r], tau [n], all fp32.

    With `residual` [r, d], residual^T relu(fc1 x) stands in for what is skipped. `density` and `recall` (the kept share
    of the units that the label's score would keep) were measured on held-out calibration tokens.
    """

    fc1: Tensor
    fc2: Tensor
    tau: Tensor
    density: float
    residual: Tensor | None = None
    recall: float | None = None

    @property
    def rank(self) -> int:
        """Width r of the hidden layer."""
        return int(self.fc1.shape[0])

    def fields(self) -> dict[str, Any]:
        """The entry without its tensors, for JSON."""
        return {"kind": "predictor", "rank": self.rank, "density": self.density, "recall": self.recall}

    def tensors(self) -> dict[str, Tensor]:
        """The entry's tensors by role."""
        found = {"tau": self.tau, "predictor.fc1.weight": self.fc1, "predictor.fc2.weight": self.fc2}
        return found if self.residual is None else found | {"residual.weight": self.residual}


@dataclass(frozen=True)
class Swap:
    """The site computes with `activation`, which has exact zeros: one of the op's RELUS.

    Alone at its site, the units kept are the non-zero ones: nothing more is lost, and the gate (a plain network's up
    projection) is computed in full. Before a Threshold or a Predictor those say what is kept. `density` is the
    calibrated share of non-zero units, `opened` that of units with a non-zero gate, whose up projection is needed.
    """

    activation: str
    density: float = 1.0
    opened: float = 1.0

    @property
    def rank(self) -> int:
        """Width of a hidden layer: there is none."""
        return 0

    residual = None

    def fields(self) -> dict[str, Any]:
        """The entry for JSON."""
        return {"kind": "swap", "activation": self.activation, "density": self.density, "opened": self.opened}

    def tensors(self) -> dict[str, Tensor]:
        """The entry's tensors by role: none."""
        return {}


Entry = Threshold | Predictor | Swap
Plan = dict[Site, list[Entry]]

KINDS: dict[str, type[Threshold] | type[Predictor] | type[Swap]] = {
    "predictor": Predictor,
    "swap": Swap,
    "threshold": Threshold,
}


def deciding(entries: list[Entry]) -> Entry:
    """The entry that says what is kept: the last one."""
    return entries[-1]


def threshold_of(entries: list[Entry]) -> Threshold:
    """The threshold of a site that has one entry, as every site of a linear map."""
    (entry,) = entries
    assert isinstance(entry, Threshold)
    return entry


def activation_at(entries: list[Entry], base: str) -> str:
    """The activation that a site computes with: the swapped one, else that of the `base` model."""
    return entries[0].activation if isinstance(entries[0], Swap) else base


def make_entry(fields: dict[str, Any], tensors: dict[str, Tensor]) -> Entry:
    """The inverse of `fields` and `tensors`. Raises InputError for an unknown kind or a missing tensor."""
    kind = fields.get("kind")
    if kind not in KINDS:
        raise InputError(
            f"A plan's kind must be one of {', '.join(KINDS)}, got {kind!r}. Update sparsegate or make the plan again."
        )
    try:
        if kind == "swap":
            entry: Entry = Swap(fields["activation"], fields["density"], fields["opened"])
        elif kind == "threshold":
            entry = Threshold(
                fields["score"],
                tensors["tau"],
                fields["density"],
                tensors.get("residual.fc1.weight"),
                tensors.get("residual.weight"),
            )
        else:
            fc1, fc2 = tensors["predictor.fc1.weight"], tensors["predictor.fc2.weight"]
            entry = Predictor(
                fc1, fc2, tensors["tau"], fields["density"], tensors.get("residual.weight"), fields.get("recall")
            )
    except KeyError as missing:
        raise InputError(
            f"A {kind} entry must have {missing}, got {sorted(fields)} and tensors {sorted(tensors)}. Make the plan "
            "again."
        ) from None
    unknown = (set(fields) - set(entry.fields())) | (set(tensors) - set(entry.tensors()))
    if unknown:
        allowed = ", ".join([*entry.fields(), *entry.tensors()])
        raise InputError(
            f"A {kind} entry must hold only {allowed}, got {', '.join(sorted(unknown))} as well. Update sparsegate or "
            "make the plan again."
        )
    return entry


def save_plan(folder: Path, plan: Plan, header: Header) -> None:
    """Write plan, tensors and header into a stage folder. Raises InputError when `check_plan` does."""
    check_plan(plan)
    sites, tensors = {}, {}
    for site, entries in plan.items():
        sites[site.key] = [entry.fields() for entry in entries]
        for number, entry in enumerate(entries):
            for role, tensor in entry.tensors().items():
                tensors[f"{site.key}.{number}.{role}"] = tensor.clone(
                    memory_format=torch.contiguous_format
                )  # sites may share one
    write_json(folder / PLAN, {"version": 1, "sites": sites})
    write_tensors(folder / TENSORS, tensors)
    write_header(folder, header)


def load_plan(folder: Path) -> Plan:
    """Read a plan folder. Raises InputError when a file is missing, damaged or of another version."""
    data = read_json(folder / PLAN, "The plan")
    if data.get("version") != 1:
        raise InputError(
            f"A plan's version must be 1, got {data.get('version')!r}. Update sparsegate or make the plan again."
        )
    stored = load_tensors(folder / TENSORS, ["F32"])
    sites = data.get("sites")
    if not isinstance(sites, dict) or not all(
        isinstance(entries, list) and all(isinstance(f, dict) for f in entries) for entries in sites.values()
    ):
        raise InputError(
            f"The plan's sites must map a site to its entries, got {type(sites).__name__} in {folder / PLAN}. Make the "
            "plan again."
        )
    plan: Plan = {}
    for key, entries in sites.items():
        site = Site.parse(key)
        plan[site] = [
            make_entry(
                fields,
                {
                    name.removeprefix(f"{key}.{number}."): t
                    for name, t in stored.items()
                    if name.startswith(f"{key}.{number}.")
                },
            )
            for number, fields in enumerate(entries)
        ]
        for entry in plan[site]:
            check_values(site, entry)
    check_plan(plan)
    return plan


def check_plan(plan: Plan) -> None:
    """Raise InputError where an entry does not belong to its site's kind or place, and where a layer gates both its
    network and a linear inside it.
    """
    for site, entries in plan.items():
        is_linear = site.kind.startswith("linear:")
        if [isinstance(entry, Swap) for entry in entries] not in ([False], [True], [True, False]):
            kinds = ", ".join(entry.fields()["kind"] for entry in entries) or "none"
            raise InputError(
                f"{site.key} must have one entry, or a swap and at most one after it, got {kinds}. Make another plan."
            )
        for entry in entries:
            score = score_of(entry)
            if isinstance(entry, Swap):
                check_exact(entry.activation)
            if is_linear != (score == "input") or (is_linear and entry.residual is not None):
                expected = "input and have no residual" if is_linear else "of neurons (gate or predictor)"
                raise InputError(f"The score of {site.key} must be {expected}, got {score}. Make another plan.")
        if is_linear and site.kind.removeprefix("linear:") not in LINEARS:
            raise InputError(f"A linear site must be one of {', '.join(LINEARS)}, got {site.key}. Make another plan.")
        inside = [name for name in FFN_LINEARS if Site(site.layer, kind=f"linear:{name}") in plan]
        if site.kind == "ffn" and inside:
            raise InputError(
                f"{site.key} must exclude the linear sites inside it, got {', '.join(inside)} as well. Gate neurons or "
                "inputs, not both."
            )


def check_values(site: Site, entry: Entry) -> None:
    """Raise InputError for numbers that an entry cannot have: shares outside 0 to 1, tensors that are no float32, NaN,
    and infinity.

    tau alone may be +infinity, of a unit that is never kept, and then `density` leaves room for such units.
    """
    for name in {"density", "opened"} & set(entry.fields()):
        check_share(f"The {name} of {site.key}", getattr(entry, name))
    for role, tensor in entry.tensors().items():
        name = f"{site.key}.{role}"
        if tensor.dtype != torch.float32:
            raise InputError(
                f"{name} must be float32, got {str(tensor.dtype).removeprefix('torch.')}. Make the plan or checkpoint "
                "again."
            )
        bad = tensor.isnan() | (tensor == -torch.inf) if role == "tau" else ~tensor.isfinite()
        if bool(bad.any()):
            value = float(tensor[bad][0])
            raise InputError(
                f"{name} must hold numbers, got {'NaN' if math.isnan(value) else value}. Make the plan or checkpoint "
                "again."
            )
    if (
        not isinstance(entry, Swap)
        and entry.density > (most := float(entry.tau.isfinite().double().mean())) + _SHARE_ERROR
    ):
        raise InputError(
            f"The density of {site.key} must be at most {most:.3g}, the share of finite tau, got {entry.density}. Make "
            "the plan or checkpoint again."
        )


def check_share(what: str, value: Any) -> None:
    """Raise InputError unless `value` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{what} must be a number from 0 to 1, got {value!r:.100}. Fetch the checkpoint again.")


def score_of(entry: Entry) -> str:
    """What an entry keeps units by, as checkpoints and ops name it: predictor, exact, or a threshold's own score."""
    return "predictor" if isinstance(entry, Predictor) else "exact" if isinstance(entry, Swap) else entry.score


def check_exact(activation: str) -> None:
    """Raise InputError unless `activation` is one with exact zeros."""
    if not is_relu(activation):
        raise InputError(
            f"A swap's activation must have exact zeros ({either(forms(RELUS))}), got {activation}. Take one of these."
        )


def on_swaps(plan: Plan, swaps: Mapping[Site, Swap]) -> Plan:
    """A plan for a model with swapped activations: every swapped site lists its swap, alone or before what the plan
    says.

    Raises InputError for a site that the plan gives another activation.
    """
    found = dict(plan)
    for site, swap in swaps.items():
        entries = plan.get(site, [])
        if entries and isinstance(entries[0], Swap):
            if entries[0].activation != swap.activation:
                raise InputError(
                    f"{site.key}'s activation must be {swap.activation} as in the model, got {entries[0].activation} "
                    "in the plan. Make another plan."
                )
            continue
        found[site] = [swap, *entries]
    return dict(sorted(found.items(), key=lambda item: (item[0].layer, item[0].kind != "ffn")))


def merge(plans: Iterable[Plan]) -> Plan:
    """One plan of several: neuron gating wins over the linear sites inside its network. Raises InputError for a site
    that two plans gate.
    """
    united: Plan = {}
    for plan in plans:
        for site, entries in plan.items():
            if site in united:
                raise InputError(
                    f"Plans to merge must gate different sites, got {site.key} twice. Leave it out of one."
                )
            united[site] = entries
    kept = {
        site: e
        for site, e in united.items()
        if not (site.kind.removeprefix("linear:") in FFN_LINEARS and Site(site.layer, site.expert) in united)
    }
    kept = dict(
        sorted(kept.items(), key=lambda item: (item[0].layer, item[0].kind != "ffn"))
    )  # stable: linears stay in the order of the data flow
    check_plan(kept)
    return kept


def uniform_tau(value: float, units: int) -> Tensor:
    """One threshold repeated for every unit: [n] fp32."""
    return torch.full((units,), value, dtype=torch.float32)

"""A plan says what a site computes and which of its units are kept by whom: {site: SitePlan}.

An edit changes a site once; a gate decides token by token which units are kept; a residual and an offset stand in for
what a gate skips. The kinds are closed: EDITS and GATES name the classes, and each consumer (`sparsity.py`, `cost.py`,
`modeling/gated.py`, `onnx_export/emit.py`) has one table with a row for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

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
VERSION = 2
"""Of plan.json; stages of version 1, which had a list of entries a site, are made again."""
_SHARE_ERROR = 0.01
"""What a share by a histogram is off by at most."""
OFFSET = "offset"
"""The role of a site's offset."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FFN_LINEARS = LINEARS[4:]
"""Linear sites that a gated feed-forward network of the same layer excludes: both would skip the same weights."""


@dataclass(frozen=True)
class Swap:
    """The site computes with `activation`, which has exact zeros: one of the op's RELUS."""

    ROLES: ClassVar[dict[str, str]] = {}
    activation: str


@dataclass(frozen=True)
class Exact:
    """Keep the units that are not zero. Nothing is lost; the gate (a plain network's up projection) is computed in
    full.

    `density` is the calibrated share of non-zero units, `opened` that of units with a non-zero gate, whose up
    projection is needed.
    """

    ROLES: ClassVar[dict[str, str]] = {}
    score: ClassVar[str] = "exact"
    density: float = 1.0
    opened: float = 1.0


@dataclass(frozen=True)
class Threshold:
    """Keep unit i of a token when score_i > tau_i, tau [n] fp32; `density` is the calibrated share.

    `score` names a score that an op computes: "gate" = |act(gate_i)| at a feed-forward site (n neurons), "input" =
    |x_j| at a linear site (n = d_in channels).
    """

    ROLES: ClassVar[dict[str, str]] = {"tau": "tau"}
    score: str
    tau: Tensor
    density: float


@dataclass(frozen=True)
class Predictor:
    """Keep unit i when (fc2 relu(fc1 x))_i > tau_i; fc1 [r, d], fc2 [n, r], tau [n], all fp32.

    `density` and `recall` (the kept share of the units that the label's score would keep) were measured on held-out
    calibration tokens.
    """

    ROLES: ClassVar[dict[str, str]] = {
        "tau": "tau",
        "fc1": "predictor.fc1.weight",
        "fc2": "predictor.fc2.weight",
    }
    score: ClassVar[str] = "predictor"
    fc1: Tensor
    fc2: Tensor
    tau: Tensor
    density: float
    recall: float | None = None

    @property
    def rank(self) -> int:
        """Width r of the hidden layer."""
        return int(self.fc1.shape[0])


@dataclass(frozen=True)
class Residual:
    """weight^T relu(fc1 x) stands in for what a gate skips; weight and fc1 [r, d], fc1 None: that of the predictor."""

    ROLES: ClassVar[dict[str, str]] = {"fc1": "residual.fc1.weight", "weight": "residual.weight"}
    weight: Tensor
    fc1: Tensor | None = None


Edit = Swap
Gate = Exact | Threshold | Predictor
EDITS: dict[str, type[Edit]] = {"swap": Swap}
GATES: dict[str, type[Gate]] = {"exact": Exact, "predictor": Predictor, "threshold": Threshold}


@dataclass(frozen=True)
class SitePlan:
    """What one site does: `edits` in their order, then the `gate` (None: every unit is kept), its `residual`, and an
    `offset` [d] that is added to every output of a gated network.
    """

    edits: tuple[Edit, ...] = ()
    gate: Gate | None = None
    residual: Residual | None = None
    offset: Tensor | None = None

    @property
    def gating(self) -> Gate:
        """The gate, of a site that has one, as every site of a checked plan."""
        assert self.gate is not None
        return self.gate

    @property
    def rank(self) -> int:
        """Width r of the hidden layer that is computed before the gate; 0 without one."""
        return sum(len(tensor) for role, tensor in self.tensors().items() if role.endswith("fc1.weight"))

    def activation(self, base: str) -> str:
        """The activation that the site computes with in a model whose own is `base`."""
        return next((edit.activation for edit in self.edits), base)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of gate, residual and offset by their roles in a checkpoint."""
        offset = {} if self.offset is None else {OFFSET: self.offset}
        return part_tensors(self.gate) | part_tensors(self.residual) | offset

    def to(self, device: torch.device, dtype: torch.dtype) -> SitePlan:
        """The same with its tensors on `device` in `dtype`; itself where they already are."""
        if all(tensor.device == device and tensor.dtype == dtype for tensor in self.tensors().values()):
            return self

        def moved(part: Any) -> Any:
            tensors = {name: tensor.to(device, dtype) for name, tensor in _tensors(part).items()}
            return part if part is None else replace(part, **tensors)

        offset = None if self.offset is None else self.offset.to(device, dtype)
        return replace(self, gate=moved(self.gate), residual=moved(self.residual), offset=offset)


Plan = dict[Site, SitePlan]


def part_tensors(part: Gate | Residual | None) -> dict[str, Tensor]:
    """The tensors of a gate or a residual by their roles in a checkpoint."""
    return {part.ROLES[name]: tensor for name, tensor in _tensors(part).items()} if part is not None else {}


def _tensors(part: Any) -> dict[str, Tensor]:
    """The tensors of a part by field, in the order of its roles."""
    values = {} if part is None else {name: getattr(part, name) for name in part.ROLES}
    return {name: tensor for name, tensor in values.items() if tensor is not None}


def _part_fields(part: Any) -> dict[str, Any]:
    """What of a part is no tensor, for JSON."""
    return {entry.name: getattr(part, entry.name) for entry in fields(part) if entry.name not in part.ROLES}


def kind_of(part: Edit | Gate) -> str:
    """The name of an edit's or a gate's kind."""
    return next(name for name, kind in (EDITS | GATES).items() if type(part) is kind)


def threshold_of(site: SitePlan) -> Threshold:
    """The threshold of a site that has no other gate, as every site of a linear map."""
    assert isinstance(site.gate, Threshold)
    return site.gate


def linear_thresholds(plan: Plan, layer: int) -> dict[str, Tensor]:
    """Tau [d_in] of a layer's linear sites by their names."""
    linears = {site: entry for site, entry in plan.items() if site.layer == layer and site.kind.startswith("linear:")}
    return {site.kind.removeprefix("linear:"): threshold_of(entry).tau for site, entry in linears.items()}


def save_plan(folder: Path, plan: Plan, header: Header) -> None:
    """Write plan, tensors and header into a stage folder. Raises InputError when `check_plan` does."""
    check_plan(plan)
    sites, tensors = {}, {}
    for site, entry in plan.items():
        sites[site.key] = {
            "edits": [{"kind": kind_of(edit)} | _part_fields(edit) for edit in entry.edits],
            "gate": {"kind": kind_of(entry.gating)} | _part_fields(entry.gating),
        }
        for role, tensor in entry.tensors().items():  # a copy each: sites may share one
            tensors[f"{site.key}.{role}"] = tensor.clone(memory_format=torch.contiguous_format)
    write_json(folder / PLAN, {"version": VERSION, "sites": sites})
    write_tensors(folder / TENSORS, tensors)
    write_header(folder, header)


def load_plan(folder: Path) -> Plan:
    """Read a plan folder. Raises InputError when a file is missing, damaged or of another version."""
    content = read_json(folder / PLAN, "The plan")
    if content.get("version") != VERSION:
        raise InputError(
            f"A plan's version must be {VERSION}, "
            f"got {content.get('version')!r:.100}. Update sparsegate or make the plan "
            "again."
        )
    stored = load_tensors(folder / TENSORS, ["F32"])
    sites = content.get("sites")
    if not isinstance(sites, dict) or not all(_is_site(entry) for entry in sites.values()):
        raise InputError(
            f"The plan's sites must map a site to its edits and its gate, got {sites!r:.100} in {folder / PLAN}. Make "
            "the plan again."
        )
    plan: Plan = {}
    for key, entry in sites.items():
        site = Site.parse(key)
        if site.key != key:  # two spellings of a site would be two contents of one
            raise InputError(f"A site must be spelled {site.key}, got {key!r:.100}. Make the plan again.")
        tensors = {name.removeprefix(f"{key}."): t for name, t in stored.items() if name.startswith(f"{key}.")}
        plan[site] = make_site_plan(entry["edits"], entry["gate"], tensors)
        check_values(site, plan[site])
    check_plan(plan)
    return plan


def _is_site(entry: Any) -> bool:
    """Whether a JSON value has the form of a site's plan."""
    if not isinstance(entry, dict) or set(entry) != {"edits", "gate"} or not isinstance(entry["edits"], list):
        return False
    return all(isinstance(part, dict) for part in (*entry["edits"], entry["gate"]))


def make_site_plan(edits: list[dict[str, Any]], gate: dict[str, Any], tensors: Mapping[str, Tensor]) -> SitePlan:
    """A site's plan from the fields of its parts, `kind` among them, and its tensors by role.

    Raises InputError for an unknown kind and for a missing or unknown field or tensor.
    """
    residual = {name: tensors[role] for name, role in Residual.ROLES.items() if role in tensors}
    apart = {*Residual.ROLES.values(), OFFSET}
    rest = {role: tensor for role, tensor in tensors.items() if role not in apart}
    if residual and "weight" not in residual:
        raise InputError("A residual must have weight, got only fc1. Make the plan again.")
    return SitePlan(
        tuple(_make_part("edit", EDITS, edit, {}) for edit in edits),
        _make_part("gate", GATES, gate, rest),
        Residual(**residual) if residual else None,
        tensors.get(OFFSET),
    )


def _make_part(what: str, kinds: Mapping[str, Any], stored: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """An edit or a gate from its fields and tensors."""
    kind = str(stored.get("kind"))
    if kind not in kinds:
        raise InputError(
            f"A plan's kind of {what} must be one of {', '.join(kinds)}, "
            f"got {kind!r:.100}. Update sparsegate or make the "
            "plan again."
        )
    roles = kinds[kind].ROLES
    values = {name: value for name, value in stored.items() if name != "kind"}
    values |= {name: tensors[role] for name, role in roles.items() if role in tensors}
    allowed = {entry.name: entry.default is MISSING for entry in fields(kinds[kind])}
    missing = [roles.get(name, name) for name, needed in allowed.items() if needed and name not in values]
    unknown = [*(set(values) - set(allowed)), *(set(stored) & set(roles)), *(set(tensors) - set(roles.values()))]
    if missing or unknown:
        wrong = f"no {', '.join(missing)}" if missing else f"{', '.join(sorted(unknown))} as well"
        names = ", ".join(roles.get(name, name) for name in allowed)
        raise InputError(
            f"The fields and tensors of a {kind} must be {names}, got {wrong}. Update sparsegate or make the plan "
            "again."
        )
    return kinds[kind](**values)


def check_plan(plan: Plan) -> None:
    """Raise InputError where a part does not belong to its site, and where a layer gates both its network and a linear
    inside it.
    """
    for site, entry in plan.items():
        _check_parts(site, entry)
        inside = [name for name in FFN_LINEARS if Site(site.layer, kind=f"linear:{name}") in plan]
        if site.kind == "ffn" and inside:
            raise InputError(
                f"{site.key} must exclude the linear sites inside it, got {', '.join(inside)} as well. Gate neurons or "
                "inputs, not both."
            )


def _check_parts(site: Site, entry: SitePlan) -> None:
    """Raise InputError where the edits, the gate or the residual do not belong to the site's kind or to one another, or
    are not of their types.
    """
    gate, residual, is_linear = entry.gate, entry.residual, site.kind.startswith("linear:")
    if gate is None or len(entry.edits) > 1:
        parts = ", ".join([*map(kind_of, entry.edits), *([] if gate is None else [kind_of(gate)])]) or "none"
        raise InputError(
            f"{site.key} must have a gate, and at most one swap before it, got {parts}. Make another plan."
        )
    _check_types(site, entry)
    for edit in entry.edits:
        check_exact(edit.activation)
    if is_linear != (gate.score == "input") or (is_linear and (entry.edits or residual)):
        expected = "input and have no residual" if is_linear else "of neurons (gate or predictor)"
        raise InputError(f"The score of {site.key} must be {expected}, got {gate.score}. Make another plan.")
    if residual is not None and (isinstance(gate, Exact) or (residual.fc1 is None) == isinstance(gate, Threshold)):
        needed = "none behind exact zeros, fc1 of its own behind a threshold, and the predictor's behind a predictor"
        raise InputError(
            f"The residual of {site.key} must have {needed}, got another at {kind_of(gate)}. Mend the plan."
        )
    if entry.offset is not None and (is_linear or isinstance(gate, Exact)):
        raise InputError(f"The offset of {site.key} must stand behind skipped neurons, got another. Mend the plan.")
    if is_linear and site.kind.removeprefix("linear:") not in LINEARS:
        raise InputError(f"A linear site must be one of {', '.join(LINEARS)}, got {site.key}. Make another plan.")


def _check_types(site: Site, entry: SitePlan) -> None:
    """Raise InputError for a threshold's score that is no word, or that of another kind of gate, and for tensors with
    another number of axes than vectors and matrices have.
    """
    score = entry.gating.score
    others = {getattr(kind, "score", None) for kind in GATES.values()}
    if isinstance(entry.gate, Threshold) and (
        not isinstance(score, str) or not score.isidentifier() or score in others
    ):
        raise InputError(
            f"A threshold's score at {site.key} must be gate or input, got {ascii(score):.100}. Make another plan."
        )
    for role, tensor in entry.tensors().items():
        is_vector = role in ("tau", OFFSET)
        if tensor.ndim != (1 if is_vector else 2):
            axes = "[n]" if is_vector else "of two axes"
            raise InputError(
                f"{site.key}.{role} must have shape {axes}, got {list(tensor.shape)}. Make the plan again."
            )


def check_values(site: Site, entry: SitePlan) -> None:
    """Raise InputError for numbers that a plan cannot have: shares outside 0 to 1, tensors that are no float32, NaN,
    and infinity.

    tau alone may be +infinity, of a unit that is never kept, and then `density` leaves room for such units.
    """
    gate = entry.gating
    shares = {name: value for name, value in _part_fields(gate).items() if name in ("density", "opened", "recall")}
    for name, value in shares.items():
        if name != "recall" or value is not None:
            check_share(f"The {name} of {site.key}", value)
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
    tau = part_tensors(gate).get("tau")
    if tau is not None and gate.density > (most := float(tau.isfinite().double().mean())) + _SHARE_ERROR:
        raise InputError(
            f"The density of {site.key} must be at most {most:.3g}, the share of finite tau, got {gate.density}. Make "
            "the plan or checkpoint again."
        )


def check_share(what: str, value: Any) -> None:
    """Raise InputError unless `value` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{what} must be a number from 0 to 1, got {value!r:.100}. Fetch the checkpoint again.")


def check_exact(activation: Any) -> None:
    """Raise InputError unless `activation` is one with exact zeros."""
    if not isinstance(activation, str) or not activation.isprintable():
        raise InputError(f"A swap's activation must be a name, got {ascii(activation):.100}. Make another plan.")
    if not is_relu(activation):
        raise InputError(
            f"A swap's activation must have exact zeros ({either(forms(RELUS))}), got {activation}. Take one of these."
        )


def on_swaps(plan: Plan, swapped: Plan, base: str) -> Plan:
    """A plan for a model with `swapped` sites: each has its swap, under the gate that it has here or in `plan`.

    `base` is the activation of sites without a swap. Raises InputError for a site that the plan gives another
    activation.
    """
    whole = dict(plan)
    for site, entry in swapped.items():
        if site not in plan:
            whole[site] = entry
        elif not plan[site].edits:
            whole[site] = replace(plan[site], edits=entry.edits)
        elif plan[site].activation(base) != entry.activation(base):
            raise InputError(
                f"{site.key}'s activation must be {entry.activation(base)} as in the model, got "
                f"{plan[site].activation(base)} in the plan. Make another plan."
            )
    return in_order(whole)


def exact_part(plan: Plan) -> Plan:
    """What of a plan loses nothing by itself: its swaps, and the exact zeros of every site that has them."""
    whole = {site: entry for site, entry in plan.items() if entry.edits or isinstance(entry.gate, Exact)}
    return {
        site: entry if isinstance(entry.gate, Exact) else SitePlan(entry.edits, Exact())
        for site, entry in whole.items()
    }


def in_order(plan: Plan) -> Plan:
    """The plan by layers, a layer's network before its linears, which stay in the order of the data flow."""
    return dict(sorted(plan.items(), key=lambda item: (item[0].layer, item[0].kind != "ffn")))


def merge(plans: Iterable[Plan]) -> Plan:
    """One plan of several: neuron gating wins over the linear sites inside its network.

    Raises InputError for a site that two plans gate.
    """
    united: Plan = {}
    for plan in plans:
        for site, entry in plan.items():
            if site in united:
                raise InputError(
                    f"Plans to merge must gate different sites, got {site.key} twice. Leave it out of one."
                )
            united[site] = entry

    def inside(site: Site) -> bool:
        return site.kind.removeprefix("linear:") in FFN_LINEARS and Site(site.layer, site.expert) in united

    kept = in_order({site: entry for site, entry in united.items() if not inside(site)})
    check_plan(kept)
    return kept


def uniform_tau(value: float, units: int) -> Tensor:
    """One threshold repeated for every unit: [n] fp32."""
    return torch.full((units,), value, dtype=torch.float32)

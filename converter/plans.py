"""A plan says which units of a site are kept and by whom: {site: ordered list of entries}.

The kinds are closed. A row of KINDS names the class; `writer.py`, `reference.py` and `onnx_export/` hold one function each per kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .arch import Site
from .artifact import Header, InputError, read_json, write_header, write_json

PLAN = "plan.json"
TENSORS = "plan.safetensors"


@dataclass(frozen=True)
class Threshold:
    """Keep unit i of a token when score_i > tau_i. `score` names a score that the op computes ("gate"), `tau` is [n] fp32, `density` the calibrated share."""

    score: str
    tau: Tensor
    density: float

    def fields(self) -> dict[str, Any]:
        """The entry without its tensors, for JSON."""
        return {"kind": "threshold", "score": self.score, "density": self.density}

    def tensors(self) -> dict[str, Tensor]:
        """The entry's tensors by role."""
        return {"tau": self.tau}


@dataclass(frozen=True)
class Predictor:
    """Keep unit i when (fc2 relu(fc1 x))_i > tau_i; fc1 [r, d], fc2 [n, r], tau [n], all fp32.

    With `residual` [r, d], residual^T relu(fc1 x) stands in for what is skipped. `density` and `recall` (the kept share of the units that the label's
    score would keep) were measured on held-out calibration tokens.
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


Entry = Threshold | Predictor
Plan = dict[Site, list[Entry]]

KINDS: dict[str, type[Threshold] | type[Predictor]] = {"predictor": Predictor, "threshold": Threshold}


def make_entry(fields: dict[str, Any], tensors: dict[str, Tensor]) -> Entry:
    """The inverse of `fields` and `tensors`. Raises InputError for an unknown kind or a missing tensor."""
    kind = fields.get("kind")
    if kind not in KINDS:
        raise InputError(f"A plan's kind must be one of {', '.join(KINDS)}, got {kind!r}. Update sparsegate or make the plan again.")
    try:
        if kind == "threshold":
            entry: Entry = Threshold(fields["score"], tensors["tau"], fields["density"])
        else:
            fc1, fc2 = tensors["predictor.fc1.weight"], tensors["predictor.fc2.weight"]
            entry = Predictor(fc1, fc2, tensors["tau"], fields["density"], tensors.get("residual.weight"), fields.get("recall"))
    except KeyError as missing:
        raise InputError(f"A {kind} entry must have {missing}, got {sorted(fields)} and tensors {sorted(tensors)}. Make the plan again.") from None
    unknown = (set(fields) - set(entry.fields())) | (set(tensors) - set(entry.tensors()))
    if unknown:
        allowed = ", ".join([*entry.fields(), *entry.tensors()])
        raise InputError(f"A {kind} entry must hold only {allowed}, got {', '.join(sorted(unknown))} as well. Update sparsegate or make the plan again.")
    return entry


def save_plan(folder: Path, plan: Plan, header: Header) -> None:
    """Write plan, tensors and header into a stage folder."""
    sites, tensors = {}, {}
    for site, entries in plan.items():
        sites[site.key] = [entry.fields() for entry in entries]
        for number, entry in enumerate(entries):
            for role, tensor in entry.tensors().items():
                tensors[f"{site.key}.{number}.{role}"] = tensor.clone(memory_format=torch.contiguous_format)  # sites may share one
    write_json(folder / PLAN, {"version": 1, "sites": sites})
    save_file(tensors, folder / TENSORS)
    write_header(folder, header)


def load_plan(folder: Path) -> Plan:
    """Read a plan folder. Raises InputError when a file is missing, damaged or of another version."""
    data = read_json(folder / PLAN, "The plan")
    if data.get("version") != 1:
        raise InputError(f"A plan's version must be 1, got {data.get('version')!r}. Update sparsegate or make the plan again.")
    try:
        stored = load_file(folder / TENSORS)
    except (FileNotFoundError, SafetensorError) as error:
        raise InputError(f"The plan's tensors must be a safetensors file, got {error}. Make the plan again.") from None
    sites = data.get("sites")
    if not isinstance(sites, dict) or not all(isinstance(entries, list) and all(isinstance(f, dict) for f in entries) for entries in sites.values()):
        raise InputError(f"The plan's sites must map a site to its entries, got {type(sites).__name__} in {folder / PLAN}. Make the plan again.")
    plan: Plan = {}
    for key, entries in sites.items():
        plan[Site.parse(key)] = [
            make_entry(fields, {name.removeprefix(f"{key}.{number}."): t for name, t in stored.items() if name.startswith(f"{key}.{number}.")})
            for number, fields in enumerate(entries)
        ]
    return plan


def cost(entry: Entry, hidden: int, units: int, matrices: int, density: float) -> float:
    """Weight bytes touched per token relative to the dense network of `matrices` [n, d], at a realised density.

    A threshold on the gate needs the gate in full (a plain network's: the up projection); a predictor adds its own weights, a residual its own.
    """
    if isinstance(entry, Threshold):
        return (1 + (matrices - 1) * density) / matrices
    extra = entry.rank * (hidden + units) + (0 if entry.residual is None else entry.rank * hidden)
    return density + extra / (matrices * hidden * units)


def uniform_tau(value: float, units: int) -> Tensor:
    """One threshold repeated for every unit: [n] fp32."""
    return torch.full((units,), value, dtype=torch.float32)

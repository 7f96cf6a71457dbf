"""The sparse checkpoint's own part: config.json's closed `sparsity` key and sparsity/sparsity.safetensors. See FORMAT.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .arch import Site
from .artifact import InputError, read_json, write_json
from .plans import Entry, Plan, Predictor, Threshold, check_plan

VERSION = 1
KEY = "sparsity"
TENSORS = Path("sparsity") / "sparsity.safetensors"
_FIELDS = {
    "gate": {"score", "activation", "density"},
    "predictor": {"score", "activation", "density", "rank"},
    "input": {"score", "density"},
}
_KINDS = {"ffn": ("gate", "predictor"), "linear": ("input",)}


def encode(plan: Plan, activation: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `sparsity` key and the tensors of a plan.

    Raises InputError for a site without exactly one entry, for a score that the format does not know, and when `check_plan` does.
    """
    sites, tensors = {}, {}
    for site, entries in plan.items():
        if len(entries) != 1:
            raise InputError(f"{site.key} must have one entry in sparsity version {VERSION}, got {len(entries)}. Make another plan.")
        entry = entries[0]
        score = "predictor" if isinstance(entry, Predictor) else entry.score
        if score not in _FIELDS:
            raise InputError(f"The score of {site.key} must be one of {', '.join(_FIELDS)} in sparsity version {VERSION}, got {score!r}. Make another plan.")
        fields: dict[str, Any] = {"score": score, "activation": activation, "density": entry.density, "rank": entry.rank}
        fields = {name: value for name, value in fields.items() if name in _FIELDS[score]}
        if entry.residual is not None:
            fields |= {"rank": entry.rank, "residual": True}
        sites[site.key] = fields
        # a copy each: sites may share a tensor, which safetensors refuses
        tensors |= {f"{site.key}.{role}": tensor.clone(memory_format=torch.contiguous_format) for role, tensor in entry.tensors().items()}
    check_plan(plan)
    return {"version": VERSION, "sites": sites}, tensors


def write_sparsity(folder: Path, plan: Plan, activation: str) -> None:
    """Add the `sparsity` key to a folder's config.json and write the tensors beside it; `auto_map`, which names code that is not carried over, goes."""
    key, tensors = encode(plan, activation)
    raw = read_json(folder / "config.json", "config.json")
    raw.pop("auto_map", None)
    write_json(folder / "config.json", raw | {KEY: key})
    (folder / TENSORS).parent.mkdir(exist_ok=True)
    save_file(tensors, folder / TENSORS)


def read_sparsity(folder: Path) -> tuple[Plan, dict[str, str]]:
    """The plan of a sparse checkpoint and the activation of every feed-forward site. Raises InputError for anything outside the closed vocabulary."""
    raw = read_json(folder / "config.json", "config.json").get(KEY)
    if raw is None:
        raise InputError(f'A sparse checkpoint must have the key "{KEY}" in config.json, got none in {folder}. Run sparsegate convert first.')
    if not isinstance(raw, dict) or set(raw) - {"version", "sites"}:
        found = sorted(raw) if isinstance(raw, dict) else raw
        raise InputError(f'The key "{KEY}" must hold version and sites, got {found!r}. Update sparsegate or convert again.')
    if raw.get("version") != VERSION:
        raise InputError(f"The sparsity version must be {VERSION} for this sparsegate, got {raw.get('version')!r}. Update sparsegate.")
    if not isinstance(raw.get("sites"), dict):
        raise InputError(f"The sparsity sites must be an object, got {raw.get('sites')!r}. Fetch the checkpoint again.")
    try:
        stored = load_file(folder / TENSORS)
    except (FileNotFoundError, SafetensorError) as error:
        raise InputError(f"{TENSORS} must be a safetensors file, got {error}. Fetch the checkpoint again.") from None
    plan: Plan = {}
    activations: dict[str, str] = {}
    for key, fields in raw["sites"].items():
        site = Site.parse(key)
        kind = site.kind.partition(":")[0]
        if site.expert is not None or kind not in _KINDS:
            raise InputError(f"A site must read like layers.3.ffn or layers.3.linear.q_proj in sparsity version {VERSION}, got {key!r}. Update sparsegate.")
        plan[site] = [_entry(key, _check_fields(key, fields, _KINDS[kind]), stored)]
        if kind == "ffn":
            activations[site.key] = fields["activation"]
    check_plan(plan)
    known = {f"{site.key}.{role}" for site, entries in plan.items() for role in entries[0].tensors()}
    if set(stored) - known:
        raise InputError(f"{TENSORS} must hold only what config.json names, got {min(set(stored) - known)} as well. Update sparsegate.")
    return plan, activations


def _check_fields(key: str, fields: Any, scores: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise InputError(f"{key} must hold an object, got {fields!r}. Fetch the checkpoint again.")
    score = fields.get("score")
    if score not in scores:
        raise InputError(f"The score of {key} must be one of {', '.join(scores)} for sparsity version {VERSION}, got {score!r}. Update sparsegate.")
    needed = _FIELDS[score] | ({"rank"} if fields.get("residual") and score == "gate" else set())
    allowed = needed | (set() if score == "input" else {"residual"})
    unknown, missing = set(fields) - allowed, needed - set(fields)
    if unknown:
        raise InputError(f"{key} must hold only {sorted(allowed)} in sparsity version {VERSION}, got {sorted(unknown)}. Update sparsegate.")
    if missing:
        raise InputError(f"{key} must hold {sorted(missing)}, got only {sorted(fields)}. Fetch the checkpoint again.")
    density = fields["density"]
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 <= density <= 1:
        raise InputError(f"The density of {key} must be a number from 0 to 1, got {density!r}. Fetch the checkpoint again.")
    if score != "input" and not isinstance(fields["activation"], str):
        raise InputError(f"The activation of {key} must be a name, got {fields['activation']!r}. Fetch the checkpoint again.")
    return fields


def _entry(key: str, fields: dict[str, Any], stored: dict[str, Tensor]) -> Entry:
    def tensor(role: str) -> Tensor:
        name = f"{key}.{role}"
        if name not in stored:
            raise InputError(f"{TENSORS} must hold {name}, got no such tensor. Fetch the checkpoint again.")
        if bool(stored[name].isnan().any()):
            raise InputError(f"{name} must hold numbers, got NaN. Fetch the checkpoint again.")
        return stored[name].float()

    tau = tensor("tau")
    if tau.ndim != 1:
        raise InputError(f"{key}.tau must have shape [n], got {list(tau.shape)}. Fetch the checkpoint again.")
    score, density = fields["score"], float(fields["density"])
    if score == "input":
        return Threshold(score, tau, density)
    residual = tensor("residual.weight") if fields.get("residual") else None
    if score == "gate" and residual is None:
        return Threshold(score, tau, density)
    fc1 = tensor("residual.fc1.weight" if score == "gate" else "predictor.fc1.weight")
    if fc1.ndim != 2 or fc1.shape[0] != fields["rank"]:
        raise InputError(f"{key}'s fc1 must have shape [r, d] with r = {fields['rank']}, got {list(fc1.shape)}. Fetch the checkpoint again.")
    if residual is not None and residual.shape != fc1.shape:
        raise InputError(f"{key}.residual.weight must have shape {list(fc1.shape)}, got {list(residual.shape)}. Fetch the checkpoint again.")
    if score == "gate":
        return Threshold(score, tau, density, fc1, residual)
    fc2 = tensor("predictor.fc2.weight")
    if fc2.shape != (len(tau), fc1.shape[0]):
        raise InputError(f"{key}'s fc2 must have shape [{len(tau)}, r] with r = {fields['rank']}, got {list(fc2.shape)}. Fetch the checkpoint again.")
    return Predictor(fc1, fc2, tau, density, residual)

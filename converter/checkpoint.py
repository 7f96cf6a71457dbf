"""The sparse checkpoint's own part: config.json's closed `sparsity` key and sparsity/sparsity.safetensors. See FORMAT.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .arch import Site
from .artifact import InputError, read_json, write_json
from .plans import Entry, Plan, Predictor, Threshold

VERSION = 1
KEY = "sparsity"
TENSORS = Path("sparsity") / "sparsity.safetensors"
_FIELDS = {
    "gate": {"score", "activation", "density"},
    "predictor": {"score", "activation", "density", "rank", "residual"},
}


def encode(plan: Plan, activation: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `sparsity` key and the tensors of a plan with one entry a site."""
    sites, tensors = {}, {}
    for site, entries in plan.items():
        (entry,) = entries
        fields: dict[str, Any] = {"score": "gate", "activation": activation, "density": entry.density}
        if isinstance(entry, Predictor):
            fields |= {"score": "predictor", "rank": entry.rank}
            if entry.residual is not None:
                fields["residual"] = True
        sites[site.key] = fields
        tensors |= {f"{site.key}.{role}": tensor.contiguous() for role, tensor in entry.tensors().items()}
    return {"version": VERSION, "sites": sites}, tensors


def write_sparsity(folder: Path, plan: Plan, activation: str) -> None:
    """Add the `sparsity` key to a folder's config.json and write the tensors beside it."""
    key, tensors = encode(plan, activation)
    raw = read_json(folder / "config.json", "config.json")
    write_json(folder / "config.json", raw | {KEY: key})
    (folder / TENSORS).parent.mkdir(exist_ok=True)
    save_file(tensors, folder / TENSORS)


def read_sparsity(folder: Path) -> tuple[Plan, dict[str, str]]:
    """The plan of a sparse checkpoint and the activation of every site. Raises InputError for anything outside the closed vocabulary."""
    raw = read_json(folder / "config.json", "config.json").get(KEY)
    if raw is None:
        raise InputError(f'A sparse checkpoint must have the key "{KEY}" in config.json, got none in {folder}. Run sparsegate convert first.')
    if not isinstance(raw, dict) or set(raw) - {"version", "sites"}:
        raise InputError(f'The key "{KEY}" must hold version and sites, got {sorted(raw) if isinstance(raw, dict) else raw!r}. Update sparsegate or convert again.')
    if raw.get("version") != VERSION:
        raise InputError(f"The sparsity version must be {VERSION} for this sparsegate, got {raw.get('version')!r}. Update sparsegate.")
    try:
        stored = load_file(folder / TENSORS)
    except (FileNotFoundError, SafetensorError) as error:
        raise InputError(f"{TENSORS} must be a safetensors file, got {error}. Fetch the checkpoint again.") from None
    plan: Plan = {}
    activations: dict[str, str] = {}
    for key, fields in raw["sites"].items():
        site, score = Site.parse(key), fields.get("score")
        if score not in _FIELDS:
            raise InputError(f"The score of {key} must be one of {', '.join(_FIELDS)} for sparsity version {VERSION}, got {score!r}. Update sparsegate.")
        unknown = set(fields) - _FIELDS[score]
        if unknown:
            raise InputError(f"{key} must hold only {sorted(_FIELDS[score])} in sparsity version {VERSION}, got {sorted(unknown)}. Update sparsegate.")
        plan[site] = [_entry(key, fields, stored)]
        activations[site.key] = str(fields["activation"])
    return plan, activations


def _entry(key: str, fields: dict[str, Any], stored: dict[str, Tensor]) -> Entry:
    def tensor(role: str) -> Tensor:
        if f"{key}.{role}" not in stored:
            raise InputError(f"{TENSORS} must hold {key}.{role}, got no such tensor. Fetch the checkpoint again.")
        return stored[f"{key}.{role}"].float()

    tau = tensor("tau")
    if not bool((tau == tau).all()):
        raise InputError(f"{key}.tau must hold numbers, got NaN. Fetch the checkpoint again.")
    if fields["score"] == "gate":
        return Threshold("gate", tau, float(fields["density"]))
    fc1, fc2 = tensor("predictor.fc1.weight"), tensor("predictor.fc2.weight")
    if fc1.ndim != 2 or fc2.shape != (len(tau), fc1.shape[0]) or fc1.shape[0] != fields.get("rank"):
        raise InputError(
            f"{key}'s predictor must have fc1 [r, d], fc2 [{len(tau)}, r] with r = {fields.get('rank')}, got {list(fc1.shape)} and {list(fc2.shape)}. Fetch it again."
        )
    return Predictor(fc1, fc2, tau, float(fields["density"]), tensor("residual.weight") if fields.get("residual") else None)

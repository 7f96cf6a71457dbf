"""The sparse checkpoint's own part: config.json's closed `sparsity` key and sparsity/sparsity.safetensors. See
FORMAT.md.

Version 2 is for activations that were swapped and for sites that keep what is not zero, version 3 for offsets as well;
everything else stays version 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.ops.activation import is_relu
from ...runtime_onnx.untrusted import read_json
from ..arch import ACTIVATIONS, PREFIX, SWAPPED, load_arch, supported
from ..arch.site import Site
from .plan import (
    OFFSET,
    Exact,
    Gate,
    Plan,
    Predictor,
    Residual,
    SitePlan,
    Swap,
    Threshold,
    check_exact,
    check_plan,
    check_share,
    check_values,
)
from .stage import write_json, write_tensors
from .tensor_files import load_tensors

VERSIONS = (1, 2, 3)
KEY = "sparsity"
TENSORS = Path("sparsity") / "sparsity.safetensors"
CLASS = "Sparsegate"
"""What the names of classes that know a swapped activation begin with."""
FIELDS = {
    "gate": {"score", "activation", "density"},
    "predictor": {"score", "activation", "density", "rank"},
    "input": {"score", "density"},
    "exact": {"score", "activation", "density", "opened"},
}
SCORES = {
    1: {"ffn": ("gate", "predictor"), "linear": ("input",)},
    2: {"ffn": ("gate", "predictor", "exact"), "linear": ("input",)},
}
SCORES[3] = SCORES[2]
_KEYS = {1: {"version", "sites"}, 2: {"version", "base_activation", "sites"}}
_KEYS[3] = _KEYS[2]


class Key(NamedTuple):
    """The `sparsity` key as it was read: its version, the op's name of the base model's activation (None in version 1),
    and the fields of every site.
    """

    version: int
    base: str | None
    sites: dict[Site, dict[str, Any]]

    def swapped(self) -> dict[Site, str]:
        """The activations of the sites that do not compute with the base model's."""
        named = {site: fields["activation"] for site, fields in self.sites.items() if "activation" in fields}
        return {
            site: activation for site, activation in named.items() if self.base is not None and activation != self.base
        }

    def planned(self) -> list[Site]:
        """The sites of a plan: those that keep less than what is not zero."""
        return [site for site, fields in self.sites.items() if fields["score"] != "exact"]


WRITERS: dict[type[Gate], Callable[[Any], dict[str, Any]]] = {
    Exact: lambda gate: {"opened": gate.opened},
    Threshold: lambda gate: {},
    Predictor: lambda gate: {"rank": gate.rank},
}
"""Kind of gate -> what a site's object holds of it beside score, activation and density."""


def encode(plan: Plan, activation: str, base_activation: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `sparsity` key and the tensors of a plan on a model with an `activation` (the op's name), which transformers
    names `base_activation`.

    Raises InputError for a score that the format does not know, for exact zeros of an activation that has none, and
    when `check_plan` does.
    """
    check_plan(plan)
    sites, tensors, version = {}, {}, 1
    for site, entry in plan.items():
        gate, computed = entry.gating, entry.activation(activation)
        check_values(site, entry)
        if gate.score not in READERS:
            raise InputError(
                f"The score of {site.key} must be one of {', '.join(READERS)} in sparsity version 2, got "
                f"{gate.score!r:.100}. Make another plan."
            )
        if isinstance(gate, Exact):
            check_exact(computed)
        network = {} if gate.score == "input" else {"activation": computed}
        sites[site.key] = {"score": gate.score, **network, "density": gate.density, **WRITERS[type(gate)](gate)}
        if entry.residual is not None:
            sites[site.key] |= {"rank": entry.rank, "residual": True}
        if entry.offset is not None:
            sites[site.key] |= {"offset": True}
        needed = 3 if entry.offset is not None else 2 if isinstance(gate, Exact) or computed != activation else 1
        version = max(version, needed)
        # a copy each: sites may share a tensor, which safetensors refuses
        copies = {role: tensor.clone(memory_format=torch.contiguous_format) for role, tensor in entry.tensors().items()}
        tensors |= {f"{site.key}.{role}": tensor for role, tensor in copies.items()}
    if version == 1:
        return {"version": 1, "sites": sites}, tensors
    named = base_activation or next(name for name, known in ACTIVATIONS.items() if known == activation)
    return {"version": version, "base_activation": named, "sites": sites}, tensors


def write_sparsity(folder: Path, plan: Plan, activation: str) -> None:
    """Add the `sparsity` key to a folder's config.json and write the tensors beside it; `auto_map`, which names code
    that is not carried over, goes.

    `activation` is the base model's by the op's name. Where another one is swapped in, model type, class and activation
    are no longer stock ones.
    """
    raw = read_json(folder / "config.json", "config.json")
    raw.pop("auto_map", None)
    model_type = str(raw.get("model_type"))
    named = None
    if model_type in supported() or model_type.startswith(PREFIX):
        field = load_arch(model_type).ffn.activation.config
        named = raw[KEY]["base_activation"] if raw.get(field) == SWAPPED else raw.get(field)
    key, tensors = encode(plan, activation, named)
    if any(entry.activation(activation) != activation for entry in plan.values()):
        arch = load_arch(model_type)
        raw |= {"model_type": PREFIX + arch.model_type, arch.ffn.activation.config: SWAPPED}
        raw |= (
            {"architectures": [CLASS + name.removeprefix(CLASS) for name in raw["architectures"]]}
            if raw.get("architectures")
            else {}
        )
    write_json(folder / "config.json", raw | {KEY: key})
    if tensors:
        (folder / TENSORS).parent.mkdir(exist_ok=True)
        write_tensors(folder / TENSORS, tensors)


def write_stock(folder: Path) -> None:
    """Take the `sparsity` key from a folder's config.json, whose networks all compute the base model's own activation,
    and give it the base's names.
    """
    write_json(folder / "config.json", base_config(read_json(folder / "config.json", "config.json")))


def base_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint's config.json without its plan, under the base model's names."""
    if str(raw.get("model_type")).startswith(PREFIX):
        return stock_config(raw)
    return {name: value for name, value in raw.items() if name != KEY}


def stock_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The content of the base model's config.json: that of a checkpoint with a swapped activation under its stock name.
    Raises InputError as `read_key`.
    """
    arch, key = load_arch(str(raw.get("model_type"))), raw.get(KEY)
    read_key(key)
    config = {name: value for name, value in raw.items() if name != KEY}
    assert isinstance(key, dict)
    config |= {"model_type": arch.model_type, arch.ffn.activation.config: key["base_activation"]}
    return config | (
        {"architectures": [name.removeprefix(CLASS) for name in raw["architectures"]]}
        if raw.get("architectures")
        else {}
    )


def read_key(raw: Any) -> Key:
    """The `sparsity` key of a config.json. Raises InputError for anything outside the closed vocabulary of
    its version.
    """
    version: Any = raw.get("version") if isinstance(raw, dict) else 1
    if isinstance(version, bool) or version not in VERSIONS:
        raise InputError(
            f"The sparsity version must be {' or '.join(map(str, VERSIONS))} for this sparsegate, "
            f"got {version!r:.100}. "
            "Update sparsegate."
        )
    if not isinstance(raw, dict) or set(raw) - _KEYS[version]:
        actual = sorted(raw) if isinstance(raw, dict) else raw
        raise InputError(
            f'The key "{KEY}" must hold {", ".join(sorted(_KEYS[version]))}, got {actual!r:.100}. Update sparsegate or '
            "convert again."
        )
    if not isinstance(raw.get("sites"), dict):
        raise InputError(
            f"The sparsity sites must be an object, got {raw.get('sites')!r:.100}. Fetch the checkpoint again."
        )
    base = None
    if version > 1:
        if str(raw.get("base_activation")) not in ACTIVATIONS:
            raise InputError(
                f"base_activation must be one of {', '.join(sorted(ACTIVATIONS))}, "
                f"got {raw.get('base_activation')!r:.100}. "
                "Update sparsegate."
            )
        base = ACTIVATIONS[raw["base_activation"]]
    sites: dict[Site, dict[str, Any]] = {}
    for key, fields in raw["sites"].items():
        site = Site.parse(key)
        kind = site.kind.partition(":")[0]
        if site.key != key:  # two spellings of a site would be two contents of one
            raise InputError(f"A site must be spelled {site.key}, got {key!r:.100}. Fetch the checkpoint again.")
        if site.expert is not None or kind not in SCORES[version]:
            raise InputError(
                f"A site must read like layers.3.ffn or layers.3.linear.q_proj in sparsity version {version}, got "
                f"{key!r:.100}. Update sparsegate."
            )
        sites[site] = _check_fields(key, fields, version, SCORES[version][kind], base)
    return Key(version, base, sites)


def read_sparsity(folder: Path) -> tuple[Plan, dict[str, str]]:
    """The plan of a sparse checkpoint and the activation of every feed-forward site. Raises InputError for anything
    outside the closed vocabulary.
    """
    config = read_json(folder / "config.json", "config.json")
    if config.get(KEY) is None:
        raise InputError(
            f'A sparse checkpoint must have the key "{KEY}" in config.json, got none in {folder}. Run sparsegate '
            "convert first."
        )
    key = read_key(config[KEY])
    _check_type(config, key)
    stored = load_tensors(folder / TENSORS, ["F32"]) if key.planned() or (folder / TENSORS).exists() else {}
    swapped = key.swapped()
    plan: Plan = {}
    for site, fields in key.sites.items():
        of_site = _StoredSite(site.key, fields, stored)
        gate, residual = READERS[fields["score"]](of_site)
        edits = (Swap(swapped[site]),) if site in swapped else ()
        plan[site] = SitePlan(edits, gate, residual, of_site.tensor(OFFSET) if fields.get("offset") else None)
        check_values(site, plan[site])
    check_plan(plan)
    known = {f"{site.key}.{role}" for site, entry in plan.items() for role in entry.tensors()}
    if set(stored) - known:
        raise InputError(
            f"{TENSORS} must hold only what config.json names, got {min(set(stored) - known):.100} as well. Update "
            "sparsegate."
        )
    return plan, {site.key: fields["activation"] for site, fields in key.sites.items() if "activation" in fields}


def _check_type(config: dict[str, Any], key: Key) -> None:
    """A swapped activation and a model type that stock transformers does not know go together."""
    model_type = str(config.get("model_type"))
    if bool(key.swapped()) != model_type.startswith(PREFIX):
        expected = f"{PREFIX}<base>" if key.swapped() else "a stock one"
        raise InputError(
            f"model_type must be {expected} with the activations that {KEY} names, got {model_type}. Convert again."
        )
    if key.swapped():
        field = load_arch(model_type).ffn.activation.config
        if config.get(field) != SWAPPED:
            raise InputError(
                f"{field} must be {SWAPPED} where an activation was swapped, "
                f"got {config.get(field)!r:.100}. Convert again."
            )


def _check_fields(key: str, fields: Any, version: int, scores: tuple[str, ...], base: str | None) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise InputError(f"{key} must hold an object, got {fields!r:.100}. Fetch the checkpoint again.")
    score = fields.get("score")
    if score not in scores:
        raise InputError(
            f"The score of {key} must be one of {', '.join(scores)} for sparsity version {version}, "
            f"got {score!r:.100}. "
            "Update sparsegate."
        )
    needed = FIELDS[score] | ({"rank"} if fields.get("residual") and score == "gate" else set())
    beside = {"residual", "offset"} if version > 2 else {"residual"}
    allowed = needed | (beside if score in ("gate", "predictor") else set())
    unknown, missing = set(fields) - allowed, needed - set(fields)
    if unknown:
        raise InputError(
            f"{key} must hold only {sorted(allowed)} in sparsity version {version}, "
            f"got {str(sorted(unknown)):.100}. Update "
            "sparsegate."
        )
    if missing:
        raise InputError(
            f"{key} must hold {sorted(missing)}, got only {str(sorted(fields)):.100}. Fetch the checkpoint again."
        )
    for name in ("residual", "offset"):
        if not isinstance(fields.get(name, True), bool):
            raise InputError(
                f"The {name} of {key} must be true or false, got {fields[name]!r:.100}. Fetch the checkpoint again."
            )
    for name in {"density", "opened"} & needed:
        check_share(f"The {name} of {key}", fields[name])
    if "rank" in needed and (
        isinstance(fields["rank"], bool) or not isinstance(fields["rank"], int) or fields["rank"] < 1
    ):
        raise InputError(
            f"The rank of {key} must be a number from 1 on, got {fields['rank']!r:.100}. Fetch the checkpoint again."
        )
    if score != "input":
        _check_activation(key, fields["activation"], score, base)
    return fields


def _check_activation(key: str, activation: Any, score: str, base: str | None) -> None:
    if not isinstance(activation, str):
        raise InputError(
            f"The activation of {key} must be a name, got {activation!r:.100}. Fetch the checkpoint again."
        )
    if base is None or (activation == base and score != "exact"):
        return
    try:
        exact = is_relu(activation)
    except InputError:
        exact = False
    if not exact:
        raise InputError(
            f"The activation of {key} must be one with exact zeros that this sparsegate knows, "
            f"got {activation!r:.100}. "
            "Update sparsegate."
        )


class _StoredSite(NamedTuple):
    """What a checkpoint holds of a site: its key, its object in config.json, and all sites' tensors."""

    key: str
    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def density(self) -> float:
        return float(self.fields["density"])

    def tensor(self, role: str) -> Tensor:
        name = f"{self.key}.{role}"
        if name not in self.tensors:
            raise InputError(f"{TENSORS} must hold {name}, got no such tensor. Fetch the checkpoint again.")
        return self.tensors[name]

    def tau(self) -> Tensor:
        tau = self.tensor("tau")
        if tau.ndim != 1:
            raise InputError(f"{self.key}.tau must have shape [n], got {list(tau.shape)}. Fetch the checkpoint again.")
        return tau

    def fc1(self, role: str) -> Tensor:
        """The hidden layer [r, d] of the rank that config.json names."""
        fc1 = self.tensor(role)
        if fc1.ndim != 2 or fc1.shape[0] != self.fields["rank"]:
            raise InputError(
                f"{self.key}'s fc1 must have shape [r, d] with r = {self.fields['rank']}, got {list(fc1.shape)}. Fetch "
                "the checkpoint again."
            )
        return fc1

    def residual(self, fc1: Tensor) -> Tensor:
        weight = self.tensor("residual.weight")
        if weight.shape != fc1.shape:
            raise InputError(
                f"{self.key}.residual.weight must have shape {list(fc1.shape)}, got {list(weight.shape)}. Fetch the "
                "checkpoint again."
            )
        return weight


def _exact(stored: _StoredSite) -> tuple[Gate, Residual | None]:
    return Exact(stored.density, float(stored.fields["opened"])), None


def _input(stored: _StoredSite) -> tuple[Gate, Residual | None]:
    return Threshold("input", stored.tau(), stored.density), None


def _gate(stored: _StoredSite) -> tuple[Gate, Residual | None]:
    gate = Threshold("gate", stored.tau(), stored.density)
    if not stored.fields.get("residual"):
        return gate, None
    fc1 = stored.fc1("residual.fc1.weight")
    return gate, Residual(stored.residual(fc1), fc1)


def _predictor(stored: _StoredSite) -> tuple[Gate, Residual | None]:
    tau, fc1 = stored.tau(), stored.fc1("predictor.fc1.weight")
    residual = Residual(stored.residual(fc1)) if stored.fields.get("residual") else None
    fc2 = stored.tensor("predictor.fc2.weight")
    if fc2.shape != (len(tau), fc1.shape[0]):
        raise InputError(
            f"{stored.key}'s fc2 must have shape [{len(tau)}, r] with r = {fc1.shape[0]}, got {list(fc2.shape)}. Fetch "
            "the checkpoint again."
        )
    return Predictor(fc1, fc2, tau, stored.density), residual


READERS: dict[str, Callable[[_StoredSite], tuple[Gate, Residual | None]]] = {
    "gate": _gate,
    "predictor": _predictor,
    "input": _input,
    "exact": _exact,
}
"""Score in config.json -> what reads the site's gate and residual."""

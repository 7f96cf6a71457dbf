"""Predictors of other systems, read into a plan and written from one: PowerInfer, DejaVu, TurboSparse and Bamboo, as
safetensors.

A folder holds one file a layer, `model_{layer}.safetensors` with fc1.weight [r, d] and fc2.weight [n, r] (the rank r
may differ by layer), and optionally config.json with `sparse_threshold`; PowerInfer keeps neuron i unless logit_i <
threshold. A Hugging Face folder may instead hold them beside the feed-forward weights,
`model.layers.3.mlp.predictor.fc1.weight`; its model keeps neuron i when logit_i > 0. FORMAT.md, "Interchange", has the
whole of it.

Published predictors read the residual stream h before the feed-forward norm, the op reads the normed x = c diag(g) h
with c > 0 for every token. Without biases and with threshold 0 only the logits' signs count, so fc1 diag(1 / g) on x
decides exactly as fc1 does on h.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import read_json
from ..arch.site import Site
from ..checkpoint.plan import Plan, Predictor, SitePlan, on_swaps
from ..checkpoint.source import Source
from ..checkpoint.stage import hash_file, hash_json
from ..checkpoint.tensor_files import load_tensors
from ..modeling.blocks import embed, filled, moved
from ..modeling.empty import empty_model
from ..modeling.taps import block_calls, tapped_inputs, tapped_outputs

SOURCE = (
    "PowerInfer, arXiv 2312.12456 (folders, sparse_threshold); DejaVu, arXiv 2310.17157 (linear2); Turbo Sparse, arXiv "
    "2406.05955 (beside weights)",
    "keep unless fc2 relu(fc1 h) < threshold; fc2 fc1 h = [fc2, -fc2] relu([fc1; -fc1] h)",
    "the tap on the residual stream moves behind the norm; the threshold becomes a strict one, one float32 lower",
)
NEEDS = ("samples:magnitude",)
"""What `measured` needs of the statistics; the plan itself is made without any."""
CONFIG = "config.json"
THRESHOLD = "sparse_threshold"
"""Key of a config.json: a neuron is kept unless its logit is below the value."""
ROWS = 4096  # samples that density and recall are measured on: their logits [rows, n] are in memory at once

Form = Literal["mlp2", "linear2"]
Tap = Literal["input", "residual"]
SIGN_ONLY = (0.0, torch.nextafter(torch.tensor(0.0), torch.tensor(1.0)).item())
"""Thresholds that a positive factor on the logits does not touch: logit >= 0, and logit > 0 as >= the least positive
float32.
"""
_FILE = re.compile(r"model_(\d+)\.safetensors")
_PICKLE = re.compile(r".*\.(pt|bin|pth|ckpt|pkl)")
_ROLES = ("fc1.weight", "fc2.weight", "fc1.bias", "fc2.bias")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_TORCH_ONLY = (
    "Such predictors run in their own torch model only: train others with --method predictor, or set tap to "
    "input if these read the normed input."
)
_CONVERT = (
    'Run python -c "import sys, torch, safetensors.torch as s; [s.save_file(torch.load(f, weights_only=True), f[:-2] '
    "+ 'safetensors') "
    'for f in sys.argv[1:]]" model_*.pt on a machine you trust.'
)


class Config(BaseModel):
    """Which predictors to take.

    `folder` holds them (None: the model's own folder, beside its weights). `form` is mlp2, fc2 relu(fc1 h), or linear2,
    fc2 fc1 h. `tap` is what they read: `input`, the feed-forward network's input, or `residual`, the residual stream
    before the norm (None: what the folder's config.json says, else residual, as published). `threshold` replaces the
    folder's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    folder: str | None = None
    form: Form = "mlp2"
    tap: Tap | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Published:
    """A layer's predictor as it was found: fc1 [r, d] and fc2 [n, r] fp32, biases [r] and [n] or None; `name` says
    where, for messages.
    """

    name: str
    fc1: Tensor
    fc2: Tensor
    bias1: Tensor | None = None
    bias2: Tensor | None = None


def imported_plan(source: Source, config: Config) -> Plan:
    """The plan that the predictors in `config.folder`, or those beside the weights of `source`, mean for it; behind the
    swap of a site that has one.

    Densities are unknown and stand at 1 until `measured`. Raises InputError for files that are absent, pickles, damaged
    or of another model, and for predictors that the op cannot express.
    """
    if config.folder is None:
        return predictors_beside(source, config)
    folder = Path(config.folder)
    by_layer, settings = read_predictors(folder, source.arch.size(source.config, "layers"))
    threshold = settings.get(THRESHOLD, 0.0) if config.threshold is None else config.threshold
    tap = config.tap or settings.get("tap", "residual")
    if tap not in ("input", "residual"):
        raise InputError(f"tap must be input or residual, got {tap!r} in {folder / CONFIG}. Mend the file.")
    return predictor_plan(source, by_layer, config.form, tap, _number(threshold, folder), keep_equal=True)


def fingerprint(config: Config) -> str | None:
    """Sha256 (hex) over the files in `config.folder` that decide the plan; None beside the weights, which the model's
    own fingerprint covers.
    """
    if config.folder is None:
        return None
    paths = [
        path for path in sorted(Path(config.folder).glob("*")) if path.name == CONFIG or _FILE.fullmatch(path.name)
    ]
    return hash_json({path.name: hash_file(path) for path in paths})


def predictors_beside(source: Source, config: Config | None = None) -> Plan:
    """The plan of the predictors that sit beside the feed-forward weights of `source` (`....mlp.predictor.fc1.weight`):
    keep neuron i when logit_i > 0, or, where config.json has a `sparse_threshold`, unless logit_i is below it.

    Works and fails as `imported_plan`.
    """
    config = config or Config()
    by_layer = {}
    for site in source.arch.sites(source.config):
        prefix = source.arch.ffn_module(site.layer) + ".predictor."
        names = [name for name in source.tensors if name.startswith(prefix)]
        if not names:
            what = (
                f"The safetensors must hold {prefix}fc1.weight and {prefix}fc2.weight, got neither in {source.folder}."
            )
            raise InputError(
                f"{what} Name the folder of the predictors as `folder`, or take a model that carries them."
            )
        by_layer[site.layer] = _published(
            prefix.removesuffix("."), {name.removeprefix(prefix): t for name, t in source.read(names).items()}
        )
    stored = getattr(source.config, THRESHOLD, None)
    threshold = stored if config.threshold is None else config.threshold
    return predictor_plan(
        source,
        by_layer,
        config.form,
        config.tap or "residual",
        0.0 if threshold is None else _number(threshold, source.folder),
        keep_equal=stored is not None,
    )


def read_predictors(folder: Path, layers: int) -> tuple[dict[int, Published], dict[str, Any]]:
    """The predictors of a folder by layer, 0 to `layers` - 1, and the content of its config.json ({} without one).

    Raises InputError for a folder that is none, a layer that is absent or too many, pickles, damaged files and tensors
    that are no predictor's.
    """
    if not folder.is_dir():
        raise InputError(
            f"folder must be a folder with model_0.safetensors, model_1.safetensors and so on, got {folder}, which is "
            "none. Check the path."
        )
    present = {int(match[1]): path for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))}
    for layer in range(layers):
        if layer in present:
            continue
        pickles = sorted(path.name for path in folder.iterdir() if _PICKLE.fullmatch(path.name))
        if pickles:
            raise InputError(
                f"Predictors must be safetensors, got {pickles[0]}, a pickle file that can run code when read. "
                f"{_CONVERT}"
            )
        raise InputError(
            f"{folder} must hold model_{layer}.safetensors for a model of {layers} layers, got no such file. Fetch the "
            "predictors again."
        )
    if max(present) >= layers:
        raise InputError(
            f"{folder} must hold predictors of {layers} layers, got model_{max(present)}.safetensors as well. Take the "
            "predictors of this model."
        )
    settings = read_json(folder / CONFIG, f"{folder.name}/{CONFIG}") if (folder / CONFIG).is_file() else {}
    by_layer = {layer: _published(present[layer].name, load_tensors(present[layer])) for layer in range(layers)}
    return by_layer, settings


def _published(name: str, tensors: Mapping[str, Tensor]) -> Published:
    # nn.Sequential counts its children, the activation between them included
    known = {
        "0.weight": "fc1.weight",
        "1.weight": "fc2.weight",
        "2.weight": "fc2.weight",
        "0.bias": "fc1.bias",
        "1.bias": "fc2.bias",
        "2.bias": "fc2.bias",
    }
    renamed = {known.get(key, key): tensor for key, tensor in tensors.items()}
    if not {"fc1.weight", "fc2.weight"} <= set(renamed) <= set(_ROLES) or len(renamed) != len(tensors):
        raise InputError(
            f"{name} must hold fc1.weight, fc2.weight and at most their biases, got "
            f"{', '.join(sorted(tensors)) or 'nothing'}. Rename the tensors."
        )
    for role, tensor in renamed.items():
        if tensor.dtype not in _FLOATS:
            raise InputError(
                f"{name}'s {role} must be a float tensor, got {str(tensor.dtype).removeprefix('torch.')}. Take the "
                "unquantised predictors."
            )
        if not bool(tensor.isfinite().all()):
            raise InputError(
                f"{name}'s {role} must hold finite numbers, got NaN or infinity. Fetch the predictors again."
            )
    fc1, fc2, bias1, bias2 = (renamed[role].float() if role in renamed else None for role in _ROLES)
    assert fc1 is not None and fc2 is not None
    # biases of zeros say nothing
    return Published(
        name, fc1, fc2, *(None if bias is None or not bool(bias.any()) else bias for bias in (bias1, bias2))
    )


def _number(value: Any, where: Path) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(number := torch.tensor(float(value)).item())
    ):
        raise InputError(
            f"The predictors' threshold must be a finite float32, got {value!r} for {where}. Mend sparse_threshold."
        )
    return number  # a float32's value, as PowerInfer compares


def predictor_plan(
    source: Source, by_layer: Mapping[int, Published], form: Form, tap: str, threshold: float, keep_equal: bool
) -> Plan:
    """The plan that predictors by layer mean for `source`: neuron i stays when logit_i > threshold, with `keep_equal`
    when logit_i >= threshold.

    Raises InputError for predictors of another model and for those that the op cannot express.
    """
    arch, config = source.arch, source.config
    hidden = arch.size(config, "hidden")
    for layer, published in by_layer.items():
        units = arch.size(config, "units", layer)
        rank = published.fc1.shape[0] if published.fc1.ndim else 0
        expected = {"fc1": (rank, hidden), "fc2": (units, rank), "bias1": (rank,), "bias2": (units,)}
        for role, shape in expected.items():
            tensor = getattr(published, role)
            if tensor is not None and (tuple(tensor.shape) != shape or rank < 1):
                raise InputError(
                    f"{published.name}'s {role} must have shape {list(shape)} for this model, got "
                    f"{list(tensor.shape)}. Take the predictors of this model."
                )
        if tap == "residual" and (
            threshold not in SIGN_ONLY or published.bias1 is not None or published.bias2 is not None
        ):
            what = f"threshold {threshold:g}" if threshold not in SIGN_ONLY else "a bias"
            raise InputError(
                f"Predictors of the residual stream must have threshold 0 and no bias, got {what} for "
                f"{published.name}, "
                f"which the norm's factor for each token would change. {_TORCH_ONLY}"
            )
        if form == "mlp2" and published.bias1 is not None:
            raise InputError(
                f"{published.name} must have no fc1.bias, got one, which the op has no place for inside its ReLU. "
                "Set form to linear2 if there is none between the layers, or train predictors with --method predictor."
            )
    gains = residual_gains(source) if tap == "residual" else {}
    plan: Plan = {
        Site(layer): SitePlan(gate=_predictor(by_layer[layer], form, gains.get(Site(layer)), threshold, keep_equal))
        for layer in sorted(by_layer)
    }
    swapped = {site: entry for site, entry in source.swaps.items() if site in plan}
    return on_swaps(plan, swapped, source.arch.activation(source.config))


def _predictor(published: Published, form: Form, gain: Tensor | None, threshold: float, keep_equal: bool) -> Predictor:
    fc1, fc2 = published.fc1.double(), published.fc2.double()
    offset = torch.zeros(len(fc2), dtype=torch.float64) if published.bias2 is None else published.bias2.double()
    if published.bias1 is not None:
        offset = offset + fc2 @ published.bias1.double()
    if gain is not None:
        fc1 = fc1 / gain
    if form == "linear2":
        fc1, fc2 = torch.cat([fc1, -fc1]), torch.cat([fc2, -fc2], dim=1)
    return Predictor(fc1.float(), fc2.float(), strict_threshold(threshold - offset, keep_equal), density=1.0)


def strict_threshold(threshold: Tensor, keep_equal: bool) -> Tensor:
    """The tau [n] fp32 for which a float32 logit > tau means logit >= threshold (`keep_equal`), or else logit >
    threshold; `threshold` [n] fp64.
    """
    nearest = threshold.float()
    wide = nearest.double()
    too_high = wide >= threshold if keep_equal else wide > threshold
    return torch.where(too_high, torch.nextafter(nearest, torch.tensor(-math.inf)), nearest)


@torch.no_grad()
def residual_gains(source: Source) -> dict[Site, Tensor]:
    """The gain g [d] fp64 of every feed-forward norm: norm(h) = c diag(g) h with one c > 0 a token.

    The norm is the module whose result enters the feed-forward network. Raises InputError for a norm that is no such
    map (one that subtracts the mean or has a bias) and for a gain with zeros, which hide a channel.
    """
    model = empty_model(source)
    blocks = model.get_decoder().layers
    name = _norm_name(model, blocks, source)
    gains = {}
    for site in source.arch.sites(source.config):
        norm = blocks[site.layer].get_submodule(name)
        prefix = f"{source.arch.block_prefix(site.layer)}{name}."
        tensors = {key: source.read([prefix + key])[prefix + key] for key, _ in norm.named_parameters()}
        gain = _gain(norm, tensors)
        if gain is None:
            raise InputError(
                "Predictors of the residual stream must stand before a norm that only scales, got "
                f"{type(norm).__name__} "
                f"at {prefix.removesuffix('.')}. {_TORCH_ONLY}"
            )
        if not bool(gain.all()):
            at = int((gain == 0).nonzero()[0])
            raise InputError(
                f"{prefix}weight must have no zero for predictors of the residual stream, got one at channel {at}, "
                f"which the feed-forward network never sees. {_TORCH_ONLY}"
            )
        gains[site] = gain
    return gains


def _norm_name(model: Any, blocks: Any, source: Source) -> str:
    """The module below a block that makes the feed-forward network's input, found by running the first block on the
    meta device.
    """
    tokens, _ = embed(model, source, torch.zeros((1, 2), dtype=torch.long))
    call = block_calls(model, blocks, tokens, torch.ones((1, 2), dtype=torch.bool))
    block, outputs, inputs = blocks[0], [], []
    taps = {module: lambda y, name=name: outputs.append((name, y)) for name, module in block.named_modules() if name}
    with tapped_outputs(taps), tapped_inputs({block.get_submodule(source.arch.ffn.module): inputs.append}):
        block(call.hidden.to("meta"), **moved(call.keywords[0], "meta"))
    names = [name for name, y in outputs if inputs and y is inputs[0]]
    if not names:
        raise InputError(
            f"A norm must make the feed-forward network's input, got none in {source.arch.model_type}. Set tap to "
            "input."
        )
    return names[0]


def _gain(norm: Any, tensors: dict[str, Tensor]) -> Tensor | None:
    """The g [d] by which the norm multiplies, up to a c > 0: its weight, or its weight + 1 where the class adds the 1
    itself. None for any other map.
    """
    weight = tensors.get("weight")
    if weight is None or set(tensors) != {"weight"}:
        return None
    weight = weight.double()
    generator = torch.Generator().manual_seed(0)
    h = torch.rand(2, len(weight), generator=generator) + 0.5
    h *= torch.where(torch.rand(h.shape, generator=generator) < 0.3, -1.0, 1.0)  # a mean well away from zero
    with filled(norm, tensors, "cpu"):
        ratio = norm(h).double() / h.double()
    for gain in (weight, weight + 1):
        scale = (ratio @ gain / (gain @ gain))[:, None]
        if bool((scale > 0).all()) and bool(((ratio - scale * gain).abs() <= 1e-5 * ratio.abs().amax()).all()):
            return gain
    return None


@torch.no_grad()
def kept_units(predictor: Predictor, x: Tensor) -> Tensor:
    """Whether each neuron is kept, bool [T, n], of inputs of the feed-forward network `x` [T, d] fp32."""
    return F.relu(x @ predictor.fc1.T) @ predictor.fc2.T > predictor.tau


@torch.no_grad()
def measured(plan: Plan, stats: Mapping[Site, Mapping[str, Tensor]]) -> Plan:
    """The plan with every predictor's density and recall on stored samples (`NEEDS`): recall is the kept share of each
    token's top-k of |z| at that density.
    """
    filled_in: Plan = {}
    for site, entry in plan.items():
        gate = entry.gate
        assert isinstance(gate, Predictor)
        x, score = (
            stats[site]["samples:magnitude.x"][:ROWS].float(),
            stats[site]["samples:magnitude.score"][:ROWS].float(),
        )
        kept = kept_units(gate, x)
        density = float(kept.float().mean())
        count = max(1, round(density * kept.shape[1]))
        wanted = torch.zeros_like(kept).scatter_(1, score.topk(count, dim=1).indices, True)
        recall = float((kept & wanted).sum() / wanted.sum())
        filled_in[site] = replace(entry, gate=replace(gate, density=density, recall=recall))
    return filled_in

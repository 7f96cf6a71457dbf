"""A plan's predictors as other systems hold them: a folder of safetensors, one file a layer, and one threshold.

`predictors` reads such folders; FORMAT.md, "Interchange", has the whole of it.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ..arch.site import Site
from ..checkpoint.plan import Plan, Predictor, kind_of
from ..checkpoint.source import Source
from ..checkpoint.stage import atomic_folder, write_json, write_tensors
from .predictors import CONFIG, SIGN_ONLY, THRESHOLD, Tap, residual_gains

_REMEDIES = {
    "input": "Write fc2 biases (bias=True), which PowerInfer does not read, or share the checkpoint itself.",
    "residual": "Take published predictors (--method imported); those that sparsegate trains have one for each neuron.",
}


def export_predictors(
    plan: Plan, folder: str | Path, tap: Tap = "input", source: Source | None = None, bias: bool = False
) -> Path:
    """Write a plan's predictors as a new folder of `model_{layer}.safetensors` and config.json; returns the folder.

    Tensors, threshold and refusals are those of `folder_form`. Raises InputError for a folder that exists, too.
    """
    out = Path(folder)
    if out.exists():
        raise InputError(f"folder must be a new folder, got {out}, which exists. Choose another, or remove it.")
    layers, threshold = folder_form(plan, tap, source, bias)
    with atomic_folder(out, new=True) as partial:
        for layer, tensors in layers.items():
            write_tensors(partial / f"model_{layer}.safetensors", tensors)
        write_json(partial / CONFIG, {THRESHOLD: threshold, "tap": tap})
    return out


def folder_form(
    plan: Plan, tap: Tap, source: Source | None = None, bias: bool = False
) -> tuple[dict[int, dict[str, Tensor]], float]:
    """A plan's predictors as other systems hold them: fc1.weight [r, d] and fc2.weight [n, r] by layer, and the one
    threshold; a swap before one is left out.

    One tau for all neurons of all layers becomes the threshold, one float32 higher, so that equal logits decide as
    before. Differing ones need `bias`: they go into fc2.bias, which sparsegate and torch understand and PowerInfer does
    not. `tap` residual gives predictors of the residual stream before the norm, as PowerInfer feeds them: it needs the
    model as `source`, and a threshold of 0. Raises InputError for what the format cannot hold.
    """
    entries = _expressible(plan)
    cuts = {
        layer: torch.nextafter(entry.tau, torch.tensor(math.inf)) + 0.0 for layer, entry in entries.items()
    }  # + 0.0: no -0
    first = float(cuts[0][0])
    uneven = next((layer for layer, cut in cuts.items() if bool((cut != first).any())), None)
    if uneven is not None and not bias:
        what = (
            "differing ones"
            if bool((cuts[uneven] != cuts[uneven][0]).any())
            else f"{float(cuts[uneven][0]):g} after {first:g}"
        )
        raise InputError(
            f"A predictor folder has one threshold for every neuron of every layer, got {what} in {Site(uneven).key}. "
            f"{_REMEDIES[tap]}"
        )
    folded = uneven is not None
    if tap == "residual" and (folded or first not in SIGN_ONLY):
        what = "fc2 biases" if folded else f"threshold {first:g}"
        raise InputError(
            f"Predictors of the residual stream must have threshold 0 and no bias, got {what}. Write them with tap "
            "input, which PowerInfer does not read."
        )
    if tap == "residual" and source is None:
        raise InputError(
            "source must be the opened model for tap residual, got none. Give open_source(MODEL), or write with tap "
            "input."
        )
    if not folded and not math.isfinite(first):
        raise InputError(f"sparse_threshold must be a finite float32, got {first}. Lower tau.")
    gains = residual_gains(source) if tap == "residual" and source is not None else {}
    layers: dict[int, dict[str, Tensor]] = {}
    for layer, entry in entries.items():
        gain = gains.get(Site(layer))
        fc1 = entry.fc1 if gain is None else (entry.fc1.double() * gain).float()
        layers[layer] = {"fc1.weight": fc1.contiguous().clone(), "fc2.weight": entry.fc2.contiguous().clone()}
        if folded:
            layers[layer]["fc2.bias"] = -cuts[layer]
    return layers, 0.0 if folded else first


def _expressible(plan: Plan) -> dict[int, Predictor]:
    """The predictors by layer. Raises InputError for anything that a predictor folder has no place for."""
    predictors: dict[int, Predictor] = {}
    for site, entry in sorted(plan.items()):
        gate = entry.gate
        if not isinstance(gate, Predictor) or site.kind != "ffn" or site.expert is not None:
            kind = "none" if gate is None else kind_of(gate)
            raise InputError(
                f"A predictor folder holds one predictor a layer, got {kind} at {site.key}. Take a plan of --method "
                "predictor."
            )
        if entry.residual is not None or entry.offset is not None:
            raise InputError(
                f"A predictor folder has no residual heads and no offsets, got one at {site.key}. Train without them, "
                "or share the checkpoint itself."
            )
        predictors[site.layer] = gate
    if not predictors or list(predictors) != list(range(len(predictors))):
        raise InputError(
            f"A predictor folder holds layers 0, 1, 2 and so on, got {', '.join(map(str, predictors)) or 'none'}. Take "
            "a plan of every layer."
        )
    return predictors

"""The torch model that an exported file holds: every weight and predictor with the values that its storage gives back.

Its logits are what the file's body computes as long as activations stay in float32, so a difference beyond rounding is
a defect of the export.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..arch import Arch
from ..arch.shapes import linear_rows
from ..arch.site import Site
from ..checkpoint.plan import Plan, Predictor, Residual, SitePlan, linear_thresholds
from ..modeling.gated import apply_plan, remove_plan
from .emit import emit_parts
from .linear_region import cut_linears
from .matmul_nbits import BLOCK, block_rounded
from .precision import FLOAT_NAMES, PRECISIONS, Precision
from .stored_values import load_predictor, rounded, store_predictor


@torch.no_grad()
def round_model(model: Any, plan: Plan, arch: Arch, precision: str, target: str = "cpu") -> Any:
    """Replace in place the weights of a model gated by `plan`, and the plan's predictors, by what `export` stores for
    them; returns the model, gated.
    """
    form = PRECISIONS[precision]
    remove_plan(model)
    if target == "cuda":
        half = getattr(torch, FLOAT_NAMES[form.cuda])
        for parameter in model.parameters():
            parameter.copy_(parameter.to(half).float())
    head = model.lm_head
    shared = form.bits == 4 and head.in_features % BLOCK == 0
    if form.bits is not None and not shared and head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.clone())  # the file keeps a float embedding beside the output's integers
    rows = linear_rows(arch, model.config)
    done: set[str] = set()
    for site in arch.sites(model.config):
        new = dict(_layer(model, plan, arch, form, site.layer))
        below = [arch.block_prefix(site.layer) + name for name in rows]
        for name in below:
            _write(model.get_submodule(name), new.get(name, []), form)
        done.update(below)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in done:
            _write(module, [], form)
    return apply_plan(
        model,
        {site: _entry(entry, form) for site, entry in plan.items()},
        arch,
        arch.activation(model.config),
    )


def _write(module: Any, new: list[tuple[slice, Tensor]], form: Precision) -> None:
    """Put new rows into a linear module; the others, which MatMulNBits computes, are rounded in its blocks."""
    covered = sum(at.stop - at.start for at, _ in new)
    if form.bits is not None and covered < len(module.weight):
        module.weight.copy_(torch.from_numpy(block_rounded(module.weight.detach().numpy(), form.bits)))
    for at, values in new:
        module.weight[at] = values


def _layer(
    model: Any, plan: Plan, arch: Arch, form: Precision, layer: int
) -> Iterator[tuple[str, list[tuple[slice, Tensor]]]]:
    """The rows of a layer's modules that ops compute, by module."""
    rows, prefix, by_module = linear_rows(arch, model.config, layer), arch.block_prefix(layer), {}

    def matrices(names: tuple[str, ...]) -> list[tuple[str, slice, NDArray[np.float32]]]:
        places = [(prefix + arch.linears()[name][0], rows[arch.linears()[name][0]][name]) for name in names]
        return [(module, at, model.get_submodule(module).weight.detach()[at].numpy()) for module, at in places]

    def put(module: str, at: slice, values: NDArray[np.float32]) -> None:
        by_module.setdefault(module, []).append((at, torch.from_numpy(np.ascontiguousarray(values))))

    if Site(layer) in plan:
        hidden = arch.size(model.config, "hidden")
        weights = form.fitting(hidden)
        for name in ("gate_proj", "up_proj", "down_proj"):
            if name in arch.linears():
                ((module, at, matrix),) = matrices((name,))
                by_neuron = matrix.T if name == "down_proj" else matrix
                values = rounded(np.ascontiguousarray(by_neuron), weights, form.w)
                put(module, at, values.T if name == "down_proj" else values)
    tau = {name: tau.numpy() for name, tau in linear_thresholds(plan, layer).items()}
    for parts in cut_linears(arch, model.config, layer, tau).values():
        for part in parts:
            if part.tau is None:
                continue
            pieces = matrices(part.names)
            by_channel = np.concatenate([matrix for _, _, matrix in pieces]).T  # [d_in, d_out]
            weights = form.fitting(by_channel.shape[1])
            values, start = rounded(np.ascontiguousarray(by_channel), weights, form.w).T, 0
            for module, at, matrix in pieces:
                put(module, at, values[start : start + len(matrix)])
                start += len(matrix)
    yield from by_module.items()


def _entry(entry: SitePlan, form: Precision) -> SitePlan:
    """A site's plan with the predictor and the residual that the file holds."""
    if not isinstance(entry.gate, Predictor) and entry.residual is None:
        return entry
    stored = load_predictor(store_predictor(emit_parts(entry).tensors, form)[0])
    read = {role: torch.from_numpy(array) for role, array in stored.items()}
    gate, residual = entry.gate, entry.residual
    if isinstance(gate, Predictor):
        gate = replace(gate, fc1=read["p1"], fc2=read["p2"])
    if residual is not None:
        residual = Residual(read["res"], None if residual.fc1 is None else read["p1"])
    return replace(entry, gate=gate, residual=residual)

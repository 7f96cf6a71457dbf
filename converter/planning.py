"""What a conversion will need, from configuration and safetensors headers alone: parameters, disk and peak memory by stage."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from pydantic import BaseModel

from .arch import Arch
from .methods import make_config, needs
from .methods.predictor import Config as PredictorConfig
from .methods.predictor import rank_for
from .plans import Threshold, cost, uniform_tau
from .recipe import Recipe
from .source import Source
from .stats.samples import CAP

_FP32, _FP16 = 4, 2
_RUNTIME = 500_000_000  # bytes of a process with torch, transformers and onnxruntime imported


class Estimate(BaseModel):
    """Bytes unless said otherwise. `peak_calibrate` is two blocks in fp32, the hidden states and a batch's activations; `peak_export` the whole model in
    fp32, because onnxruntime-genai's builder and the verification load it."""

    parameters: int
    ffn_share: float
    source_bytes: int
    disk_bytes: int
    peak_calibrate: int
    peak_export: int
    expected_cost: dict[str, float]


def estimate_shapes(arch: Arch, config: Any, shapes: Mapping[str, tuple[int, ...]], source_bytes: int, recipe: Recipe, configs: Mapping[str, dict[str, Any]]) -> Estimate:
    """The estimate from tensor shapes by name."""
    hidden, units, layers = (arch.size(config, space) for space in ("hidden", "units", "layers"))
    parameters = sum(prod(shape) for shape in shapes.values())
    ffn = {name for layer in range(layers) for name in (arch.block_prefix(layer) + weight.name for weight in arch.weights)} & set(shapes)
    prefix = arch.block_prefix(0)
    block = sum(prod(shape) for name, shape in shapes.items() if name.startswith(prefix))
    windows = recipe.calibration.windows * recipe.calibration.length
    samples = 0
    for name, values in configs.items():
        if any(stat.startswith("samples") for stat in needs(name, make_config(name, values))):
            samples = layers * min(CAP, windows) * (hidden + units) * _FP16
    tied = arch.embedding in shapes and not any(name.startswith("lm_head") for name in shapes)
    whole = (parameters + (prod(shapes[arch.embedding]) if tied else 0)) * _FP32
    disk = samples + len(configs) * source_bytes + (1 + len(configs)) * whole
    batch = 2048 * (hidden * 4 + units * 5) * _FP32
    return Estimate(
        parameters=parameters,
        ffn_share=sum(prod(shapes[name]) for name in ffn) / parameters,
        source_bytes=source_bytes,
        disk_bytes=disk,
        peak_calibrate=_RUNTIME + 2 * block * _FP32 + 2 * windows * hidden * _FP32 + batch,
        peak_export=_RUNTIME + 2 * whole,
        expected_cost={name: _expected_cost(arch, name, values, hidden, units) for name, values in configs.items()},
    )


def estimate(source: Source, recipe: Recipe, configs: Mapping[str, dict[str, Any]]) -> Estimate:
    """The estimate for an opened source."""
    shapes = {name: info.shape for name, info in source.tensors.items()}
    return estimate_shapes(source.arch, source.config, shapes, sum(info.bytes for info in source.tensors.values()), recipe, configs)


def _expected_cost(arch: Arch, name: str, values: dict[str, Any], hidden: int, units: int) -> float:
    config: Any = make_config(name, values)
    matrices, density = 2 if arch.ffn.kind == "plain" else 3, 1 - config.sparsity
    if isinstance(config, PredictorConfig):
        rank = config.rank or rank_for(hidden, units, matrices, config.cost)
        return density + rank * (hidden + units) / (matrices * hidden * units)
    return cost(Threshold("gate", uniform_tau(0.0, 1), density), hidden, units, matrices, density)

"""What flags mean as a recipe, and what a conversion will need, from configuration and safetensors headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from .arch import Arch
from .artifact import InputError
from .methods import METHODS, load_method, make_config, needs
from .methods.predictor import Config as PredictorConfig
from .methods.predictor import rank_for
from .plans import Threshold, cost, uniform_tau
from .recipe import Recipe, make_recipe, read_recipe
from .source import Source
from .stats.samples import CAP

BUNDLED_MODEL = "bundled"
"""How a recipe names the small model that comes with sparsegate."""
BUNDLED_NAME = "sparsegate-small"
_FP32, _FP16 = 4, 2
_RUNTIME = 500_000_000  # bytes of a process with torch, transformers and onnxruntime imported


class Estimate(BaseModel):
    """Bytes unless said otherwise. `peak_calibrate` is two blocks in fp32, the hidden states and a batch's activations; `peak_export` the whole model in
    fp32, because onnxruntime-genai's builder and the verification load it.
    """

    parameters: int
    ffn_share: float
    source_bytes: int
    disk_bytes: int
    peak_calibrate: int
    peak_export: int
    expected_cost: dict[str, float]


def estimate_shapes(
    arch: Arch, config: Any, shapes: Mapping[str, tuple[int, ...]], source_bytes: int, recipe: Recipe, configs: Mapping[str, dict[str, Any]]
) -> Estimate:
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


def compile_recipe(
    model: str | None,
    method: str | None,
    sparsity: float | None,
    max_ppl_increase: float | None,
    max_kl: float | None,
    recipe: str | Path | None,
    calibration: str | Path | None,
    precision: str | None,
    target: str | None,
    seed: int | None,
) -> Recipe:
    """The recipe that flags mean, or the one in a file. Raises InputError for bad values, and for a file together with flags that it covers."""
    flags = {
        "method": method, "sparsity": sparsity, "max_ppl_increase": max_ppl_increase, "max_kl": max_kl, "calibration": calibration,
        "precision": precision, "target": target, "seed": seed, "MODEL": model,
    }  # fmt: skip
    if recipe:
        given = [name for name, value in flags.items() if value is not None]
        if given:
            raise InputError(f"--recipe must stand without the flags that it covers, got {', '.join(given)} as well. Put them into the recipe.")
        return read_recipe(Path(recipe))
    sparsity = 0.5 if sparsity is None else sparsity
    if not 0 < sparsity < 1:
        raise InputError(f"sparsity must lie strictly between 0 and 1, got {sparsity}. Use 0.5 to skip half of the gated neurons.")
    if method not in (None, "auto"):
        load_method(str(method))
    values = {
        "model": str(model) if model else BUNDLED_MODEL,
        "calibration": {"file": str(calibration) if calibration else None},
        "seed": seed or 0,
        "stages": [{"method": method or "auto", "config": {"sparsity": sparsity}}],
        "budget": {"max_ppl_increase": max_ppl_increase, "max_kl": max_kl},
        "export": {"precision": precision or "fp32", "target": target or "cpu"},
    }
    return make_recipe(values, "convert")


def method_configs(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The methods to try and their configurations; `auto` is every method with the fields that it knows. The recipe's seed goes to those that train."""
    (stage,) = recipe.stages
    names = list(METHODS) if stage.method == "auto" else [stage.method]
    known = {key for name in names for key in load_method(name).Config.model_fields}
    unknown = sorted(set(stage.config) - known)
    if unknown:
        raise InputError(f"The configuration of {stage.method} must hold only {', '.join(sorted(known))}, got {', '.join(unknown)}. Mend the recipe.")
    found = {}
    for name in names:
        fields = load_method(name).Config.model_fields
        seed = {"seed": recipe.seed} if "seed" in fields else {}
        found[name] = seed | (stage.config if stage.method != "auto" else {key: value for key, value in stage.config.items() if key in fields})
    return found

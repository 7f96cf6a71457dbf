"""What a conversion needs, from headers alone: weights, disk and memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any

from pydantic import BaseModel

from ..arch import Arch
from ..checkpoint.cost import SiteSize, cost
from ..checkpoint.plan import SitePlan, Threshold, uniform_tau
from ..checkpoint.source import Source
from ..methods import DECIDES, IMPORTED, NEURON_METHODS, load_method, needs
from ..methods.tune import tune_of
from ..modeling.predictor import residual_rank
from ..modeling.processes import cores
from ..onnx_export.matmul_nbits import BLOCK
from ..onnx_export.precision import PRECISIONS, Precision
from ..sources.predictors import NEEDS as IMPORTED_NEEDS
from ..stats.moments import ROWS
from ..stats.samples import CAP
from ..training.settings import Recovery, count_for
from .configs import AUTO, Configs, rotates
from .recipe import Recipe, training_stages

_FP32, _FP16 = 4, 2


_RUNTIME = 500_000_000  # bytes of a process with torch, transformers and onnxruntime imported


class Estimate(BaseModel):
    """What a conversion needs. Bytes unless said otherwise.

    Attributes:
        onnx_bytes: Size of a sparse ONNX model by precision, predictors left out.
        peak_calibrate: Two blocks in fp32, the hidden states and a batch's activations; or what a training stage holds,
            where that is more.
        peak_export: The whole model in fp32: onnxruntime-genai's builder and the verification load it.
        seconds: That the stages are expected to take on this machine, the download left out.
        notes: What a time budget leaves out, one line each.
    """

    parameters: int
    ffn_share: float
    source_bytes: int
    disk_bytes: int
    peak_calibrate: int
    peak_export: int
    onnx_bytes: dict[str, int] = {}
    expected_cost: dict[str, float]
    download_bytes: int = 0
    seconds: dict[str, float] = {}
    notes: list[str] = []


def estimate_shapes(
    arch: Arch, config: Any, shapes: Mapping[str, tuple[int, ...]], source_bytes: int, recipe: Recipe, configs: Configs
) -> Estimate:
    """The estimate from tensor shapes by name."""
    hidden, units, layers = (arch.size(config, space) for space in ("hidden", "units", "layers"))
    parameters = sum(prod(shape) for shape in shapes.values())
    ffn = {
        name for layer in range(layers) for name in (arch.block_prefix(layer) + weight.name for weight in arch.weights)
    } & set(shapes)
    block = sum(prod(shape) for name, shape in shapes.items() if name.startswith(arch.block_prefix(0)))
    windows = recipe.calibration.windows * recipe.calibration.length
    stats = {
        stat
        for parts in configs.values()
        for part, values in parts.items()
        for stat in (IMPORTED_NEEDS if part == IMPORTED else needs(part, values))
    }
    samples = layers * _stored_bytes(stats, hidden, units, windows)
    tied = arch.embedding in shapes and not any(name.startswith("lm_head") for name in shapes)
    whole = (parameters + (prod(shapes[arch.embedding]) if tied else 0)) * _FP32
    sizes = {
        name: _onnx_bytes(arch, shapes, ffn, tied, form, recipe.export.target) for name, form in PRECISIONS.items()
    }
    turned = recipe.rotate or rotates(recipe, arch)
    disk = samples + source_bytes + whole + _stage_bytes(recipe, configs, sizes, source_bytes, whole)
    disk += whole * (1 + rotates(recipe, arch)) if turned else 0  # the rotated model, and of `auto` a graph of its own
    batch = 2048 * (hidden * 4 + units * 5) * _FP32
    form = PRECISIONS[recipe.export.precision]
    costs = {
        name: _expected_cost(arch, parts, hidden, units, form)
        for name, parts in configs.items()
        if parts and not set(DECIDES) & set(parts)
    }
    calibrate = _RUNTIME + 2 * block * _FP32 + 2 * windows * hidden * _FP32 + batch
    if turned:  # the model in fp32, its rotated weights, and of one of them fp64
        calibrate = max(calibrate, _RUNTIME + 2 * whole + 4 * prod(shapes[arch.embedding]) * _FP32)
    return Estimate(
        parameters=parameters,
        ffn_share=sum(prod(shapes[name]) for name in ffn) / parameters,
        source_bytes=source_bytes,
        disk_bytes=disk,
        peak_calibrate=max(
            [
                calibrate,
                *(
                    _RUNTIME + _training_bytes(stage.tune, parameters, shapes, arch)
                    for stage in training_stages(recipe)
                ),
            ]
        ),
        peak_export=_RUNTIME + 2 * whole,
        onnx_bytes=sizes,
        expected_cost={} if recipe.searches else costs,
    )


def _stored_bytes(stats: Collection[str], hidden: int, units: int, tokens: int) -> int:
    """Bytes that a layer's stored activations and moments take."""
    samples = min(CAP, tokens) * (hidden + units) * _FP16
    moments = (hidden + min(ROWS, tokens) // 2) * (hidden + units) * _FP32  # rows are in fp16
    return sum(samples * stat.startswith("samples") + moments * stat.startswith("moments") for stat in stats)


def _stage_bytes(recipe: Recipe, configs: Configs, sizes: Mapping[str, int], source_bytes: int, whole: int) -> int:
    """Bytes of graphs and of models with other weights; `whole` are those of the model in fp32."""
    precision = recipe.export.precision
    graphs = sizes[precision] * (2 if PRECISIONS[precision].bits else 1)
    graphs += whole // 2 if recipe.export.target == "cuda" else sizes["int8"]  # fp16, or a dense reference
    tunes = [tune_of(values) for parts in configs.values() for values in parts.values()]
    updated = sum(tune is not None and tune.updates != "none" for tune in tunes)
    updated = min(1, updated) if recipe.stages[-1].method == AUTO else updated  # which trains one form at most
    # the weights of a training, its copy in the plan, its model twice
    return graphs + updated * 2 * (whole + source_bytes)


def _training_bytes(
    recovery: Recovery | None, parameters: int, shapes: Mapping[str, tuple[int, ...]], arch: Arch
) -> int:
    """Bytes of a training stage on a CPU, all in fp32: teacher and student, gradient and two moments of what is
    trained, in each of its processes, and a batch's logits three times.
    """
    assert recovery is not None
    trained = (
        parameters
        if recovery.lora is None
        else sum(recovery.lora.rank * sum(shape) for name, shape in shapes.items() if len(shape) == 2)
    )
    logits = 3 * recovery.windows * recovery.data.length * shapes[arch.embedding][0]
    processes = count_for(recovery, parameters, cores())
    return (
        _FP32 * (processes * (2 * parameters + 3 * trained) + logits) + (processes if processes > 1 else 0) * _RUNTIME
    )  # the caller has its own


def _onnx_bytes(
    arch: Arch, shapes: Mapping[str, tuple[int, ...]], ffn: set[str], tied: bool, form: Precision, target: str
) -> int:
    """Bytes of an ONNX model's weights: gated ones in the op's format, other matrices in MatMulNBits' blocks or floats,
    and the embedding, which a tied model keeps once in floats and with 4 bits, and besides the output with 8.
    """
    plain = _FP32 if target == "cpu" or form.cuda == "fp32" else _FP16
    gated = {"int8_row": 1.0, "int4_g32": 0.5 + _FP16 / BLOCK}.get(
        form.weights, _FP32 if form.w == "float32" else _FP16
    )
    rest = plain if form.bits is None else form.bits / 8 + plain / BLOCK
    total = 0.0
    for name, shape in shapes.items():
        count = prod(shape)
        if name == arch.embedding:
            total += count * (plain if not tied or form.bits is None else rest + (plain if form.bits == 8 else 0))
        else:
            total += count * (gated if name in ffn and len(shape) == 2 else rest if len(shape) == 2 else plain)
    return int(total)


def estimate(source: Source, recipe: Recipe, configs: Configs) -> Estimate:
    """The estimate for an opened source."""
    shapes = {name: info.shape for name, info in source.tensors.items()}
    return estimate_shapes(
        source.arch, source.config, shapes, sum(info.bytes for info in source.tensors.values()), recipe, configs
    )


def _expected_cost(arch: Arch, parts: Mapping[str, Any], hidden: int, units: int, form: Precision) -> float:
    """Bytes of the feed-forward networks touched per token relative to dense ones in the same precision: of the part
    that gates neurons, where there is one.
    """
    name, config = next(
        ((name, config) for name, config in parts.items() if name in NEURON_METHODS), next(iter(parts.items()))
    )
    size, density = SiteSize(hidden, units, arch.matrices), 1 - config.sparsity
    heads = getattr(config, "residual", "none") != "none"
    share = form.predictor_share(heads)
    method = load_method(name)
    if hasattr(method, "rank"):
        rank = method.rank(config, hidden, units, arch.matrices)
        return density + share * rank * (hidden + units + heads * hidden) / size.weights
    heads_cost = share * heads * 2 * residual_rank(units, arch.matrices) / (arch.matrices * units)
    gate = Threshold("gate" if name in NEURON_METHODS else "input", uniform_tau(0.0, 1), density)
    return heads_cost + cost(SitePlan(gate=gate), size, density)

"""What flags mean as a recipe, and what a conversion will need, from configuration and safetensors headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..runtime_onnx.ops.activation import is_relu
from .arch import Arch
from .artifact import InputError
from .interchange import NEEDS as IMPORTED_NEEDS
from .interchange import Config as ImportedConfig
from .local_processes import cores, count_for
from .methods import load_method, make_config, needs, validated
from .methods.predictor import Config as PredictorConfig
from .methods.predictor import rank_for
from .methods.trained_gate import Config as GateConfig
from .onnx_export.matmul_nbits import BLOCK
from .onnx_export.precision import PRECISIONS, Precision
from .plans import FFN_LINEARS, LINEARS, Threshold, cost, uniform_tau
from .recipe import Recipe, Recovery, Stage, make_recipe, read_recipe
from .residual import residual_rank
from .source import Source
from .stats.samples import CAP

BUNDLED_MODEL = "bundled"
"""How a recipe names the small model that comes with sparsegate."""
BUNDLED_NAME = "sparsegate-small"
SELF = "self"
"""The value of --calibration that means text sampled from the model itself."""
IMPORTED = "imported"
"""The method that takes predictors from files; it is none of METHODS because it reads them."""
NEURON_METHODS = ("gate", "chess", "cett", "trained_gate", "predictor")
"""Methods that keep a share of the neurons."""
LINEAR_METHODS = ("teal", "wina")
EXACT = "exact"
TUNED = "tuned"
"""What a recipe's plan is called when its last stage trains weights: what the training ended with."""
RECIPES = Path(__file__).parent / "recipes"
AUTO = {False: NEURON_METHODS, True: (*NEURON_METHODS, *LINEAR_METHODS, "chess+teal")}
"""What `auto` tries, by whether a budget is searched: a share of neurons means nothing to methods that skip input channels. For a model with exact zeros it
tries `exact` too.
"""
Configs = Mapping[str, Mapping[str, BaseModel]]
"""Method -> its parts (one, or those that `+` joins) -> their configurations."""
_FP32, _FP16 = 4, 2
_RUNTIME = 500_000_000  # bytes of a process with torch, transformers and onnxruntime imported


class Estimate(BaseModel):
    """Bytes unless said otherwise. `onnx_bytes` is the size of a sparse ONNX model by precision, predictors left out; `peak_calibrate` two blocks in fp32, the
    hidden states and a batch's activations, or what a training stage holds where that is more; `peak_export` the whole model in fp32, because
    onnxruntime-genai's builder and the verification load it. `seconds` are those that the stages are expected to take on this
    machine, the download left out, and `notes` say what a time budget leaves out, one line each.
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


def estimate_shapes(arch: Arch, config: Any, shapes: Mapping[str, tuple[int, ...]], source_bytes: int, recipe: Recipe, configs: Configs) -> Estimate:
    """The estimate from tensor shapes by name."""
    hidden, units, layers = (arch.size(config, space) for space in ("hidden", "units", "layers"))
    parameters = sum(prod(shape) for shape in shapes.values())
    ffn = {name for layer in range(layers) for name in (arch.block_prefix(layer) + weight.name for weight in arch.weights)} & set(shapes)
    prefix = arch.block_prefix(0)
    block = sum(prod(shape) for name, shape in shapes.items() if name.startswith(prefix))
    windows = recipe.calibration.windows * recipe.calibration.length
    stats = {stat for parts in configs.values() for part, values in parts.items() for stat in (IMPORTED_NEEDS if part == IMPORTED else needs(part, values))}
    samples = sum(layers * min(CAP, windows) * (hidden + units) * _FP16 for stat in stats if stat.startswith("samples"))
    tied = arch.embedding in shapes and not any(name.startswith("lm_head") for name in shapes)
    whole = (parameters + (prod(shapes[arch.embedding]) if tied else 0)) * _FP32
    sizes = {name: _onnx_bytes(arch, shapes, ffn, tied, form, recipe.export.target) for name, form in PRECISIONS.items()}
    disk = samples + source_bytes + whole + sizes[recipe.export.precision] * (2 if PRECISIONS[recipe.export.precision].bits else 1)
    disk += whole // 2 if recipe.export.target == "cuda" else sizes["int8"]  # the graph in fp16; a dense reference, until it is measured
    batch = 2048 * (hidden * 4 + units * 5) * _FP32
    form = PRECISIONS[recipe.export.precision]
    unknown = {IMPORTED, EXACT}
    costs = {name: _expected_cost(arch, parts, hidden, units, form) for name, parts in configs.items() if parts and not unknown & set(parts)}
    calibrate = _RUNTIME + 2 * block * _FP32 + 2 * windows * hidden * _FP32 + batch
    return Estimate(
        parameters=parameters,
        ffn_share=sum(prod(shapes[name]) for name in ffn) / parameters,
        source_bytes=source_bytes,
        disk_bytes=disk,
        peak_calibrate=max([calibrate, *(_RUNTIME + _training_bytes(stage.tune, parameters, shapes, arch) for stage in training_stages(recipe))]),
        peak_export=_RUNTIME + 2 * whole,
        onnx_bytes=sizes,
        expected_cost={} if recipe.searches else costs,
    )


def _training_bytes(asked: Recovery | None, parameters: int, shapes: Mapping[str, tuple[int, ...]], arch: Arch) -> int:
    """Bytes of a training stage on a CPU, all in fp32: teacher and student, gradient and two moments of what is trained, in each of its processes, and a
    batch's logits three times.
    """
    assert asked is not None
    trained = parameters if asked.lora is None else sum(asked.lora.rank * sum(shape) for name, shape in shapes.items() if len(shape) == 2)
    logits = 3 * asked.windows * asked.data.length * shapes[arch.embedding][0]
    processes = count_for(asked, parameters, cores())
    return _FP32 * (processes * (2 * parameters + 3 * trained) + logits) + (processes if processes > 1 else 0) * _RUNTIME  # the caller has its own


def _onnx_bytes(arch: Arch, shapes: Mapping[str, tuple[int, ...]], ffn: set[str], tied: bool, form: Precision, target: str) -> int:
    """Bytes of an ONNX model's weights: gated ones in the op's format, other matrices in MatMulNBits' blocks or floats, and the embedding, which a tied model
    keeps once in floats and with 4 bits, and besides the output with 8.
    """
    plain = _FP32 if target == "cpu" or form.cuda == "fp32" else _FP16
    gated = {"int8_row": 1.0, "int4_g32": 0.5 + _FP16 / BLOCK}.get(form.weights, _FP32 if form.w == "float32" else _FP16)
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
    return estimate_shapes(source.arch, source.config, shapes, sum(info.bytes for info in source.tensors.values()), recipe, configs)


def _expected_cost(arch: Arch, parts: Mapping[str, Any], hidden: int, units: int, form: Precision) -> float:
    """Bytes of the feed-forward networks touched per token relative to dense ones in the same precision: of the part that gates neurons, where there is one."""
    name, config = next(((name, config) for name, config in parts.items() if name in NEURON_METHODS), next(iter(parts.items())))
    matrices, density = 2 if arch.ffn.kind == "plain" else 3, 1 - config.sparsity
    heads = getattr(config, "residual", "none") != "none"
    share = form.predictor_share(heads)
    if isinstance(config, PredictorConfig):
        rank = config.rank or rank_for(hidden, units, matrices, config.cost)
        return density + share * rank * (hidden + units + heads * hidden) / (matrices * hidden * units)
    own = share * heads * 2 * residual_rank(units, matrices) / (matrices * units)
    return own + cost(Threshold("gate" if name in NEURON_METHODS else "input", uniform_tau(0.0, 1), density), hidden, units, matrices, density)


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
        given = [name for name, value in flags.items() if value is not None and name != "MODEL"]
        if given:
            raise InputError(f"--recipe must stand without the flags that it covers, got {', '.join(given)} as well. Put them into the recipe.")
        return read_recipe(named_recipe(recipe), None if model is None else str(model), BUNDLED_MODEL)
    if sparsity is not None and not 0 < sparsity < 1:
        raise InputError(f"sparsity must lie strictly between 0 and 1, got {sparsity}. Use 0.5 to skip half of the gated neurons.")
    parts = parts_of(method or "auto")
    searches = sparsity is None and (max_ppl_increase is not None or max_kl is not None)
    fixed = {IMPORTED: "the predictors' thresholds decide", EXACT: "the activation's zeros decide"}.get(parts[0])
    config = {} if searches or fixed else {"sparsity": 0.5 if sparsity is None else sparsity}
    if fixed and sparsity is not None:
        raise InputError(f"sparsity must stand without method {method}, got {sparsity}: {fixed}. Leave it out or give a budget.")
    values = {
        "model": str(model) if model else BUNDLED_MODEL,
        "calibration": {"generated": True} if str(calibration) == SELF else {"file": str(calibration) if calibration else None},
        "seed": seed or 0,
        "stages": [{"method": method or "auto", "config": config}],
        "budget": {"max_ppl_increase": max_ppl_increase, "max_kl": max_kl},
        "export": _export(precision, target),
    }
    return make_recipe(values, "convert")


def named_recipe(recipe: str | Path) -> Path:
    """The file of a recipe: one that comes with sparsegate, by its name, or a path."""
    own = RECIPES / f"{recipe}.yaml"
    return own if own.is_file() and not Path(recipe).is_file() else Path(recipe)


def training_stages(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages that train weights, in order, before anything is planned. Raises InputError for a recipe of another order."""
    *before, last = recipe.stages
    for stage in before:
        if stage.tune is None:
            raise InputError(f"Every stage but the last must train, got {stage.method} without tune. Give it tune, or leave the stage out.")
        if stage.tune.predictors is not None:
            raise InputError("A stage that trains predictors must be the last one, got another after it. Leave the predictors or the last stage out.")
    found = tuple(stage for stage in recipe.stages if stage.tune is not None)
    for number, stage in enumerate(found):
        allowed = {"activation"} if number == 0 else set()
        if stage.method != EXACT or set(stage.config) - allowed:
            what = "with at most an activation" if allowed else "without a configuration after the first"
            raise InputError(f"A stage that trains must have method {EXACT} {what}, got {stage.method} with {sorted(stage.config)}. Mend it.")
    return found


def _export(precision: str | None, target: str | None) -> dict[str, str]:
    """The export part: in fp32 for the CPU and in fp16 for CUDA where nothing else is asked for."""
    for name, value, known in (("precision", precision, tuple(PRECISIONS)), ("target", target, ("cpu", "cuda"))):
        if value is not None and value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}. Choose one of these.")
    if (precision, target) == ("fp32", "cuda"):
        raise InputError("precision must be fp16, bf16, int8 or int4 for the target cuda, got fp32. Choose one of these, or leave it out for fp16.")
    return {"precision": precision or ("fp16" if target == "cuda" else "fp32"), "target": target or "cpu"}


def parts_of(method: str) -> list[str]:
    """The methods that a name joins by `+`: one that gates neurons and one that skips input channels. Raises InputError for others."""
    parts = method.split("+")
    if len(parts) == 1:
        if method not in ("auto", IMPORTED):
            load_method(method)
    elif len(parts) > 2 or not any(part in NEURON_METHODS for part in parts) or not any(part in LINEAR_METHODS for part in parts):
        neurons, linears = ", ".join(NEURON_METHODS), ", ".join(LINEAR_METHODS)
        raise InputError(f"A joined method must be one of {neurons} and one of {linears}, got {method!r}. Name one of each, as in chess+teal.")
    return parts


def method_configs(recipe: Recipe, exact: bool = False) -> Configs:
    """The methods to try and their parts' configurations; `auto` is every one of AUTO, and the method exact for a model with `exact` zeros. A part takes the
    fields that it knows, and the recipe's seed. A recipe whose last stage trains has the plan TUNED, without parts.

    Raises InputError for an unknown method, for a field that no part knows, and when `training_stages` does.
    """
    training_stages(recipe)
    stage = recipe.stages[-1]
    if stage.tune is not None:
        return {TUNED: {}}
    names = (*AUTO[recipe.searches], *((EXACT,) if exact else ())) if stage.method == "auto" else (stage.method,)
    names = _kept(names, stage.steps)
    fields = {part: _config_class(part).model_fields for name in names for part in parts_of(name)}
    known = {key for own in fields.values() for key in own}
    unknown = sorted(set(stage.config) - known)
    if unknown:
        raise InputError(f"The configuration of {stage.method} must hold only {', '.join(sorted(known))}, got {', '.join(unknown)}. Mend the recipe.")
    found: dict[str, dict[str, BaseModel]] = {}
    for name in names:
        found[name] = {}
        for part in parts_of(name):
            values = {key: value for key, value in {"seed": recipe.seed, **stage.config}.items() if key in fields[part]}
            if part in LINEAR_METHODS and part != name:
                values["linears"] = _outside_networks(name, values.get("linears"))
            made = validated(ImportedConfig, values, part) if part == IMPORTED else make_config(part, values)
            found[name][part] = _with_steps(made, stage.steps.get(name))
        if recipe.searches and len(found[name]) > 1:
            _check_joined_search(name, found[name])
    return found


def _kept(names: tuple[str, ...], steps: Mapping[str, int]) -> tuple[str, ...]:
    """The methods without those that are left out with 0 steps. Raises InputError for steps of a method that is not among them, and when none is left."""
    unknown, kept = sorted(set(steps) - set(names)), tuple(name for name in names if steps.get(name) != 0)
    if unknown or not kept:
        raise InputError(f"steps must name some of the methods {', '.join(names)} and leave one, got {', '.join(unknown) or 'none left'}. Mend the recipe.")
    return kept


def _with_steps(config: BaseModel, steps: int | None) -> BaseModel:
    """The configuration with other steps of its training end to end, where it has one."""
    if steps is None or not isinstance(config, PredictorConfig | GateConfig):
        return config
    return config.model_copy(update={"tune": config.tune.model_copy(update={"steps": steps})})


def _outside_networks(name: str, linears: Any) -> Any:
    """The linears that are left where another method gates the networks: the asked share holds for them alone."""
    inside = sorted(set(linears or ()) & set(FFN_LINEARS))
    if inside:
        raise InputError(f"linears must lie outside the networks that {name} gates, got {', '.join(inside)}. Leave them out.")
    return linears or [linear for linear in LINEARS if linear not in FFN_LINEARS]


def _check_joined_search(name: str, parts: Mapping[str, BaseModel]) -> None:
    trained = [part for part, config in parts.items() if getattr(load_method(part), "start", lambda _: None)(config) is not None]
    if trained:
        raise InputError(f"A budget must be searched with a method trained end to end alone, got {name}. Set a sparsity, or take {trained[0]} or chess+teal.")


def has_zeros(source: Source) -> bool:
    """Whether the networks of a model have exact zeros: by their own activation, or by one that it was given."""
    return bool(source.swaps) or is_relu(source.arch.activation(source.config))


def training_windows(configs: Configs) -> int:
    """The most windows that any of the methods trains on."""
    return max((values.tune.data for parts in configs.values() for values in parts.values() if isinstance(values, PredictorConfig | GateConfig)), default=0)


def _config_class(part: str) -> type[BaseModel]:
    return ImportedConfig if part == IMPORTED else load_method(part).Config

"""Seconds of every stage of a conversion, from what a probe measured of the machine, the model's sizes and the recipe.
Nothing here is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..arch import Arch
from ..bundled import CALIBRATION_TEXT, HELDOUT_TEXT
from ..checkpoint.plan import LINEARS
from ..evaluation.checks import DENSE_WINDOWS
from ..evaluation.quality import ERROR, GROUP_TOKENS, LEAST_WINDOWS, MOST_TOKENS
from ..methods import IMPORTED, LINEAR_METHODS, METHODS, TUNED, Method, load_method, needs
from ..methods.tune import Tune
from ..sources.predictors import NEEDS as IMPORTED_NEEDS
from ..training.residual import WINDOWS as RESIDUAL_WINDOWS
from .allocation import EVALUATIONS, GRID
from .configs import ON_ROTATED, Configs, made_later
from .probe import Rates
from .recipe import Recipe, training_stages
from .rotate import WINDOWS as ROTATION_WINDOWS
from .sensitivities import DRAWS
from .sensitivities import WINDOWS as SENSITIVITY_WINDOWS
from .shares import EVOLUTION_WINDOWS
from .texts import HELDOUT_SHARE, HELDOUT_WINDOWS, LONG, LONG_SEARCH_WINDOWS, SEARCH_SHARE, SEARCH_WINDOWS

_OTHER = Method("", "neuron")
"""What is expected of methods without a row. The figures of those with one, `lost` and `variance`, are from
SmolLM2-135M, where .3 to .7 of the neurons skipped lose gates .085 a layer, CHESS .04, CETT .12, channels .06
(predictors .14 at .5), and from the bundled model, where half of them lose .037, .028 and .09: they are between the
two. The variance is .016 to .03 of what is lost, under predictors .022 and .039.
"""
_START = 3.0  # seconds until torch and transformers are imported and a model's files are checked
_BUILDER = 0.5  # seconds of the builder and of what it imports, beside what grows with the graph
_CALL = 6e-5  # seconds a layer of one call of ONNX Runtime beside its products
_TORCH_CALL = 2e-3  # the same of torch's, in which a token attends to those before
_OPENED = 2.0  # seconds of the sessions that are compared, made and watched
_PLOTS = 4.0  # seconds of plots and pages
_TEXT = 1.5e-6  # seconds a character to tokens
_CHARACTERS = 4  # a token
_PASSES_ASIDE, _ASIDE = 8, 32  # passes that find the density of a trained plan, over windows
_NOISE_WINDOWS, _NOISE_PASSES = 4, 6  # a pass for the inputs' sizes, one for the noise and a backward pass a draw
_LEVELS = 4  # densities that a search trains through until its budget breaks
_SEARCH_PASSES = 6.0  # over all windows, the rough ones counted as shares
_LONG_PASSES = 14.0  # over the long windows, which the rough ones see too
_PAIRED_TOKENS, _WATCHED_TOKENS = 32 * 128, 3 * 128  # of the comparison of executors
_ANSWERS, _ANSWER = 4, 32  # greedy texts and their tokens: one by one in onnxruntime-genai, together in torch
_SPEED = (26, 128, 64)  # runs of a candidate beside dense, tokens of the prompt and new ones
_REFERENCE = (8, 64, 32, 16)  # the same of a dense reference, and its windows
_NARROW = {"int8": 0.4, "int4": 0.3}  # time of a decoded token relative to floats
_SPREAD_OUT = 1.15  # a step through many layers beside one layer's alone, whose activations stay in cache
_DOUBLE = 2.0  # of a product in float64, relative to float32
_PASS = 3.0  # of a float64 evaluation in numpy, relative to torch's float32
_SOFTMAX = 0.5  # of a side of a comparison: without the product


@dataclass(frozen=True)
class Sizes:
    """A model and its text in numbers: parameters in all and of the blocks' own, bytes of its files and of its float32
    graph; windows of `length` tokens to calibrate on, in `characters` of text; `positions` that the model has.
    """

    layers: int
    hidden: int
    units: int
    vocabulary: int
    parameters: int
    source_bytes: int
    graph_bytes: int
    windows: int
    length: int
    characters: int
    positions: int = LONG["length"]

    @property
    def long(self) -> int:
        """Tokens of a long window, at most."""
        return min(self.positions, LONG["length"])

    @property
    def tokens(self) -> int:
        """Tokens to calibrate on."""
        return self.windows * self.length


@dataclass(frozen=True)
class TrainingTime:
    """What a method's training end to end takes: `steps` as configured, seconds by one of them, all its densities
    together, and seconds beside the steps.
    """

    steps: int
    step: float
    rest: float

    def seconds(self, steps: int) -> float:
        """Seconds with so many steps; 0 steps are no training."""
        return self.rest + steps * self.step if steps else 0.0


@dataclass(frozen=True)
class Timing:
    """Seconds by stage without what is trained, `each` a method's own share of them, the trainings by method, and what
    is made `later`, after a candidate was found the best.
    """

    stages: Mapping[str, float]
    each: Mapping[str, Mapping[str, float]]
    trainings: Mapping[str, TrainingTime]
    later: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def seconds(self, steps: Mapping[str, int], best: str | None = None) -> dict[str, float]:
        """Seconds by stage, in order, with so many steps by trained method, where `best` is the best candidate, else
        where the one is after which the most is made. A method with 0 steps is left out.
        """
        if best is None and self.later:
            return max((self.seconds(steps, name) for name in self.later), key=lambda found: sum(found.values()))
        every_later = {name for names in self.later.values() for name in names}
        first = dict(self.stages)
        for name in dict.fromkeys((*self.each, *self.trainings)):
            if name not in every_later:
                self._add(first, name, steps)
        after: dict[str, float] = {}
        for name in self.later.get(best or "", ()):
            self._add(after, name, steps)
        ordered = sorted(first, key=_place)
        middle = ordered.index("quality") + 1 if after else len(ordered)
        names = dict.fromkeys((*ordered[:middle], *after, *ordered[middle:]))
        return {stage: first.get(stage, 0.0) + after.get(stage, 0.0) for stage in names}

    def longest(self, name: str, steps: Mapping[str, int]) -> float:
        """Seconds in all where a trained method is made: of candidates whose trained form it is, the longest."""
        bests = [best for best, names in self.later.items() if name in names] or [None]
        return max(sum(self.seconds(steps, best).values()) for best in bests)

    def _add(self, totals: dict[str, float], name: str, steps: Mapping[str, int]) -> None:
        """Add a method's own seconds and those of its training."""
        training = self.trainings.get(name)
        count = steps.get(name, 1 if training is None else training.steps)
        if training is not None and count:
            totals[f"train {name}"] = training.seconds(count)
        for stage, value in self.each.get(name, {}).items():
            if count:
                totals[stage] = totals.get(stage, 0.0) + value


_ORDER = (
    "open",
    "text",
    "rotate",
    "base graph",
    "calibrate",
    "train",
    "plan",
    "search",
    "quality",
    "export",
    "agreement",
    "speed",
    "dense references",
    "report",
)


def _place(stage: str) -> int:
    return next(k for k, name in enumerate(_ORDER) if stage == name or stage.startswith(f"{name} "))


def sizes(arch: Arch, config: Any, shapes: Mapping[str, tuple[int, ...]], source_bytes: int, recipe: Recipe) -> Sizes:
    """The sizes of a model by its tensors' shapes, and of a recipe's text."""
    layers, hidden, units = (arch.size(config, space) for space in ("layers", "hidden", "units"))
    parameters = sum(math.prod(shape) for shape in shapes.values())
    vocabulary = shapes[arch.embedding][0]
    tied = not any(name.startswith("lm_head") for name in shapes)
    file = Path(recipe.calibration.file) if recipe.calibration.file else CALIBRATION_TEXT
    characters = file.stat().st_size if file.is_file() else 0
    length = min(recipe.calibration.length, int(getattr(config, "max_position_embeddings", recipe.calibration.length)))
    windows = (
        recipe.calibration.windows
        if recipe.calibration.generated
        else max(2, min(recipe.calibration.windows, characters // (3 * length)))
    )
    graph = 4 * (parameters + (vocabulary * hidden if tied else 0))
    positions = int(getattr(config, "max_position_embeddings", None) or LONG["length"])
    text = (windows, length, characters, positions)
    return Sizes(layers, hidden, units, vocabulary, parameters, source_bytes, graph, *text)


def tunes(configs: Configs) -> dict[str, Tune]:
    """The training end to end of every part that has one."""
    trained = {}
    for parts in configs.values():
        for part, values in parts.items():
            if part != IMPORTED and getattr(load_method(part), "start", lambda _: None)(values) is not None:
                trained[part] = values.tune  # type: ignore[attr-defined]
    return trained


def statistics(configs: Configs) -> list[str]:
    """Statistics that one forward gives, without stored activations."""
    parts = [(part, values) for method_parts in configs.values() for part, values in method_parts.items()]
    names = {stat for part, values in parts for stat in (IMPORTED_NEEDS if part == IMPORTED else needs(part, values))}
    return sorted(name for name in names if not name.startswith("samples"))


def timing(size: Sizes, rates: Rates, recipe: Recipe, configs: Configs, arch: Arch) -> Timing:
    """Seconds of every stage with `rates`, without the download of a Hub model."""
    later = made_later(recipe, configs, arch)
    every_later = {name for names in later.values() for name in names}
    first = {name: parts for name, parts in configs.items() if name not in every_later}
    measured = _windows(size, recipe, first) * size.length
    stages = _always(size, rates, recipe, measured, bool(statistics(configs)))
    each = {name: _each(name, parts, size, rates, recipe) for name, parts in configs.items()}
    again = _dense_pass(size, rates, measured)
    for name in every_later:
        own = dict(each[name.removesuffix(ON_ROTATED)])
        quality = own.pop("quality") + again
        if name in configs:
            each[name] = own | {"quality trained": quality}
        else:
            begun = {"rotate": _rotation(size, rates), "calibrate rotated": stages.get("calibrate", 0.0)}
            searched = own[f"search {name.removesuffix(ON_ROTATED)}"]
            each[name] = begun | {"plan": own["plan"], f"search {name}": searched, "quality rotated": quality}
    trainings = {}
    for name, parts in configs.items():
        for part, values in parts.items():
            if part in rates.train and part in tunes({name: parts}):
                trainings[name] = _training(part, values, size, rates, recipe)
    return Timing(stages, each, trainings, later)


def _dense_pass(size: Sizes, rates: Rates, measured: float) -> float:
    """Seconds of the dense side of a measurement on so many tokens: the models are opened, and one of them runs."""
    return 2 * size.graph_bytes * rates.hash + measured * (size.layers * rates.forward + rates.head)


def _always(size: Sizes, rates: Rates, recipe: Recipe, measured: float, calibrates: bool) -> dict[str, float]:
    """Seconds of the stages that every conversion has, whatever its methods; losses are those of `measured` tokens."""
    forward, precision = size.layers * rates.forward, recipe.export.precision
    narrow, side = _NARROW.get(precision, 1.0), _SOFTMAX * rates.head
    prefill = size.layers * rates.prefill + rates.onnx_head
    decode = size.layers * (rates.decode + _CALL) + rates.onnx_head_alone
    read = size.graph_bytes * rates.hash  # a graph or a model opened: about as fast as its bytes are hashed
    answers = _ANSWERS * _ANSWER * decode + _ANSWER * (decode + size.layers * _TORCH_CALL)
    runs, prompt, new = _SPEED
    stages = {
        "open": _START + size.source_bytes * rates.hash,
        "text": size.characters * _TEXT,
        "base graph": _BUILDER + size.graph_bytes * (2 * rates.write + 3 * rates.hash) + answers,
        "plan": 0.0,
        "quality": _dense_pass(size, rates, measured),
        "export": size.graph_bytes * (rates.write + rates.hash) + size.source_bytes * rates.write,
        "agreement": _OPENED
        + _PAIRED_TOKENS * (2 * forward + 2 * rates.head + side + prefill)
        + _WATCHED_TOKENS * _PASS * (forward + rates.head)
        + answers
        + 6 * read,
        "speed": 4 * read + 2 * runs * (prompt * prefill + narrow * new * decode),
        "dense references": _references(size, rates, precision, forward, prefill, decode)
        if recipe.export.target == "cpu"
        else 0.0,
        "report": _PLOTS + read,
    }
    if narrow < 1:
        stages["base graph"] += 4 * read
        dense_windows = (
            _text_windows(size, recipe) if recipe.budget.bounded else min(DENSE_WINDOWS, _text_windows(size, recipe))
        )
        for stage, tokens in (("quality", dense_windows * size.length), ("agreement", measured)):
            stages[stage] += tokens * (forward + rates.head + side + prefill)
    if recipe.budget.max_kl_long is not None:
        stages["quality"] += LONG["windows"] * size.long * (forward + rates.head)
    if recipe.calibration.generated:
        stages["text"] += size.tokens * (size.layers * rates.decode + rates.head)
    if calibrates:
        stages["calibrate"] = size.tokens * size.layers * rates.calibrate + size.layers * rates.store
    if recipe.rotate:
        stages["rotate"] = _rotation(size, rates)
    for stage, seconds in _recovery(size, rates, recipe).items():
        stages[stage] = stages.get(stage, 0.0) + seconds
    return stages


def _rotation(size: Sizes, rates: Rates) -> float:
    """Seconds of a rotation: a pass over its windows, its products in float64, and files that are read and written. A
    product of a weight with the rotation is one with so many tokens as the stream is wide.
    """
    tokens = min(ROTATION_WINDOWS, size.windows) * size.length
    products = _DOUBLE * size.hidden * (size.layers * rates.forward + 2 * rates.head)
    return tokens * size.layers * rates.forward + products + size.source_bytes * (rates.write + 3 * rates.hash)


def _windows(size: Sizes, recipe: Recipe, configs: Configs) -> int:
    """Windows that tell every method's loss: those that bring its standard error below ERROR, whole groups of them,
    within what the text has.
    """
    spread = [
        _spread(part, getattr(values, "sparsity", 0.5)) * size.layers
        for parts in configs.values()
        for part, values in parts.items()
    ]
    wanted = HELDOUT_WINDOWS if recipe.searches else max(spread, default=0.0) / ERROR**2
    group = max(1, GROUP_TOKENS // size.length)
    return int(
        min(
            math.ceil(max(LEAST_WINDOWS, wanted) / group) * group,
            MOST_TOKENS / size.length,
            _text_windows(size, recipe),
        )
    )


def _spread(part: str, share: float) -> float:
    """The variance over windows and a layer of what is lost where so large a share is skipped."""
    method = METHODS.get(part, _OTHER)
    return method.variance * method.lost * share**3


def _text_windows(size: Sizes, recipe: Recipe) -> int:
    """Windows that the held-out text has, at most those that are taken."""
    text = HELDOUT_SHARE * size.characters if recipe.calibration.file else HELDOUT_TEXT.stat().st_size
    return max(1, min(HELDOUT_WINDOWS, int(text / (_CHARACTERS * size.length))))


def _references(size: Sizes, rates: Rates, precision: str, forward: float, prefill: float, decode: float) -> float:
    """Seconds of the dense graphs in integers, which are made, measured and timed beside the one in float32."""
    runs, prompt, new, windows = _REFERENCE
    total = _OPENED
    for name, narrow in _NARROW.items():
        total += runs * (2 * prompt * prefill + (1 + narrow) * new * decode)
        if name != precision:
            total += size.graph_bytes * (rates.write + 6 * rates.hash) + windows * size.length * (
                forward + (1 + _SOFTMAX) * rates.head + prefill
            )
    return total


def _each(name: str, parts: Mapping[str, BaseModel], size: Sizes, rates: Rates, recipe: Recipe) -> dict[str, float]:
    """A method's own seconds beside its training: the plan, a search, and its pass over the measured text."""
    window = size.length * (size.layers * rates.forward + rates.head)
    long = 0.0 if recipe.budget.max_kl_long is None else size.long * (size.layers * rates.forward + 2 * rates.head)
    seconds = {"plan": 0.0, "quality": _windows(size, recipe, {name: parts}) * window + LONG["windows"] * long}
    for part, values in parts.items():
        if getattr(values, "residual", "none") != "none":
            seconds["plan"] += RESIDUAL_WINDOWS * size.length * 4 * size.layers * rates.forward
        module = load_method(part) if part != IMPORTED else None
        if module is not None and hasattr(module, "plan_tokens"):
            rank = module.rank(values, size.hidden, size.units, 3)
            share = rank * (size.hidden + size.units) / (3 * size.hidden * size.units + 4 * size.hidden**2)
            seconds["plan"] += 3 * module.plan_tokens(values) * size.layers * rates.forward * share
        if part in LINEAR_METHODS:
            seconds["plan"] += 0.05 * size.layers
    if recipe.searches and name != TUNED:
        windows = min(SEARCH_WINDOWS, int(SEARCH_SHARE * max(size.windows, size.characters // (4 * size.length))))
        seconds[f"search {name}"] = (_SEARCH_PASSES + 1) * windows * window + _allocation(parts, window)
        seconds[f"search {name}"] += (_LONG_PASSES + 1) * LONG_SEARCH_WINDOWS * long
    else:
        seconds["plan"] += _allocation(parts, window)
    return seconds


def _allocation(parts: Mapping[str, BaseModel], window: float) -> float:
    """Seconds of the sensitivities and of an evolution, with those of a window's pass."""
    allocations = {part: getattr(values, "allocation", "uniform") for part, values in parts.items()}
    keys = sum(
        len(getattr(values, "linears", None) or LINEARS) if part in LINEAR_METHODS else 1
        for part, values in parts.items()
        if allocations[part] != "uniform"
    )
    if not keys:
        return 0.0
    passes = SENSITIVITY_WINDOWS * (1 + DRAWS + keys * len(GRID))
    return window * (passes + ("evolution" in allocations.values()) * EVOLUTION_WINDOWS * EVALUATIONS)


def _training(part: str, values: Any, size: Sizes, rates: Rates, recipe: Recipe) -> TrainingTime:
    tune: Tune = values.tune
    begins = getattr(load_method(part), "start", lambda _: None)(values)
    once = (
        not recipe.searches and begins is not None and begins < 1
    )  # what is skipped from the start has its residual from there
    again = getattr(values, "residual", "none") == "trained" and not once
    runs = (_LEVELS if recipe.searches else 1) + again * (2 if recipe.searches else 1)
    step = _SPREAD_OUT * tune.windows * size.length * (size.layers * rates.train[part] + rates.train_head)
    window = size.length * size.layers * rates.forward
    noise = _NOISE_PASSES * _NOISE_WINDOWS * (window + size.length * rates.head)
    return TrainingTime(tune.steps, runs * step, runs * (noise + _PASSES_ASIDE * _ASIDE * window))


def _recovery(size: Sizes, rates: Rates, recipe: Recipe) -> dict[str, float]:
    """Seconds of the stages that train weights: a teacher's and a student's pass, the gradients of inputs and weights,
    and the text that the source writes.
    """
    seconds_by_stage: dict[str, float] = {}
    stages = training_stages(recipe)
    for number, stage in enumerate(stages):
        recovery = stage.tune
        assert recovery is not None
        tokens = recovery.steps * recovery.accumulate * recovery.windows * recovery.data.length * recovery.end_to_end
        seconds = tokens * (4 * size.layers * rates.forward + 4 * rates.head)
        if recovery.by_block is not None:
            seconds += 3 * recovery.by_block.steps * recovery.by_block.tokens * size.layers * rates.forward
        seconds_by_stage[f"train {number + 1}" if len(stages) > 1 else "train"] = seconds
        if not number and not recovery.data.mixture:
            seconds_by_stage["text"] = (
                recovery.data.windows * recovery.data.length * (size.layers * rates.forward + rates.head) * 4
            )
    return seconds_by_stage


def whole(seconds: Iterable[float]) -> str:
    """A time in words: seconds below 100, minutes above, hours above 100 minutes."""
    total = sum(seconds)
    if total < 100:
        return f"{total:.0f} seconds"
    minutes = round(total / 60)
    return f"{minutes} minutes" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"

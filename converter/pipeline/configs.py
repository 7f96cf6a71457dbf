"""The configuration of every method that a recipe names, and the texts that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.ops.activation import is_relu
from ..arch import Arch
from ..checkpoint.fields import validated
from ..checkpoint.plan import FFN_LINEARS, LINEARS
from ..checkpoint.source import Source
from ..methods import (
    CANDIDATES,
    IMPORTED,
    JOINED,
    LINEAR_METHODS,
    OF_ZEROS,
    TRAINED_FORMS,
    TUNED,
    load_method,
    make_config,
    parts_of,
    trained_form,
    with_trained_forms,
)
from ..methods.tune import tune_of
from ..sources.predictors import Config as ImportedConfig
from .recipe import Recipe, training_stages

Configs = Mapping[str, Mapping[str, BaseModel]]
"""Method -> its parts (one, or those that `+` joins) -> their configurations."""
AUTO = "auto"
"""The name of all methods that a recipe leaves to be tried."""
ON_ROTATED = "-rotated"
"""What follows the name of a method whose plan is made for the rotated model."""


def method_configs(recipe: Recipe, exact: bool = False) -> Configs:
    """The methods to make and their parts' configurations; `auto` is every one of CANDIDATES, of OF_ZEROS for a model
    with `exact` zeros, and their trained forms, of which it makes one. A part takes the fields that it knows, and the
    recipe's seed; where a budget is searched, the allocation is greedy unless it is said. A recipe whose last stage
    trains has the plan TUNED, without parts.

    Raises InputError for an unknown method, for a field that no part knows, and when `training_stages` does.
    """
    training_stages(recipe)
    stage = recipe.stages[-1]
    if stage.tune is not None:
        return {TUNED: {}}
    every = with_trained_forms((*CANDIDATES[recipe.searches], *OF_ZEROS)) if stage.method == AUTO else (stage.method,)
    names = _kept(every, recipe, exact)
    known_methods = (name for name in every if name in names or name not in OF_ZEROS)
    fields = {part: _config_class(part).model_fields for name in known_methods for part in parts_of(name)}
    known = {key for part_fields in fields.values() for key in part_fields}
    unknown = sorted(set(stage.config) - known)
    if unknown:
        raise InputError(
            f"The configuration of {stage.method} must hold only {', '.join(sorted(known))}, got {', '.join(unknown)}. "
            "Mend the recipe."
        )
    configs: dict[str, dict[str, BaseModel]] = {}
    for name in names:
        configs[name] = {}
        for part in parts_of(name):
            defaults = {"seed": recipe.seed} | ({"allocation": "greedy"} if recipe.searches else {})
            values = {key: value for key, value in {**defaults, **stage.config}.items() if key in fields[part]}
            if part in LINEAR_METHODS and part != name:
                values["linears"] = _outside_networks(name, values.get("linears"))
            made = validated(ImportedConfig, values, part) if part == IMPORTED else make_config(part, values)
            configs[name][part] = _with_steps(made, stage.steps.get(name))
        if recipe.searches and len(configs[name]) > 1:
            _check_joined_search(name, configs[name])
    return configs


def _kept(every: tuple[str, ...], recipe: Recipe, exact: bool) -> tuple[str, ...]:
    """Of `every` method that a recipe may make, those for this model and not left out with 0 steps. Raises InputError
    for steps of a method that is not among them, and when none is left.

    Where no budget is searched the least divergence wins, so what only drops zeros needs no trained form, unless a
    training before it changed what is compared.
    """
    stage = recipe.stages[-1]
    unknown, names = sorted(set(stage.steps) - set(every)), every
    if stage.method == AUTO:
        names = tuple(name for name in every if name not in TRAINED_FORMS and (exact or name not in OF_ZEROS))
    names = tuple(name for name in names if stage.steps.get(name) != 0)
    if unknown or not names:
        raise InputError(
            f"steps must name some of the methods {', '.join(every)} and leave one, got "
            f"{', '.join(unknown) or 'none left'}. Mend the recipe."
        )
    if stage.method != AUTO:
        return names
    loses = bool(recipe.searches or training_stages(recipe))
    forms = with_trained_forms(tuple(name for name in names if loses or name not in OF_ZEROS))
    return (*names, *(name for name in forms if name in TRAINED_FORMS and stage.steps.get(name) != 0))


def rotates(recipe: Recipe, arch: Arch) -> bool:
    """Whether `auto` tries input channels on the rotated model too: under a searched budget, where the architecture
    absorbs a rotation and the recipe does not rotate already.
    """
    auto = recipe.stages[-1].method == AUTO and recipe.stages[-1].tune is None
    return auto and recipe.searches and not recipe.rotate and arch.stream is not None


def made_later(recipe: Recipe, configs: Configs, arch: Arch) -> dict[str, tuple[str, ...]]:
    """By candidate of `auto`: what is made after it was found the best. The same on the rotated model, then its trained
    form, on the better of the two models. Nothing for another method.
    """
    if recipe.stages[-1].method != AUTO:
        return {}
    later = {}
    for name in configs:
        if name not in TRAINED_FORMS:
            form = trained_form(name)
            again = (f"{name}{ON_ROTATED}",) if name in LINEAR_METHODS and rotates(recipe, arch) else ()
            later[name] = again if form is None or form not in configs else (*again, form)
    return later


def _with_steps(config: BaseModel, steps: int | None) -> BaseModel:
    """The configuration with other steps of its training end to end, where it has one."""
    tune = tune_of(config)
    if steps is None or tune is None:
        return config
    return config.model_copy(update={"tune": tune.model_copy(update={"steps": steps})})


def _outside_networks(name: str, linears: Any) -> Any:
    """The linears that are left where another method gates the networks: the asked share holds for them alone."""
    inside = sorted(set(linears or ()) & set(FFN_LINEARS))
    if inside:
        raise InputError(
            f"linears must lie outside the networks that {name} gates, got {', '.join(inside)}. Leave them out."
        )
    return linears or [linear for linear in LINEARS if linear not in FFN_LINEARS]


def _check_joined_search(name: str, parts: Mapping[str, BaseModel]) -> None:
    trained = [
        part
        for part, config in parts.items()
        if getattr(load_method(part), "start", lambda _: None)(config) is not None
    ]
    if trained:
        raise InputError(
            f"A budget must be searched with a method trained end to end alone, got {name}. Set a sparsity, or take "
            f"{trained[0]} or {JOINED[0]}."
        )


def has_zeros(source: Source) -> bool:
    """Whether the networks of a model have exact zeros: by their own activation, or by one that it was given."""
    return bool(source.swaps) or is_relu(source.arch.activation(source.config))


def training_windows(configs: Configs) -> int:
    """The most windows that any of the methods trains on."""
    tunes = [tune_of(values) for parts in configs.values() for values in parts.values()]
    return max((tune.data for tune in tunes if tune is not None), default=0)


def _config_class(part: str) -> type[BaseModel]:
    return ImportedConfig if part == IMPORTED else load_method(part).Config

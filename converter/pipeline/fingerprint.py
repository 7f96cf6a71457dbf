"""What a conversion is made from, as one hash: it says whether OUT is up to date."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.manifest import read_manifest
from ..checkpoint.stage import VERSION, hash_json
from ..sources.hub import head_commit
from ..sources.predictors import Config as ImportedConfig
from ..sources.predictors import fingerprint as imported_files
from ..text.mixture import files_hash
from .configs import Configs
from .recipe import Recipe, training_stages
from .texts import texts_hash

_ABSENT = (("time_budget", None), ("rotate", False))
"""Fields of a recipe that change nothing where they are not said, by their values then."""


def conversion_fingerprint(source: str, recipe: Recipe, configs: Configs) -> str:
    """Of everything that decides the result: the model's files, the recipe, and the texts and predictors that it names
    by path.
    """
    files = [
        imported_files(config)
        for parts in configs.values()
        for config in parts.values()
        if isinstance(config, ImportedConfig)
    ]
    mixtures = [files_hash(stage.tune.data) for stage in training_stages(recipe) if stage.tune is not None]
    texts = {"texts": texts_hash(recipe)} | ({"mixtures": mixtures} if any(mixtures) else {})
    fields = recipe.model_dump(mode="json", exclude={"stages": {"__all__": {"tune": {"processes"}}}})
    fields = {name: value for name, value in fields.items() if (name, value) not in _ABSENT}
    fields["stages"] = [
        {name: value for name, value in stage.items() if (name, value) != ("steps", {})} for stage in fields["stages"]
    ]
    return hash_json({"tool": VERSION, "source": source, "recipe": fields, **texts, "predictors": files})


def fetched_fingerprint(out: Path, recipe: Recipe, configs: Configs) -> str:
    """The fingerprint of converting a Hub model at its present commit, as far as `out` was made from that commit; no
    file is fetched.
    """
    source = read_manifest(out).source
    if source.get("id") != recipe.model or source.get("revision") != head_commit(recipe.model):
        return ""
    return conversion_fingerprint(source.get("fingerprint") or "", recipe, configs)

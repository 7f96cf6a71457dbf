"""The recipes that come with sparsegate: they load, hold the paper's numbers, and their comments tell the same as their
fields.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsegate import converter
from sparsegate.converter.methods import make_config
from sparsegate.converter.pipeline.recipe import Recipe, make_recipe, named_recipe, read_recipe, training_stages
from sparsegate.converter.text.mixture import _LOADERS, counts
from sparsegate.converter.training.settings import Recovery
from sparsegate.runtime_onnx.errors import InputError

FOLDER = Path(converter.__file__).parent / "recipes"
NAMES = ("turbosparse", "turbosparse_paper", "turbosparse_predictors")
SHARES = {
    "WanJuan-CC": 73.55,
    "peS2o": 7.83,
    "RedPajama books": 6.54,
    "Pile arXiv, PubMed and PhilPapers": 2.69,
    "StarCoder rest": 1.73,
    "OpenWebMath": 1.46,
    "GitHub code": 1.41,
    "StarCoder Java": 0.77,
    "Proof-Pile-2": 0.76,
    "StarCoder C#": 0.74,
    "RedPajama Wikipedia": 0.65,
    "AlgebraicStack": 0.54,
    "StarCoder TypeScript": 0.52,
    "OpenWebText2": 0.44,
    "PG-19": 0.37,
}


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def recipe_of(name: str, **changes: Any) -> Recipe:
    return make_recipe(yaml.safe_load(text_of(name)) | {"model": "some/model"} | changes, name)


def training_of(name: str) -> Recovery:
    stage = training_stages(recipe_of(name))[0]
    assert stage.tune is not None and stage.config == {"activation": "drelu"}
    return stage.tune


def comment_numbers(name: str) -> str:
    """The comments without the marks that group digits."""
    return re.sub(
        r"(?<=\d),(?=\d{3})",
        "",
        "\n".join(line for line in text_of(name).splitlines() if line.lstrip().startswith("#")),
    )


def test_all_files_of_the_folder_are_tested() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.yaml" for name in (*NAMES, "rotated")}


def test_the_rotated_recipe_plans_channels_of_the_networks() -> None:
    found = recipe_of("rotated")
    assert found.rotate and training_stages(found) == () and not recipe_of("turbosparse").rotate
    (stage,) = found.stages
    config = make_config(stage.method, dict(stage.config))
    assert config.model_dump()["linears"] == ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("name", NAMES)
def test_recipes_load_by_name_and_leave_the_model_open(name: str) -> None:
    assert named_recipe(name) == FOLDER / f"{name}.yaml"
    found = read_recipe(named_recipe(name), "some/model")
    assert found == recipe_of(name) and found.model == "some/model"
    stages = {"turbosparse": [False, True], "turbosparse_paper": [False, True], "turbosparse_predictors": [False]}
    assert [stage.tune is None for stage in found.stages] == stages[name]
    with pytest.raises(InputError, match="stages"):
        recipe_of(name, stages=[{}] * 4)
    last = found.stages[-1]
    assert set(last.config) <= set(type(make_config(last.method, dict(last.config))).model_fields)
    assert max(map(len, text_of(name).splitlines())) <= 160


def test_the_small_recipe_needs_no_data_and_says_what_it_does() -> None:
    tune, said = training_of("turbosparse"), comment_numbers("turbosparse")
    assert tune.data.mixture == () and tune.losses.distill > 0 and tune.penalty.weight > 0 and tune.parallel == "data"
    step = tune.windows * tune.accumulate * tune.data.length
    assert f"{tune.steps} steps x {tune.windows} x {tune.data.length} = {tune.steps * step / 1e6:.1f} million" in said
    assert (
        re.search(rf"batch +{tune.windows} windows of {tune.data.length} = {step} tokens", said)
        and f"warm-up         {tune.warm_up} steps" in said
    )
    assert (
        f"{tune.data.windows} windows" in said
        and f"{tune.rate:.0e}".replace("e-0", "e-") + ", to nothing along a cosine" in said
    )
    assert (tune.floor, tune.schedule) == (0.0, "cosine")


def test_predictors_are_trained_from_the_first_step_and_the_rest_is_the_same() -> None:
    (stage,) = training_stages(recipe_of("turbosparse_predictors"))
    exact, tune = training_of("turbosparse"), stage.tune
    assert tune is not None and tune.predictors is not None and tune.penalty.density is not None
    other = {"steps": exact.steps, "penalty": exact.penalty, "predictors": None}
    assert tune.model_copy(update=other) == exact and tune.steps <= exact.steps
    assert tune.penalty.density < tune.predictors.density < 0.16


def test_the_paper_s_recipe_has_the_paper_s_numbers() -> None:
    tune = training_of("turbosparse_paper")
    assert {part.name: part.share for part in tune.data.mixture} == SHARES
    assert len(tune.data.mixture) == 15 and math.isclose(
        sum(part.share for part in tune.data.mixture), 100.0, abs_tol=1e-9
    )
    batch = tune.windows * tune.accumulate
    assert (batch, tune.data.length, tune.steps) == (
        2048,
        4096,
        150_000_000_000 // (2048 * 4096),
    ) and tune.data.windows == tune.steps * batch
    assert (tune.rate, tune.rate * tune.floor, tune.warm_up, tune.schedule) == (
        5e-5,
        pytest.approx(5e-6),
        1000,
        "cosine",
    )
    assert (tune.optimizer, tune.betas, tune.precision, tune.parallel) == ("adamw", (0.9, 0.95), "bf16", "fsdp")
    assert (tune.losses.distill, tune.losses.lm, tune.losses.hidden, tune.penalty.weight, tune.penalty.density) == (
        0,
        1,
        0,
        0,
        None,
    )
    said = comment_numbers("turbosparse_paper")
    assert (
        f"{tune.steps} steps of {batch} windows of {tune.data.length} tokens ({batch * tune.data.length / 1e6:.1f} "
        "million a step" in said
    )
    assert (
        f"{tune.data.windows / 1e6:.1f} million windows, {8 * tune.data.windows * tune.data.length / 1e12:.1f} TB"
        in said
    )


def test_the_mixture_can_be_read_as_it_is_written() -> None:
    parts = training_of("turbosparse_paper").data.mixture
    for part in parts:
        if part.subset is not None and "/" in part.subset:
            assert any(suffix in _LOADERS for suffix in Path(part.subset).suffixes), part
    assert [part.name for part in parts if part.files] == ["RedPajama books"]
    drawn = counts([part.share for part in parts], training_of("turbosparse_paper").data.windows)
    assert all(
        abs(count / sum(drawn) - SHARES[part.name] / 100) < 1e-7 for part, count in zip(parts, drawn, strict=True)
    )

"""tune: the training stages of a recipe, from a model to a recovered checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ...runtime_onnx.errors import InputError
from .. import progress
from ..bundled import BUNDLED_MODEL, BUNDLED_NAME
from ..checkpoint.fields import make_part
from ..checkpoint.stage import atomic_folder, write_json
from ..checkpoint.work_folder import check_out, claimed, remove, work_of
from ..checkpoint.writer import write_checkpoint
from ..evaluation.recovery_record import RECOVERY
from ..modeling.distributed import processes, same_error, world
from ..sources.hub import is_hub_id
from ..sources.named import resolve
from ..training.inputs import Heldout
from ..training.settings import Recovery, Stage
from ..training.stage import EVALUATED, Tuned
from ..training.stages import train_stages, training_inputs
from .recipe import MOST_SEED, SELF, named_recipe, read_recipe, training_stages
from .texts import heldout_name, make_heldout

DEFAULT = "turbosparse"
"""The recipe of `tune` where none is named."""


@progress.job()
def tune(
    model: str | None = None,
    output: str | Path | None = None,
    activation: str | None = None,
    recipe: str | Path | None = None,
    data: Sequence[str | Path] | None = None,
    steps: int | None = None,
    density: float | None = None,
    lora: int | None = None,
    seed: int | None = None,
    device: str = "cpu",
) -> Tuned:
    """Write OUT, the recovered checkpoint of a dense model, with its record in report/recovery.json; `model` None is
    the one that comes with sparsegate.

    `recipe` is a file or the name of one that comes along, of which the training stages are run; the other arguments
    replace parts of them. Under torchrun all processes call this. Raises InputError for every user's mistake; OUT then
    does not appear, and the same call goes on with an interrupted training.
    """
    parsed = read_recipe(named_recipe(recipe or DEFAULT), None if model is None else str(model), BUNDLED_MODEL)
    if seed is not None and not 0 <= seed <= MOST_SEED:
        raise InputError(f"seed must be from 0 to {MOST_SEED}, got {seed}. Choose another number.")
    stages = training_stages(parsed)
    if not stages:
        raise InputError(f"The recipe must have a stage with tune, got none in {recipe}. Add it, or take {DEFAULT}.")
    stages = tuple(_changed(stage, data, steps, density, lora) for stage in stages)
    if activation:
        stages = (stages[0].model_copy(update={"config": {"activation": activation}}), *stages[1:])
    out = (
        Path(output)
        if output
        else Path(f"{BUNDLED_NAME if parsed.model == BUNDLED_MODEL else Path(parsed.model).absolute().name}-tuned")
    )
    check_out(out)
    if out.exists():
        raise InputError(f"OUT must be a new folder, got {out}, which exists. Choose another -o, or remove the folder.")
    work = work_of(out)
    inputs = [] if parsed.model == BUNDLED_MODEL or is_hub_id(parsed.model) else [("MODEL", Path(parsed.model))]
    inputs += [("The recipe", Path(recipe))] if recipe and Path(recipe).exists() else []
    with processes(device) as local_device, ExitStack() as held:
        with progress.stage("open"):
            with same_error():
                if world().rank == 0:
                    held.enter_context(claimed(out, inputs + training_inputs(stages)))
                    resolve(parsed.model, work / "source")
            source = resolve(parsed.model, work / "source")
            heldout = Heldout(make_heldout(source, parsed, EVALUATED), heldout_name(parsed))
        tuned = train_stages(source, stages, parsed.seed if seed is None else seed, work, str(local_device), heldout)
        with same_error():
            if world().rank == 0:
                with atomic_folder(out, new=True) as partial:
                    write_checkpoint(tuned.source, tuned.plan, partial)
                    (partial / RECOVERY).parent.mkdir()
                    write_json(partial / RECOVERY, tuned.record.model_dump(mode="json"))
                remove(work)
        return replace(tuned, folder=out, rank=world().rank)


def _changed(
    stage: Stage, data: Sequence[str | Path] | None, steps: int | None, density: float | None, lora: int | None
) -> Stage:
    """A stage with what a person gave in place of its training's."""
    assert stage.tune is not None
    values = stage.tune.model_dump()
    if data:
        mixture = (
            []
            if [str(path) for path in data] == [SELF]
            else [{"name": Path(data[0]).name, "share": 1.0, "files": [str(path) for path in data]}]
        )
        values["data"] |= {"mixture": mixture}
    values |= {} if steps is None else {"steps": steps}
    values["penalty"] |= {} if density is None else {"density": density}
    values |= {} if lora is None else {"lora": {"rank": lora, "alpha": 2.0 * lora}}
    return stage.model_copy(update={"tune": make_part(Recovery, values, "The training")})

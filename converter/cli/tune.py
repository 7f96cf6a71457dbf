"""`sparsegate tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...runtime_onnx.errors import either
from ...runtime_onnx.ops.vocabulary import RELUS, forms
from .output import Quiet, Verbose

_OTHERS = forms((kind for kind in RELUS if kind != "drelu"), "B")


def tune(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Dense model folder, PowerInfer file or Hub id; none takes the small model that comes with "
            "sparsegate.",
            metavar="[MODEL]",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The new folder; MODEL-tuned when not given.")
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(help=f"drelu (the default), {either(_OTHERS)}, in every feed-forward network."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="YAML file whose training stages are run, or one that comes along: turbosparse, "
            "turbosparse_predictors, turbosparse_paper."
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text files to train on; self or none: text that the dense model writes itself."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of training, in place of the recipe's.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of non-zero units to end at, in place of the recipe's.")
    ] = None,
    lora: Annotated[
        int | None, typer.Option(help="Train low-rank updates of this rank in place of whole weights.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of text, order and predictors, in place of the recipe's.")
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="Where torch trains: cpu or cuda. Several processes: torchrun --nproc-per-node N $(which sparsegate) "
            "tune ..."
        ),
    ] = "cpu",
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> int:
    """Tune and print what was recovered."""
    from ..pipeline.tune import tune as run
    from . import output as show

    with show.telling(quiet, verbose):
        result = run(model, output, activation, recipe, data, steps, density, lora, seed, device)
    if result.rank == 0:
        show.tuning(result, json)
    return 0

"""`sparsegate eval`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .output import Quiet, Verbose


def eval(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Sparse checkpoint or Hub id.")],
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text to measure on; of the checkpoint's calibration text, its last fifth. Default: Python "
            "source."
        ),
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Windows of the text. Default: as many as tell the loss.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File with one prompt a line. Default: beginnings of windows.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 64,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval", help="lm-eval tasks, with commas between; FOLDER/NAME is a task of your own.", metavar="TASKS"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most examples of each lm-eval task.")] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="Dense model to compare with, where weights or activations were changed. Default: the checkpoint "
            "ungated."
        ),
    ] = None,
    long: Annotated[
        int | None,
        typer.Option(
            help="Also measure long context: loss by position, repetitions and needles in windows of the largest power "
            "of two of up to TOKENS that the model has positions for.",
            metavar="TOKENS",
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Measure, store report/eval.json and print the tables."""
    from ..pipeline.evaluate import evaluate
    from ..report.evaluation import answer_cells, executor_cells, site_cells, sparsity_cells, task_cells
    from ..report.long_context import long_tables
    from ..report.tables import table
    from . import output as show

    with show.telling(quiet, verbose):
        evaluation = evaluate(
            model,
            text,
            windows,
            prompts,
            max_new_tokens,
            lm_eval,
            limit,
            command=show.command(sys.argv[1:]),
            source=source,
            long=long,
        )
    if json:
        print(evaluation.model_dump_json(indent=2))
        return 0
    parts = [
        executor_cells(evaluation),
        answer_cells(evaluation),
        sparsity_cells(evaluation),
        site_cells(evaluation),
    ] + ([task_cells(evaluation)] if evaluation.tasks else [])
    parts += [cells for _, cells in long_tables(evaluation.long)] if evaluation.long else []
    print("\n\n".join(table(cells, "text") for cells in parts))
    return 0

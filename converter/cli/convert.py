"""`sparsegate convert`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..methods import JOINED, NAMED
from ..onnx_export.precision import PRECISIONS
from .output import Quiet, Verbose


def convert(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Model folder, PowerInfer file or Hub id; none takes the small model that comes with sparsegate.",
            metavar="[MODEL]",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The new folder; MODEL-sparse when not given.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(NAMED)}, two as in {JOINED[0]}, or auto (the default): what needs no training, then the "
            "trained form of the best."
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of the gated neurons to skip, 0.5 when neither it nor a budget is given."),
    ] = None,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            help="Find the cheapest checkpoint whose perplexity rises by no more than this, as in 1% or 0.01; with "
            "--sparsity only check it."
        ),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="The same for the KL divergence to the dense model, nats per token.")
    ] = None,
    max_kl_long: Annotated[
        float | None,
        typer.Option(
            help="The same for tokens with half of a long window before them (2048 tokens, or what the model and the "
            "held-out text allow); the report then shows the loss by position."
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="YAML file in place of the flags that it covers, or the name of one that comes along: turbosparse, "
            "turbosparse_paper."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text, .jsonl or .parquet; its last fifth is held out. Or self: text that the model writes, or "
            "chat: conversations that it writes in its chat template. Default: Python source."
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help=f"Of the gated weights in ONNX: fp32 (the default; fp16 for cuda), {', '.join(list(PRECISIONS)[1:])}."
        ),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Where the ONNX model runs: cpu or cuda.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of calibration windows and predictors.")] = None,
    rotate: Annotated[
        bool,
        typer.Option(
            "--rotate",
            help="Turn the residual stream to its principal axes first, which changes no output: teal, wina and "
            "trained_input lose less. auto tries it by itself under a budget.",
        ),
    ] = False,
    time_budget: Annotated[
        str | None,
        typer.Option(
            help="Time on this machine, as in 90s, 20m or 1h30m: a training is cut to it or left out, which a line "
            "says, and auto takes 30m unless told otherwise."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where torch calibrates: cpu or cuda.")] = "cpu",
    push: Annotated[str | None, typer.Option(help="Hub repository to push the result to (private).")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a pushed repository public.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and needed, and stop.")] = False,
    keep_stages: Annotated[
        bool, typer.Option("--keep-stages", help="Keep OUT.work with every stage, the dense ONNX graph included.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> int:
    """Convert and print the measured table."""
    from ..pipeline.convert import convert as run
    from . import output as show

    with show.telling(quiet, verbose):
        result = run(
            model=model,
            output=output,
            method=method,
            sparsity=sparsity,
            max_ppl_increase=show.share(max_ppl_increase, "--max-ppl-increase"),
            max_kl=max_kl,
            max_kl_long=max_kl_long,
            recipe=recipe,
            calibration=calibration,
            precision=precision,
            target=target,
            seed=seed,
            rotate=rotate,
            time_budget=time_budget,
            device=device,
            push_to=push,
            public=public,
            dry_run=dry_run,
            keep_stages=keep_stages,
            command=show.command(sys.argv[1:]),
        )
    show.conversion(result, json)
    return 0

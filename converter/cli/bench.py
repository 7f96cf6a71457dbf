"""`sparsegate bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..onnx_export.precision import PRECISIONS
from .output import Quiet, Verbose

if TYPE_CHECKING:
    from ..evaluation.speed.run import BenchRequest


def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DENSE] [DIR]",
            help="ONNX folders, sparse checkpoints or Hub ids; one checkpoint alone brings its dense graph.",
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights of a model's sizes: llama-1b, llama-8b, qwen2.5-0.5b, ...")
    ] = None,
    op: Annotated[str | None, typer.Option(help="Time one op alone: gated_mlp or sparse_linear.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(PRECISIONS)}; for an op a list. Default: int4 of a shape, all of an op."),
    ] = None,
    density: Annotated[str | None, typer.Option(help="Kept shares to force, as 0.5,0.2 or 50%,20%.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens in one call of the op, as 1,8,512.")] = None,
    layers: Annotated[int | None, typer.Option(help="Fewer layers than the shape has.")] = None,
    peers: Annotated[bool, typer.Option(help="Run llama.cpp and torch beside.")] = True,
    prompt_tokens: Annotated[int | None, typer.Option(help="Tokens prefilled: 128 of folders, 64 of a shape.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens decoded: 64 of folders, 24 of a shape.")] = None,
    pairs: Annotated[
        int | None, typer.Option(help="Back-to-back pairs: 7 of folders, 15 of a shape, 21 clean ones of an op.")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(help="onnxruntime (default of folders) or onnxruntime-genai (of a shape).")
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            help="Of the sparse side of gated_mlp or a shape: drelu and others with exact zeros; --density is then "
            "what is not zero."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads within an op.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder in which the models of a shape are made and kept.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="JSON file; table and plot go beside it, an op's finished rows are kept."),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Measure speed against the dense model, back to back, and print tokens per second and ratios."""
    from ..evaluation.speed.run import BenchRequest

    request = BenchRequest(
        models=models,
        shape=shape,
        op=op,
        precision=precision,
        density=density,
        tokens=tokens,
        layers=layers,
        peers=peers,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        pairs=pairs,
        runtime=runtime,
        activation=activation,
        threads=threads,
        work=work,
    )
    return _bench(request, output, quiet, verbose, json)


def _bench(request: BenchRequest, output: Path | None, quiet: bool, verbose: bool, json: bool) -> int:
    from .. import progress
    from ..evaluation.speed.run import bench as run
    from ..report.speed_files import write_speed
    from . import output as show

    def advance(done: int, total: int) -> None:
        progress.update(done, total or None, unit="row" if request.op else "pair")

    with show.telling(quiet, verbose), progress.job(), progress.stage("bench"):
        result = run(request, output, command=show.command(sys.argv[1:]), progress=advance)
        if output:
            write_speed(output, result)
    show.speed(result, json)
    return 0

"""`sparsegate bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    baseline: Annotated[str, typer.Argument(metavar="DENSE", help="ONNX folder to compare with; a sparse checkpoint or Hub id will do, too.")],
    candidate: Annotated[str, typer.Argument(metavar="DIR", help="ONNX folder, sparse checkpoint or Hub id.")],
    prompt_tokens: Annotated[int, typer.Option(help="Tokens prefilled.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded.")] = 64,
    pairs: Annotated[int, typer.Option(help="Back-to-back pairs; medians are reported.")] = 7,
    runtime: Annotated[str, typer.Option(help="onnxruntime or onnxruntime-genai.")] = "onnxruntime",
    threads: Annotated[int | None, typer.Option(help="Threads within an op.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File for the JSON.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Measure and print tokens per second of both, and the ratio."""
    from tqdm.auto import tqdm

    from ...runtime_onnx.bench import bench as run
    from ..artifact import write_json
    from ..hub import local_folder
    from . import output as show

    dense, sparse = local_folder(baseline), local_folder(candidate)
    with tqdm(total=pairs, desc="bench", unit="pair", delay=0.01) as progress:  # the delay keeps the bar away when a folder is refused

        def advance(done: int) -> None:
            progress.update(done - progress.n)

        result = run(
            dense, sparse, prompt_tokens=prompt_tokens, new_tokens=new_tokens, pairs=pairs, runtime=runtime, threads=threads, progress=advance
        )  # fmt: skip
    if output:
        write_json(output, result)
    show.speed(result, json)
    return 0

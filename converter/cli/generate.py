"""`sparsegate generate`."""

from __future__ import annotations

from typing import Annotated

import typer


def generate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Sparse checkpoint, ONNX folder or Hub id.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0: all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Sample within this probability mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    body: Annotated[bool, typer.Option("--body", help="Run standard ONNX ops even where the native library would do.")] = False,
) -> int:
    """Print prompt and continuation as they come."""
    from ...runtime_onnx import generate as run
    from ..hub import local_folder

    folder = local_folder(model)
    pieces = run(folder, prompt, max_new_tokens, temperature, top_k, top_p, seed, library=False if body else None)
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0

"""`sparsegate generate`."""

from __future__ import annotations

import io
import logging
import sys
from typing import Annotated

import typer


def generate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Sparse checkpoint, ONNX folder or Hub id.")],
    prompt: Annotated[str, typer.Argument(help="What to say to the model, or text to continue.")],
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Answer in the model's chat template, the default where it has one; or continue the text as it is.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0: all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Sample within this probability mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    body: Annotated[
        bool, typer.Option("--body", help="Run standard ONNX ops even where the native library would do.")
    ] = False,
) -> int:
    """Print the answer, or prompt and continuation, as they come."""
    from ...runtime_onnx import Sampling
    from ...runtime_onnx import generate as run
    from ...runtime_onnx.text import find_template
    from ..sources.hub import local_folder

    folder = local_folder(model)
    if (clean := prompt.encode("utf-8", "replace").decode()) != prompt:
        logging.getLogger("sparsegate").warning(
            "The prompt must be text in this terminal's encoding, got other bytes. They are read as question marks."
        )
    prompt = clean
    chat = find_template(folder) is not None if chat is None else chat
    sampling = Sampling(temperature, top_k, top_p, seed)
    pieces = run(folder, prompt, max_new_tokens, sampling, library=False if body else None, chat=chat)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may have other letters than the model
    if not chat:
        print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0

"""Who reads a damaged folder in the fuzz test: commands and functions, with what they gave to compare."""

from __future__ import annotations

import io
import random
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_mutations import draw_flags

TOKENS = np.arange(3, 35).reshape(2, 16)
SENTENCE = "def add(first, second):\n    return first + second  # caf\u00e9\n"


class Stopped(Exception):
    """A command came as far as the fuzz test lets it."""


class Fault(Exception):
    """An outcome that is none of GOOD, and the note on it."""


# Readers: (folder with the damaged file) -> what it says, and a note


def _cli(*words: str) -> str:
    """What `sparsegate WORDS` did: refused or accepted, by its status and its line."""
    from sparsegate.converter.cli import main

    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["sparsegate", *words]
    status: Any = None
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main(list(words))
    except SystemExit as stop:
        status = stop.code
    said = err.getvalue()
    lines = [line for line in said.splitlines() if line.startswith("sparsegate: ")]
    if "Traceback" in said or "Traceback" in out.getvalue():
        raise Fault("traceback", said[-3000:])
    if status == 0:
        return "accepted"
    if status == 2 and ("Usage:" in said or "─ Error" in said):  # typer's own box
        return "refused by typer"
    if status == 1 and any(verdict in out.getvalue() for verdict in ("cannot be converted", "NOT verified")):
        return f"refused: {out.getvalue()[-500:]}"
    if status not in (1, 2) or len(lines) != 1:
        raise Fault("lines", f"status {status}: {said[-2000:]}")
    return f"refused: {lines[0]}"


def _read_cli(*words: str) -> Callable[[Path, random.Random], tuple[Any, str]]:
    def read(here: Path, drawn: random.Random) -> tuple[Any, str]:
        return None, _cli(*words)

    return read


def _logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(TOKENS)).logits.float().numpy()


def _dense(folder: str) -> Any:
    from sparsegate.converter.checkpoint.source import open_source
    from sparsegate.converter.modeling.empty import empty_model
    from sparsegate.converter.modeling.gated import load_dense

    empty_model(open_source(folder))
    return _logits(load_dense(Path(folder)))


def _read_dense(here: Path, drawn: random.Random) -> tuple[Any, str]:
    index = here / "sharded" / "model.safetensors.index.json"
    changed = not index.is_file() or index.lstat().st_nlink < 2
    return _dense(str(here / ("sharded" if changed else "model"))), ""


def _read_words(here: Path, drawn: random.Random) -> tuple[Any, str]:
    from sparsegate.converter.checkpoint.source import open_source

    tokenizer = open_source(here / "model").tokenizer()
    return (tokenizer(SENTENCE)["input_ids"], tokenizer.decode([5, 6, 7])), ""


def _read_ends(here: Path, drawn: random.Random) -> tuple[Any, str]:
    from sparsegate.converter.checkpoint.source import end_tokens

    return sorted(end_tokens(here / "model")), ""


def _read_load(here: Path, drawn: random.Random) -> tuple[Any, str]:
    from sparsegate.converter.pipeline.load import load

    return _logits(load(here / "out")), ""


def _read_text(here: Path, drawn: random.Random) -> tuple[Any, str]:
    from sparsegate.runtime_onnx.generate import end_tokens
    from sparsegate.runtime_onnx.text import Tokenizer

    tokenizer = Tokenizer(here / "out")
    ids = tokenizer.encode(SENTENCE)
    return (ids, tokenizer.decode(ids), sorted(end_tokens(here / "out"))), ""


def _read_chat(here: Path, drawn: random.Random) -> tuple[Any, str]:
    from sparsegate.runtime_onnx.text import Tokenizer

    return None, Tokenizer(here / "out").chat([{"role": "user", "content": "x"}])


def _read_decoder(here: Path, drawn: random.Random) -> tuple[Any, str]:
    import onnxruntime

    from sparsegate.runtime_onnx.session import Decoder

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return Decoder(here / "out", session_options=options)(TOKENS[0]), ""


def _read_files(here: Path, drawn: random.Random) -> tuple[Any, str]:
    from sparsegate.converter.checkpoint.manifest import check_files, read_manifest
    from sparsegate.converter.pipeline.recipe import make_recipe

    manifest = read_manifest(here / "out")
    make_recipe(manifest.recipe, "manifest.json's recipe")
    return None, "; ".join(check_files(here / "out", manifest))


def _read_gguf(here: Path, drawn: random.Random) -> tuple[Any, str]:
    from sparsegate.converter.checkpoint.source import open_source
    from sparsegate.converter.sources.powerinfer import import_powerinfer

    folder = import_powerinfer(here / "powerinfer.gguf", here / "powerinfer")
    return None, f"{len(open_source(folder).tensors)} tensors"


def _read_predictors(here: Path, drawn: random.Random) -> tuple[Any, str]:
    from sparsegate.converter.checkpoint.source import open_source
    from sparsegate.converter.sources.predictors import Config, imported_plan

    imported_plan(open_source(here / "model"), Config(folder=str(here / "predictors")))
    return None, ""


def _read_flags(here: Path, drawn: random.Random) -> tuple[Any, str]:
    words = [{"MODEL": "model", "OUT": "out"}.get(word, word) for word in draw_flags(drawn)]
    if words[0] in ("convert", "tune", "export") and not any(word.startswith("-o") for word in words):
        words += ["-o", "o"]
    try:
        return None, _cli(*words)
    except Fault as fault:
        raise Fault(fault.args[0], f"{[word[:60] for word in words]}: {fault.args[1]}") from None
    except Stopped:
        return None, "stopped"
    except BaseException as error:
        raise Fault(
            "traceback", f"{[word[:60] for word in words]}: {''.join(traceback.format_exception(error))[-3000:]}"
        ) from None


READERS: dict[str, Callable[[Path, random.Random], tuple[Any, str]]] = {
    "inspect": _read_cli("inspect", "model"),
    "dry": _read_cli("convert", "model", "-o", "o", "--dry-run"),
    "recipe": _read_cli("convert", "--recipe", "recipe.yaml", "-o", "o", "--dry-run"),
    "started": _read_cli("convert", "--recipe", "recipe.yaml", "-o", "o"),
    "generate": _read_cli("generate", "out", "def", "--raw", "--max-new-tokens", "2"),
    "link": _read_cli("link", "out"),
    "judged": _read_cli("verify", "out"),
    "unlink": _read_cli("unlink", "linked"),
    "bench": _read_cli("bench", "out", "out", "--prompt-tokens", "4", "--new-tokens", "2"),
    "chat": _read_chat,
    "dense": _read_dense,
    "words": _read_words,
    "ends": _read_ends,
    "load": _read_load,
    "text": _read_text,
    "decoder": _read_decoder,
    "files": _read_files,
    "gguf": _read_gguf,
    "predictors": _read_predictors,
    "flags": _read_flags,
}
REFERENCES = {"dense", "words", "load", "text", "decoder"}
"""Readers whose result is compared with that of the undamaged folder."""

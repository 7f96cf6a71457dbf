"""A model's own text as a stage of the work folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file

from ...runtime_onnx.untrusted import read_json
from ..checkpoint.source import Source, open_source
from ..checkpoint.stage import (
    Header,
    atomic_folder,
    hash_json,
    is_finished,
    is_intact,
    read_header,
    write_header,
    write_json,
    write_tensors,
)
from ..modeling.distributed import world
from ..modeling.gated import load_dense
from ..modeling.processes import run_in_processes
from .chat import ChatForm, chat_windows
from .sampling import sampled_groups, self_generated, self_generated_streams, stream_groups
from .windows import Batches

GENERATED, SECONDS = "generated", "seconds.json"
_REQUEST, _TOKENS = "asked.json", "tokens.safetensors"


def generated(
    source: Source,
    windows: int,
    length: int,
    seed: int,
    work: Path | None,
    temperature: float = 1.0,
    streams: bool = False,
    processes: int = 1,
) -> Batches:
    """Windows [N, S] that the model writes itself.

    They are made once below `work`, with the seconds that it took. Where more lie there, the first of them are taken.
    `streams` takes them from texts that begin anywhere, sampled by `processes` of this machine. The number of processes
    changes nothing but the time (and rounding).
    """
    config = (
        {"length": length}
        | ({} if temperature == 1.0 else {"temperature": temperature})
        | ({"streams": "groups"} if streams else {})
    )
    header = Header(
        format="generated", parents={"model": source.fingerprint}, config=config | {"windows": windows}, seed=seed
    )
    if work is None:
        return _write(source, length, windows, seed, temperature, streams)
    groups = work / f"{GENERATED}.{hash_json(header.model_dump(mode='json'))[:16]}"

    def write() -> tuple[Batches, float]:
        if streams and (processes > 1 or groups.is_dir()):
            return _sampled_by(processes, source, windows, length, seed, temperature, groups)
        return _write(source, length, windows, seed, temperature, streams), 0.0

    batches = _stored(work, header, windows, write)
    shutil.rmtree(groups, ignore_errors=True)
    return batches


def chatted(source: Source, form: ChatForm, windows: int, length: int, seed: int, work: Path | None) -> Batches:
    """Windows [N, S] of conversations that the model writes itself in the form of its chat template, kept as those of
    `generated`.
    """

    def write() -> tuple[Batches, float]:
        return chat_windows(load_dense(source.folder), source.tokenizer(), form, windows, length, seed), 0.0

    config = {"length": length, "chat": asdict(form), "windows": windows}
    header = Header(format="generated", parents={"model": source.fingerprint}, config=config, seed=seed)
    return write()[0] if work is None else _stored(work, header, windows, write)


def _stored(work: Path, header: Header, windows: int, write: Callable[[], tuple[Batches, float]]) -> Batches:
    """The first `windows` of the stage below `work`, which `write` makes where it is not there, with the seconds that
    an interrupted run spent on it before.
    """
    if not _covers(read_header(work / GENERATED), header) or not is_intact(work / GENERATED):
        began = time.monotonic()
        batches, before = write()
        with atomic_folder(work / GENERATED) as partial:
            write_tensors(partial / _TOKENS, {"tokens": batches.tokens})
            write_json(partial / SECONDS, {"seconds": before + time.monotonic() - began})
            write_header(partial, header)
    tokens = load_file(work / GENERATED / _TOKENS)["tokens"][:windows]
    return Batches(tokens, torch.ones_like(tokens, dtype=torch.bool))


def _write(source: Source, length: int, windows: int, seed: int, temperature: float, streams: bool) -> Batches:
    write = self_generated_streams if streams else self_generated
    return write(load_dense(source.folder), source.tokenizer(), windows, length, seed, temperature)


def _sampled_by(
    count: int, source: Source, windows: int, length: int, seed: int, temperature: float, folder: Path
) -> tuple[Batches, float]:
    """`self_generated_streams` by several processes, whose groups lie in `folder` meanwhile: an interrupted sampling
    goes on. With the seconds spent before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = float(read_json(folder / SECONDS, "The sampling time")["seconds"]) if (folder / SECONDS).is_file() else 0.0
    write_json(
        folder / _REQUEST,
        {"model": str(source.folder), "windows": windows, "length": length, "seed": seed, "temperature": temperature},
    )
    began = time.monotonic()
    try:
        run_in_processes(count, sample_groups, folder)
    finally:
        write_json(folder / SECONDS, {"seconds": before + time.monotonic() - began})
    tokens = torch.cat([load_file(part)["tokens"] for part in sorted(folder.glob(f"*/{_TOKENS}"))])
    return Batches(tokens, torch.ones_like(tokens, dtype=torch.bool)), before


def sample_groups(folder: str) -> None:
    """This process's share of the groups that `folder` asks for, where they are not there."""
    request = read_json(Path(folder) / _REQUEST, "What is to be sampled")
    source = open_source(request["model"], sparse=True)
    model, tokenizer = load_dense(source.folder), source.tokenizer()
    here, sizes = world(), (request["windows"], request["length"])
    places = {group: Path(folder) / f"{group:06}" for group in range(stream_groups(model, *sizes)[0])}
    headers = {group: Header(format="group", config=request | {"group": group}) for group in places}
    missing = [
        group for group in list(places)[here.rank :: here.size] if not is_finished(places[group], headers[group])
    ]
    for group, tokens in sampled_groups(model, tokenizer, *sizes, request["seed"], request["temperature"], missing):
        with atomic_folder(places[group]) as partial:
            write_tensors(partial / _TOKENS, {"tokens": tokens})
            write_header(partial, headers[group])


def _covers(stored: Header | None, wanted: Header) -> bool:
    """Whether a stage holds the wanted windows, and perhaps more."""
    count = 0 if stored is None else stored.config.get("windows", 0)
    return (
        stored is not None
        and count >= wanted.config["windows"]
        and stored == wanted.model_copy(update={"config": wanted.config | {"windows": count}})
    )

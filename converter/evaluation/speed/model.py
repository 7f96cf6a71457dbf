"""Times whole models in one run: dense and sparse in ONNX Runtime, and the peers that are installed, on the same random
tokens.

Beside the ratios stands what the op's own speed-up lets one expect (Amdahl's law): the feed-forward networks' share of
a dense token, by ONNX Runtime's profiler, and the op timed alone at the model's size and realised density.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ....runtime_onnx import library
from ....runtime_onnx.bench.folders import BenchTiming, describe
from ....runtime_onnx.bench.graphs import NeuronShares, mlp_share, realised, token_bytes
from ....runtime_onnx.bench.op import NO_CUDA, OpTiming, OpWorkload, bench_op
from ....runtime_onnx.bench.record import record, usable_cpus
from ....runtime_onnx.bench.samples import Round, compare, rounds
from ....runtime_onnx.bench.stream import MemoryStream, best
from ....runtime_onnx.errors import InputError
from .memory import peak
from .peers import OPENERS

_PROBE = 96  # tokens that the realised density is measured on


@dataclass(frozen=True)
class TimedModel:
    """One model of the run: its runtime in `peers.OPENERS`, its file or folder, and its format in words."""

    runtime: str
    path: Path
    form: str


@dataclass(frozen=True)
class TimedTokens:
    """Ids of the prompt in one call, and of the tokens after it in one call each; the same for all models."""

    prompt: list[int]
    following: list[int]


def bench_models(
    models: Mapping[str, TimedModel],
    tokens: int | Sequence[int],
    timing: BenchTiming,
    settings: Mapping[str, Any],
    mlp: OpWorkload | None = None,
    memory: bool = True,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Times every model in rounds; the role "dense" is the baseline, roles "sparse ..." are compared with every other.

    Args:
        models: By role.
        tokens: Ids of a text, of which the first are taken, or below which number they are drawn from 2 on, at random:
            the same for all.
        timing: How many tokens, rounds and threads; by default the threads of the CPUs that this process may use.
        settings: What else to record: model or sizes, density, precision.
        mlp: The sparse models' feed-forward networks as an op, for the expectation; None leaves it out.
        memory: Whether to run each model once more in a process of its own for its peak memory.
        command: What to record as the command; this process's own by default.
        progress: Called with the number of finished rounds.

    Returns:
        JSON-ready: head as in `record`, "settings", "models", "ratios", "amdahl", "stream_gb_per_s", "samples".

    Raises:
        InputError: A number is out of range, or dense or sparse cannot be opened.
    """
    timing.check()
    threads = timing.threads or usable_cpus()
    drawn = _drawn(tokens, timing.prompt_tokens + timing.new_tokens)
    text = TimedTokens(drawn[: timing.prompt_tokens], drawn[timing.prompt_tokens :])
    result: dict[str, Any] = {
        **record(command),
        "kind": "model",
        "isa": library.isa(),
        "cuda": NO_CUDA,
        "settings": dict(settings) | _recorded(timing, threads, tokens),
    }
    rows, densities = _described(models, text, threads, memory)
    running = {role: model for role, model in models.items() if rows[role]["status"] == "run"}
    timed, roof = _timed(running, text, threads, timing.pairs, progress)
    result["stream_gb_per_s"] = roof
    for role in running:
        rows[role] |= _speeds(timed, role, text)
        if "token_bytes" in rows[role]:
            rows[role]["gb_per_s"] = rows[role]["token_bytes"] * rows[role]["decode_tokens_per_s"] / 1e9
            rows[role]["share_of_stream"] = rows[role]["gb_per_s"] / roof
    result["models"] = list(rows.values())
    result["ratios"] = _ratios(timed, list(running))
    if mlp and "dense" in running:
        share = mlp_share(models["dense"].path, text.prompt[:8], text.following[:12], threads)
        result["amdahl"] = [
            _expected(role, result["ratios"], share, mlp, _mean(densities[role]), threads)
            for role in running
            if role.startswith("sparse")
        ]
    result["samples"] = [{"seconds": entry.values, "waits": entry.waits} for entry in timed]
    return result


def _recorded(timing: BenchTiming, threads: int, tokens: int | Sequence[int]) -> dict[str, Any]:
    """How it was timed, as a result's settings say it."""
    return {
        "prompt_tokens": timing.prompt_tokens,
        "new_tokens": timing.new_tokens,
        "rounds": timing.pairs,
        "threads": threads,
        "tokens": "random ids, the same for all" if isinstance(tokens, int) else "of a text, the same for all",
    }


def _described(
    models: Mapping[str, TimedModel], text: TimedTokens, threads: int, memory: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, NeuronShares]]]:
    """The row of every model without its speeds, and the realised densities of those in ONNX Runtime, by role."""
    rows: dict[str, dict[str, Any]] = {}
    densities: dict[str, dict[str, NeuronShares]] = {}
    for role, model in models.items():
        runtime, missing = OPENERS[model.runtime], OPENERS[model.runtime].missing()
        row = rows[role] = {"role": role, "runtime": model.runtime, "format": model.form, "timed": runtime.timed}
        row["status"] = missing or "run"
        if missing is not None:
            continue
        if model.runtime.startswith("onnxruntime"):
            densities[role] = realised(model.path, [*text.prompt, *text.following][:_PROBE])
            row |= _facts(model.path, densities[role])
        elif model.path.is_file():
            row["file_bytes"] = model.path.stat().st_size
        if memory:
            row["peak_bytes"] = peak(model.runtime, model.path, threads, model.form, text.prompt, text.following)
    return rows, densities


def _timed(
    models: Mapping[str, TimedModel],
    text: TimedTokens,
    threads: int,
    count: int,
    progress: Callable[[int], None] | None,
) -> tuple[list[Round[tuple[float, float]]], float]:
    """Seconds of prompt and following tokens of every model in `count` rounds, and the GB/s of the fastest way of
    reading memory before and after them.
    """
    stream = MemoryStream(threads)
    before = stream.bandwidth(9)
    opened = {
        role: OPENERS[model.runtime].open(model.path, threads, model.form, len(text.prompt) + len(text.following))
        for role, model in models.items()
    }
    timed = rounds(
        {role: lambda model=model: model.run(text.prompt, text.following) for role, model in opened.items()},
        count,
        progress=progress,
    )
    del opened
    return timed, best(before, stream.bandwidth(9))


def _drawn(tokens: int | Sequence[int], count: int) -> list[int]:
    """The first `count` ids of a text, or as many random ones below a number. Raises InputError for a text that is too
    short.
    """
    if isinstance(tokens, int):
        return np.random.default_rng(3).integers(2, tokens, count).tolist()
    if len(tokens) < count:
        raise InputError(
            f"tokens must hold at least {count} ids, got {len(tokens)}. Give a longer text, or fewer tokens to time."
        )
    return list(tokens[:count])


def _facts(path: Path, density: dict[str, NeuronShares]) -> dict[str, Any]:
    """What the folder holds, bytes a token needs and its realised density; of a ReLU model also the shares of open
    gates and of what is not zero.
    """
    description = describe(path)
    size = sum(file.stat().st_size for file in path.iterdir() if file.name.startswith("model.onnx"))
    facts = {
        "executor": description["executor"],
        "precision": description["precision"],
        "file_bytes": size,
        "token_bytes": token_bytes(path, density),
    }
    if not density:
        return facts
    mean, kept = _mean(density), [shares.kept for shares in density.values()]
    more = {} if mean.opened == mean.nonzero == mean.kept else {"opened": mean.opened, "nonzero": mean.nonzero}
    return facts | {"density": mean.kept, "layer_densities": [min(kept), max(kept)]} | more


def _mean(density: dict[str, NeuronShares]) -> NeuronShares:
    return NeuronShares(*(statistics.mean(values) for values in zip(*density.values(), strict=True)))


def _speeds(timed: Sequence[Round[tuple[float, float]]], role: str, text: TimedTokens) -> dict[str, Any]:
    """Median tokens per second over the rounds in which the role did not wait, or over all, which is said."""
    quiet = [entry for entry in timed if entry.quiet(role)]
    kept = quiet or timed
    return {
        "prefill_tokens_per_s": len(text.prompt) / statistics.median(entry.values[role][0] for entry in kept),
        "decode_tokens_per_s": len(text.following) / statistics.median(entry.values[role][1] for entry in kept),
        "rounds": len(quiet),
        "quiet": bool(quiet),
    }


def _ratios(timed: Sequence[Round[tuple[float, float]]], roles: Sequence[str]) -> list[dict[str, Any]]:
    """Every sparse model against every other: from the rounds in which neither waited, or from all, which is said."""
    ratios = []
    for role in (role for role in roles if role.startswith("sparse")):
        for other in (other for other in roles if not other.startswith("sparse")):
            quiet = [entry for entry in timed if entry.quiet(role, other)]
            kept = quiet or timed
            row: dict[str, Any] = {
                "role": role,
                "against": other,
                "dropped": len(timed) - len(kept),
                "quiet": bool(quiet),
            }
            for number, phase in enumerate(("prefill", "decode")):
                row[phase] = compare(
                    [entry.values[other][number] for entry in kept], [entry.values[role][number] for entry in kept]
                )
            if not quiet:
                logging.getLogger("sparsegate").warning(
                    "bench: %s against %s waited for a CPU in every round: do not quote", role, other
                )
            ratios.append(row)
    return ratios


def _expected(
    role: str,
    ratios: Sequence[dict[str, Any]],
    share: float,
    mlp: OpWorkload,
    shares: NeuronShares,
    threads: int,
) -> dict[str, Any]:
    """Amdahl's law beside what was measured, both for decoding."""
    measured = next(row["decode"]["ratio"] for row in ratios if row["role"] == role and row["against"] == "dense")
    row: dict[str, Any] = {"role": role, "mlp_share": share, "measured": measured, "density": shares.kept}
    density = round(shares.nonzero if mlp.zeros else shares.kept, 4)
    score = "exact" if role.startswith("sparse exact") else "predictor"
    try:
        (op,) = bench_op(replace(mlp, densities=(density,), score=score), OpTiming(threads, patience=20.0))["rows"]
    except ValueError as error:
        return row | {"status": f"not measured: {error}"}
    if op["status"] != "run":
        return row | {"status": op["status"]}
    speed_up = op["dense"][0]["ratio"]
    expected = 1 / (1 - share + share / speed_up)
    return row | {
        "status": "run",
        "op": op,
        "op_ratio": speed_up,
        "expected": expected,
        "measured_to_expected": measured / expected,
    }

"""Times whole models in one run: dense and sparse in ONNX Runtime, and the peers that are installed, on the same random
tokens.

Beside the ratios stands what the op's own speed-up lets one expect (Amdahl's law): the feed-forward networks' share of
a dense token, by ONNX Runtime's profiler, and the op timed alone at the model's size and realised density.
"""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....runtime_onnx import library
from ....runtime_onnx.bench.folders import describe
from ....runtime_onnx.bench.graphs import Shares, mlp_share, realised, token_bytes
from ....runtime_onnx.bench.op import NO_CUDA, bench_op
from ....runtime_onnx.bench.record import record
from ....runtime_onnx.bench.samples import Round, compare, rounds
from ....runtime_onnx.bench.stream import Stream, best
from ....runtime_onnx.errors import InputError
from .memory import peak
from .peers import OPENERS

_PROBE = 96  # tokens that the realised density is measured on


@dataclass(frozen=True)
class Entry:
    """One model of the run: its runtime in `peers.OPENERS`, its file or folder, and its format in words."""

    runtime: str
    path: Path
    form: str


@dataclass(frozen=True)
class Sizes:
    """Of the feed-forward networks, for the op alone: channels, neurons, rank of the predictor, layers."""

    d: int
    n: int
    r: int
    layers: int


def bench_models(
    entries: dict[str, Entry],
    precision: str,
    sizes: Sizes | None,
    settings: dict[str, Any],
    tokens: int | Sequence[int],
    prompt_tokens: int = 64,
    new_tokens: int = 24,
    count: int = 15,
    threads: int | None = None,
    memory: bool = True,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
    activation: str = "silu",
) -> dict[str, Any]:
    """Times every entry in `count` rounds; the role "dense" is the baseline, roles "sparse ..." are compared with every
    other.

    Args:
        entries: Models by role.
        precision: Of the weights, as in `--precision`.
        sizes: For the expectation; None leaves it out.
        settings: What else to record.
        tokens: Ids of a text, of which the first are taken, or below which number they are drawn from 2 on, at random:
        the same for all.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens decoded one at a time.
        count: Rounds.
        threads: Threads of every runtime; by default the CPUs that this process may use.
        memory: Whether to run each model once more in a process of its own for its peak memory.
        command: What to record as the command; this process's own by default.
        progress: Called with the number of finished rounds.
        activation: Of the sparse models' feed-forward networks, for the expectation.

    Returns:
        JSON-ready: head as in `record`, "settings", "models", "ratios", "amdahl", "stream_gb_per_s", "samples".

    Raises:
        InputError: A number is out of range, or dense or sparse cannot be opened.
    """
    for name, value in (("pairs", count), ("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}. Choose a larger number.")
    threads = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    drawn = _drawn(tokens, prompt_tokens + new_tokens)
    ids, following = drawn[:prompt_tokens], drawn[prompt_tokens:]
    result: dict[str, Any] = {
        **record(command),
        "kind": "model",
        "isa": library.isa(),
        "cuda": NO_CUDA,
        "settings": settings
        | {
            "precision": precision,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "rounds": count,
            "threads": threads,
            "tokens": "random ids, the same for all" if isinstance(tokens, int) else "of a text, the same for all",
        },
    }
    rows: dict[str, dict[str, Any]] = {
        role: {"role": role, "runtime": entry.runtime, "format": entry.form} for role, entry in entries.items()
    }
    densities: dict[str, dict[str, Shares]] = {}
    for role, entry in entries.items():
        rows[role]["timed"] = OPENERS[entry.runtime].timed
        if (missing := OPENERS[entry.runtime].missing()) is not None:
            rows[role]["status"] = missing
            continue
        rows[role]["status"] = "run"
        if entry.runtime.startswith("onnxruntime"):
            densities[role] = realised(entry.path, drawn[:_PROBE])
            rows[role] |= _facts(entry.path, densities[role])
        elif entry.path.is_file():
            rows[role]["file_bytes"] = entry.path.stat().st_size
        if memory:
            rows[role]["peak_bytes"] = peak(entry.runtime, entry.path, threads, entry.form, ids, following)
    running = {role: entry for role, entry in entries.items() if rows[role]["status"] == "run"}
    stream = Stream(threads)
    before = stream.bandwidth(9)
    models = {
        role: OPENERS[entry.runtime].open(entry.path, threads, entry.form, len(drawn))
        for role, entry in running.items()
    }
    found = rounds(
        {role: lambda model=model: model.run(ids, following) for role, model in models.items()},
        count,
        progress=progress,
    )
    del models
    roof = best(before, stream.bandwidth(9))
    result["stream_gb_per_s"] = roof
    for role in running:
        rows[role] |= _speeds(found, role, len(ids), len(following))
        if "token_bytes" in rows[role]:
            rows[role]["gb_per_s"] = rows[role]["token_bytes"] * rows[role]["decode_tokens_per_s"] / 1e9
            rows[role]["share_of_stream"] = rows[role]["gb_per_s"] / roof
    result["models"] = list(rows.values())
    result["ratios"] = _ratios(found, list(running))
    if sizes and "dense" in running:
        share = mlp_share(entries["dense"].path, ids[:8], following[:12], threads)
        result["amdahl"] = [
            _expected(role, result["ratios"], share, sizes, precision, _mean(densities[role]), threads, activation)
            for role in running
            if role.startswith("sparse")
        ]
    result["samples"] = [{"seconds": entry.values, "waits": entry.waits} for entry in found]
    return result


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


def _facts(path: Path, density: dict[str, Shares]) -> dict[str, Any]:
    """What the folder holds, bytes a token needs and its realised density; of a ReLU model also the shares of open
    gates and of what is not zero.
    """
    found = describe(path)
    size = sum(file.stat().st_size for file in path.iterdir() if file.name.startswith("model.onnx"))
    facts = {
        "executor": found["executor"],
        "precision": found["precision"],
        "file_bytes": size,
        "token_bytes": token_bytes(path, density),
    }
    if not density:
        return facts
    mean, kept = _mean(density), [shares.kept for shares in density.values()]
    more = {} if mean.opened == mean.nonzero == mean.kept else {"opened": mean.opened, "nonzero": mean.nonzero}
    return facts | {"density": mean.kept, "layer_densities": [min(kept), max(kept)]} | more


def _mean(density: dict[str, Shares]) -> Shares:
    return Shares(*(statistics.mean(values) for values in zip(*density.values(), strict=True)))


def _speeds(found: Sequence[Round[tuple[float, float]]], role: str, prompt: int, new: int) -> dict[str, Any]:
    """Median tokens per second over the rounds in which the role did not wait, or over all, which is said."""
    quiet = [entry for entry in found if entry.quiet(role)]
    kept = quiet or found
    return {
        "prefill_tokens_per_s": prompt / statistics.median(entry.values[role][0] for entry in kept),
        "decode_tokens_per_s": new / statistics.median(entry.values[role][1] for entry in kept),
        "rounds": len(quiet),
        "quiet": bool(quiet),
    }


def _ratios(found: Sequence[Round[tuple[float, float]]], roles: Sequence[str]) -> list[dict[str, Any]]:
    """Every sparse model against every other: from the rounds in which neither waited, or from all, which is said."""
    ratios = []
    for role in (role for role in roles if role.startswith("sparse")):
        for other in (other for other in roles if not other.startswith("sparse")):
            quiet = [entry for entry in found if entry.quiet(role, other)]
            kept = quiet or found
            row: dict[str, Any] = {
                "role": role,
                "against": other,
                "dropped": len(found) - len(kept),
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
    sizes: Sizes,
    precision: str,
    shares: Shares,
    threads: int,
    activation: str,
) -> dict[str, Any]:
    """Amdahl's law beside what was measured, both for decoding."""
    density = shares.kept
    measured = next(row["decode"]["ratio"] for row in ratios if row["role"] == role and row["against"] == "dense")
    row: dict[str, Any] = {"role": role, "mlp_share": share, "measured": measured, "density": density}
    try:
        asked = round(density if activation == "silu" else shares.nonzero, 4)
        score = "exact" if role.startswith("sparse exact") else "predictor"
        given = {"patience": 20.0, "activation": activation, "score": score}
        (op,) = bench_op("gated_mlp", sizes.d, sizes.n, sizes.r, [precision], [asked], (1,), threads, **given)["rows"]
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

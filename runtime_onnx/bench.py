"""Times two existing ONNX folders back to back: prefill and decode in tokens per second, as a ratio with everything needed to judge it.

Every pair times the baseline and the candidate right after each other, in turns who goes first, on the same tokens; a ratio is the median over the pairs.
Where the kernel tells how long threads waited for a CPU (/proc/self/task/*/schedstat), a pair in which they waited more than 5 % of the wall time is dropped.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .generate import config_provider, load
from .library import PROVIDERS, model_file, variants
from .session import Decoder, choose, read_config

MAX_WAIT = 0.05  # of the wall time of a sample, summed over threads
_SINGLE = {"session.force_spinning_stop": "1"}  # idle workers of the other model must not spin while this one runs
_FORMATS = {  # of initialisers: our spelling, bits
    "FLOAT": ("fp32", 32),
    "FLOAT16": ("fp16", 16),
    "BFLOAT16": ("bf16", 16),
    "INT8": ("int8", 8),
    "UINT8": ("uint8", 8),
    "INT4": ("int4", 4),
    "UINT4": ("uint4", 4),
    "INT32": ("int32", 32),
    "INT64": ("int64", 64),
}

Pass = Callable[[], tuple[float, float]]  # one timed run: seconds of prefill, seconds of decode


def bench(
    baseline: str | Path,
    candidate: str | Path,
    prompt: Sequence[int] | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    pairs: int = 7,
    runtime: str = "onnxruntime",
    threads: int | None = None,
    library: bool | None = None,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Times `candidate` against `baseline`; both are ONNX folders or sparse checkpoints with a genai_config.json.

    Args:
        baseline: Usually the dense model.
        candidate: Usually the sparse one.
        prompt: Token ids to prefill; by default `prompt_tokens` seeded random ids. Text like the model's own gives densities like those in use.
        prompt_tokens: Length of the prompt; a given prompt is cut to it, never stretched.
        new_tokens: Tokens decoded after the prompt, one at a time; both models get the baseline's greedy tokens.
        pairs: Pairs to time, after one pair that is not counted.
        runtime: "onnxruntime" (plain KV-cache loop) or "onnxruntime-genai".
        threads: Threads within an op; the runtime's own choice by default.
        library: As in `session`, for both models.
        command: What to record as the command; this process's own by default.
        progress: Called with the number of finished pairs.

    Returns:
        JSON-ready: "machine", "versions", "command", "settings"; "baseline" and "candidate" (path, precision, executor, median tokens per second);
        "prefill" and "decode" (ratio = candidate / baseline, its range, a verdict); "samples" that count (seconds) and the number of "dropped" pairs;
        "quiet" (None: waiting cannot be measured; False: every pair was disturbed, all count, nothing to quote), and "waits", the same in words.

    Raises:
        ValueError: A folder cannot be opened, or a number is out of range.
    """
    if runtime not in _PASSES:
        raise ValueError(f"runtime must be {' or '.join(_PASSES)}, got {runtime!r}. Choose one of them.")
    for name, value, least in (("pairs", pairs, 1), ("new_tokens", new_tokens, 1), ("prompt_tokens", prompt_tokens, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}. Choose a larger number.")
    folders = {"baseline": model_file(baseline).parent, "candidate": model_file(candidate).parent}
    configs = {role: read_config(folder)["model"] for role, folder in folders.items()}
    vocabulary, context = (min(config[key] for config in configs.values()) for key in ("vocab_size", "context_length"))
    ids = list(prompt or np.random.default_rng(0).integers(0, vocabulary, prompt_tokens).tolist())[:prompt_tokens]
    if len(ids) + new_tokens > context:
        raise ValueError(f"prompt_tokens + new_tokens must fit the context of {context} tokens, got {len(ids)} + {new_tokens}. Choose smaller numbers.")
    passes = _PASSES[runtime](folders, ids, new_tokens, threads, library)
    samples, waits, known = [], [], _waited() is not None
    for number in range(-1, pairs):
        order = list(folders) if number % 2 else list(folders)[::-1]
        pair: dict[str, tuple[float, float]] = {}
        start, before = time.perf_counter(), _waited()
        for role in order:
            pair[role] = passes[role]()
        wall, after = time.perf_counter() - start, _waited()
        if number >= 0:
            samples.append({role: {"prefill_s": pair[role][0], "decode_s": pair[role][1]} for role in folders})
            waits.append(0.0 if before is None or after is None else (after - before) / wall)
            if progress:
                progress(number + 1)
    quiet = [sample for sample, wait in zip(samples, waits, strict=True) if wait <= MAX_WAIT]
    note = "measured" if known else "not measured: no schedstat on this machine"
    if not quiet:
        note = f"in every pair threads waited for a CPU over {MAX_WAIT:.0%} of the time: all pairs are kept, do not quote these numbers"
        logging.getLogger("sparsegate").warning("bench: %s", note)
    samples, dropped = quiet or samples, len(samples) - len(quiet or samples)
    counts = {"prefill": len(ids), "decode": new_tokens}
    result: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "command": command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": {
            "runtime": runtime,
            "threads": threads,
            "prompt_tokens": len(ids),
            "new_tokens": new_tokens,
            "pairs": pairs,
            "prompt": "given" if prompt else "random",
        },
    }
    for role, folder in folders.items():
        provider = _provider(folder)
        rates = {f"{phase}_tokens_per_s": count / statistics.median(sample[role][f"{phase}_s"] for sample in samples) for phase, count in counts.items()}
        result[role] = {
            "path": str(folder),
            "precision": precision(folder),
            "executor": str(choose(folder, [provider], library)),
            "provider": provider,
            **rates,
        }
    for phase in counts:
        result[phase] = _ratio([sample["baseline"][f"{phase}_s"] / sample["candidate"][f"{phase}_s"] for sample in samples])
    return {**result, "samples": samples, "dropped": dropped, "quiet": bool(quiet) if known else None, "waits": note}


def precision(path: str | Path) -> dict[str, Any]:
    """The formats of a model's weights: bytes per format over all initialisers, and the variants of the ai.sparsegate ops."""
    import onnx

    sizes: dict[str, int] = {}
    model = onnx.load(str(model_file(path)), load_external_data=False)
    for tensor in model.graph.initializer:
        name, bits = _FORMATS.get(onnx.TensorProto.DataType.Name(tensor.data_type), ("other", 8))
        sizes[name] = sizes.get(name, 0) + math.prod(tensor.dims) * bits // 8
    quantised = sorted(
        {f"int{attribute.i}" for node in model.graph.node if node.op_type == "MatMulNBits" for attribute in node.attribute if attribute.name == "bits"}
    )
    return {"bytes": sizes, "matmul_nbits": quantised, "variants": variants(path)}


def machine() -> dict[str, Any]:
    """This machine: processor, CPUs this process may use, memory, system."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    model = f"{fields.get('model name', platform.processor())} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cpus": cpus, "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "system": platform.platform()}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter, and the commit of a source tree that runs in place."""
    found: dict[str, str | None] = {"python": platform.python_version(), "commit": _commit()}
    for name in ("sparsegate", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _provider(folder: Path) -> str:
    return config_provider(read_config(folder))


def _plain(folders: dict[str, Path], ids: list[int], new_tokens: int, threads: int | None, library: bool | None) -> dict[str, Pass]:
    import onnxruntime

    decoders = {}
    for role, folder in folders.items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        for key, value in _SINGLE.items():
            options.add_session_config_entry(key, value)
        decoders[role] = Decoder(folder, list(dict.fromkeys([_provider(folder), PROVIDERS[0]])), options, library)
    following = [int(decoders["baseline"](ids)[-1].argmax())]
    while len(following) < new_tokens:
        following.append(int(decoders["baseline"](following[-1:])[-1].argmax()))

    def run(decoder: Decoder) -> tuple[float, float]:
        decoder.reset()
        start = time.perf_counter()
        decoder(ids)
        middle = time.perf_counter()
        for token in following:
            decoder([token])
        return middle - start, time.perf_counter() - middle

    return {role: lambda decoder=decoder: run(decoder) for role, decoder in decoders.items()}


def _genai(folders: dict[str, Path], ids: list[int], new_tokens: int, threads: int | None, library: bool | None) -> dict[str, Pass]:
    models = {role: load(folder, library, {**_SINGLE, **({"intra_op_num_threads": threads} if threads else {})}) for role, folder in folders.items()}
    import onnxruntime_genai

    def generator(model: Any) -> Any:
        parameters = onnxruntime_genai.GeneratorParams(model)
        length = len(ids) + new_tokens
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        return onnxruntime_genai.Generator(model, parameters)

    first = generator(models["baseline"])
    first.append_tokens(ids)
    while not first.is_done():
        first.generate_next_token()
    following = [int(token) for token in first.get_sequence(0)[len(ids) :]]

    def run(model: Any) -> tuple[float, float]:
        current = generator(model)
        start = time.perf_counter()
        current.append_tokens(ids)
        middle = time.perf_counter()
        for token in following:
            current.append_tokens([token])
        return middle - start, time.perf_counter() - middle

    return {role: lambda model=model: run(model) for role, model in models.items()}


_PASSES = {"onnxruntime": _plain, "onnxruntime-genai": _genai}


def _ratio(ratios: list[float]) -> dict[str, Any]:
    median = statistics.median(ratios)
    verdict = "faster" if median > 1 else "not faster"
    return {"ratio": median, "lowest": min(ratios), "highest": max(ratios), "verdict": verdict}


def _waited() -> float | None:
    """Seconds that this process's threads have waited for a CPU so far, in all; None where the kernel does not tell."""
    waits = []
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waits.append(int(file.read_text().split()[1]))  # run ns, wait ns, timeslices
        except (OSError, ValueError, IndexError):
            continue  # the thread has just ended
    return sum(waits) * 1e-9 if waits else None


def _commit() -> str | None:
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

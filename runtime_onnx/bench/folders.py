"""Times two existing ONNX folders back to back: prefill and decode in tokens per second, as a ratio with everything
needed to judge it.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..genai_config import read_config
from ..generate import config_provider, load
from ..library import PROVIDERS, model_file, variants
from ..session import Decoder, choose
from .record import record
from .samples import MAX_WAIT, Round, compare, rounds, waited

_SINGLE = {"session.force_spinning_stop": "1"}  # idle workers of the other model must not spin while this one runs
MOST_THREADS = 1 << 10
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
        prompt: Token ids to prefill; by default `prompt_tokens` seeded random ids. Text like the model's own gives
        densities like those in use.
        prompt_tokens: Length of the prompt; a given prompt is cut to it, never stretched.
        new_tokens: Tokens decoded after the prompt, one at a time; both models get the baseline's greedy tokens.
        pairs: Pairs to time, after one pair that is not counted.
        runtime: "onnxruntime" (plain KV-cache loop) or "onnxruntime-genai".
        threads: Threads within an op; the runtime's own choice by default.
        library: As in `session`, for both models.
        command: What to record as the command; this process's own by default.
        progress: Called with the number of finished pairs.

    Returns:
        JSON-ready: "machine", "versions", "command", "settings"; "baseline" and "candidate" (path, precision, executor,
        median tokens per second);
        "prefill" and "decode" (ratio = candidate / baseline, quartiles, range, a verdict); "samples" that count
        (seconds), number of "dropped" pairs;
        "quiet" (None: waiting cannot be measured; False: every pair was disturbed, all count, nothing to quote), and
        "waits", the same in words.

    Raises:
        ValueError: A folder cannot be opened, or a number is out of range.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime must be {' or '.join(RUNTIMES)}, got {runtime!r}. Choose one of them.")
    for name, value, least in (
        ("pairs", pairs, 1),
        ("new_tokens", new_tokens, 1),
        ("prompt_tokens", prompt_tokens, 1),
        ("threads", threads or 1, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}. Choose a larger number.")
    if threads is not None and threads > MOST_THREADS:
        raise ValueError(f"threads must be at most {MOST_THREADS}, got {threads}. Choose a smaller number.")
    folders = {"baseline": model_file(baseline).parent, "candidate": model_file(candidate).parent}
    configs = {role: read_config(folder)["model"] for role, folder in folders.items()}
    if missing := [role for role, config in configs.items() if config.get("vocab_size", 0) < 1]:
        raise InputError(
            f"genai_config.json of {folders[missing[0]]} must have a vocab_size, got none. Convert or download the "
            "folder again."
        )
    vocabulary, context = (min(config[key] for config in configs.values()) for key in ("vocab_size", "context_length"))
    count = min(len(prompt), prompt_tokens) if prompt else prompt_tokens
    if count + new_tokens > context:
        raise ValueError(
            f"prompt_tokens + new_tokens must fit the context of {context} tokens, got {count} + {new_tokens}. Choose "
            "smaller numbers."
        )
    ids = list(prompt or np.random.default_rng(0).integers(0, vocabulary, prompt_tokens).tolist())[:prompt_tokens]
    opened = {role: RUNTIMES[runtime](folder, threads, library) for role, folder in folders.items()}
    following = opened["baseline"].greedy(ids, new_tokens)
    found = rounds(
        {role: lambda model=model: model.run(ids, following) for role, model in opened.items()},
        pairs,
        progress=progress,
    )
    samples, quiet, note = clean(found)
    result: dict[str, Any] = {
        **record(command),
        "settings": {
            "runtime": runtime,
            "threads": threads,
            "prompt_tokens": len(ids),
            "new_tokens": new_tokens,
            "pairs": pairs,
            "prompt": "given" if prompt else "random",
        },
    }
    counts = {"prefill": len(ids), "decode": new_tokens}
    for role, folder in folders.items():
        rates = {
            f"{phase}_tokens_per_s": count / statistics.median(sample[role][f"{phase}_s"] for sample in samples)
            for phase, count in counts.items()
        }
        result[role] = describe(folder, library) | rates
    for phase in counts:
        result[phase] = compare(*([sample[role][f"{phase}_s"] for sample in samples] for role in folders))
    return {**result, "samples": samples, "dropped": len(found) - len(samples), "quiet": quiet, "waits": note}


def clean(found: Sequence[Round[tuple[float, float]]]) -> tuple[list[dict[str, dict[str, float]]], bool | None, str]:
    """The undisturbed rounds as samples in seconds, or all where none is; whether there are any (None: not known); and
    the same in words.
    """
    quiet = [entry for entry in found if entry.quiet(*entry.values)]
    known = waited() is not None
    note = "measured" if known else "not measured: no schedstat on this machine"
    if not quiet:
        note = (
            f"in every pair threads waited for a CPU over {MAX_WAIT:.0%} of the time: all pairs are kept, do not "
            "quote these numbers"
        )
        logging.getLogger("sparsegate").warning("bench: %s", note)
    samples = [
        {role: {"prefill_s": prefill, "decode_s": decode} for role, (prefill, decode) in sorted(entry.values.items())}
        for entry in quiet or found
    ]
    return samples, bool(quiet) if known else None, note


def describe(folder: Path, library: bool | None = None) -> dict[str, Any]:
    """What an ONNX folder holds and what would run it."""
    provider = config_provider(read_config(folder))
    return {
        "path": str(folder),
        "precision": precision(folder),
        "executor": str(choose(folder, [provider], library)),
        "provider": provider,
    }


def precision(path: str | Path) -> dict[str, Any]:
    """The formats of a model's weights: bytes per format over all initialisers, and the variants of the ai.sparsegate
    ops.
    """
    import onnx

    sizes: dict[str, int] = {}
    model = onnx.load(str(model_file(path)), load_external_data=False)
    for tensor in model.graph.initializer:
        name, bits = _FORMATS.get(onnx.TensorProto.DataType.Name(tensor.data_type), ("other", 8))
        sizes[name] = sizes.get(name, 0) + math.prod(tensor.dims) * bits // 8
    quantised = sorted(
        {
            f"int{attribute.i}"
            for node in model.graph.node
            if node.op_type == "MatMulNBits"
            for attribute in node.attribute
            if attribute.name == "bits"
        }
    )
    return {"bytes": sizes, "matmul_nbits": quantised, "variants": variants(path)}


class Plain:
    """An ONNX folder in plain onnxruntime."""

    def __init__(self, folder: Path, threads: int | None, library: bool | None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        for key, value in _SINGLE.items():
            options.add_session_config_entry(key, value)
        self._decoder = Decoder(
            folder, list(dict.fromkeys([config_provider(read_config(folder)), PROVIDERS[0]])), options, library
        )

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` likeliest tokens after `ids`, one after another."""
        self._decoder.reset()
        tokens = [int(self._decoder(ids)[-1].argmax())]
        while len(tokens) < count:
            tokens.append(int(self._decoder(tokens[-1:])[-1].argmax()))
        return tokens

    def run(self, ids: Sequence[int], following: Sequence[int]) -> tuple[float, float]:
        """Seconds of the prompt `ids` in one call, and of the tokens `following` in one call each."""
        self._decoder.reset()
        start = time.perf_counter()
        self._decoder(ids)
        middle = time.perf_counter()
        for token in following:
            self._decoder([token])
        return middle - start, time.perf_counter() - middle


class Genai:
    """An ONNX folder in onnxruntime-genai; methods as in `Plain`."""

    def __init__(self, folder: Path, threads: int | None, library: bool | None) -> None:
        self._model = load(folder, library, {**_SINGLE, **({"intra_op_num_threads": threads} if threads else {})})

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """As in `Plain`."""
        generator = self._generator(len(ids) + count)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(ids) :]]

    def run(self, ids: Sequence[int], following: Sequence[int]) -> tuple[float, float]:
        """As in `Plain`."""
        generator = self._generator(len(ids) + len(following))
        start = time.perf_counter()
        generator.append_tokens(ids)
        middle = time.perf_counter()
        for token in following:
            generator.append_tokens([token])
        return middle - start, time.perf_counter() - middle

    def _generator(self, length: int) -> Any:
        import onnxruntime_genai

        parameters = onnxruntime_genai.GeneratorParams(self._model)  # pyright: ignore[reportAttributeAccessIssue]
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        return onnxruntime_genai.Generator(self._model, parameters)  # pyright: ignore[reportAttributeAccessIssue]


RUNTIMES: dict[str, Callable[[Path, int | None, bool | None], Plain | Genai]] = {
    "onnxruntime": Plain,
    "onnxruntime-genai": Genai,
}

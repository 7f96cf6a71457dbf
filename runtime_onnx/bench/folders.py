"""Times two existing ONNX folders back to back: prefill and decode in tokens per second, as a ratio with everything
needed to judge it.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class BenchTiming:
    """How models are timed.

    Attributes:
        prompt_tokens: Length of the prompt; a given prompt is cut to it, never stretched.
        new_tokens: Tokens decoded after the prompt, one at a time.
        pairs: Pairs of two models, rounds of more, after one that is not counted.
        threads: Threads within an op; the runtime's own choice by default.
    """

    prompt_tokens: int = 128
    new_tokens: int = 64
    pairs: int = 7
    threads: int | None = None

    def check(self) -> None:
        """Raises InputError for a number out of range."""
        for name, value in (
            ("pairs", self.pairs),
            ("new_tokens", self.new_tokens),
            ("prompt_tokens", self.prompt_tokens),
            ("threads", self.threads or 1),
        ):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}. Choose a larger number.")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise InputError(f"threads must be at most {MOST_THREADS}, got {self.threads}. Choose a smaller number.")


def bench(
    baseline: str | Path,
    candidate: str | Path,
    timing: BenchTiming | None = None,
    prompt: Sequence[int] | None = None,
    runtime: str = "onnxruntime",
    library: bool | None = None,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Times `candidate` against `baseline`; both are ONNX folders or sparse checkpoints with a genai_config.json.

    Args:
        baseline: Usually the dense model.
        candidate: Usually the sparse one; it decodes the baseline's greedy tokens.
        timing: How many tokens, pairs and threads.
        prompt: Token ids to prefill; by default seeded random ids. Text like the model's own gives densities like those
            in use.
        runtime: "onnxruntime" (plain KV-cache loop) or "onnxruntime-genai".
        library: As in `session`, for both models.
        command: What to record as the command; this process's own by default.
        progress: Called with the number of finished pairs.

    Returns:
        JSON-ready: "machine", "versions", "command", "settings"; "baseline" and "candidate" (path, precision, executor,
        median tokens per second); "prefill" and "decode" (ratio = candidate / baseline, quartiles, range, a verdict);
        "samples" that count (seconds), number of "dropped" pairs; "quiet" (None: waiting cannot be measured; False:
        every pair was disturbed, all count, nothing to quote), and "waits", the same in words.

    Raises:
        InputError: A folder cannot be opened, or a number is out of range.
    """
    timing = timing or BenchTiming()
    if runtime not in RUNTIMES:
        raise InputError(f"runtime must be {' or '.join(RUNTIMES)}, got {runtime!r}. Choose one of them.")
    timing.check()
    folders = {"baseline": model_file(baseline).parent, "candidate": model_file(candidate).parent}
    ids = _prompt(folders, timing, prompt)
    opened = {role: RUNTIMES[runtime](folder, timing.threads, library) for role, folder in folders.items()}
    following = opened["baseline"].greedy(ids, timing.new_tokens)
    timed = rounds(
        {role: lambda model=model: model.run(ids, following) for role, model in opened.items()},
        timing.pairs,
        progress=progress,
    )
    samples, quiet, note = clean(timed)
    settings = {
        "runtime": runtime,
        "threads": timing.threads,
        "prompt_tokens": len(ids),
        "new_tokens": timing.new_tokens,
        "pairs": timing.pairs,
        "prompt": "given" if prompt else "random",
    }
    speeds = _speeds(folders, samples, {"prefill": len(ids), "decode": timing.new_tokens}, library)
    ending = {"samples": samples, "dropped": len(timed) - len(samples), "quiet": quiet, "waits": note}
    return {**record(command), "settings": settings, **speeds, **ending}


def _prompt(folders: Mapping[str, Path], timing: BenchTiming, prompt: Sequence[int] | None) -> list[int]:
    """Ids to prefill: the beginning of `prompt`, or random ones that both models have. Raises InputError for a folder
    without a vocabulary, ValueError for more tokens than fit the context.
    """
    configs = {role: read_config(folder)["model"] for role, folder in folders.items()}
    if missing := [role for role, config in configs.items() if config.get("vocab_size", 0) < 1]:
        raise InputError(
            f"genai_config.json of {folders[missing[0]]} must have a vocab_size, got none. Convert or download the "
            "folder again."
        )
    vocabulary, context = (min(config[key] for config in configs.values()) for key in ("vocab_size", "context_length"))
    count = min(len(prompt), timing.prompt_tokens) if prompt else timing.prompt_tokens
    if count + timing.new_tokens > context:
        raise InputError(
            f"prompt_tokens + new_tokens must fit the context of {context} tokens, got {count} + {timing.new_tokens}. "
            "Choose smaller numbers."
        )
    return list(prompt or np.random.default_rng(0).integers(0, vocabulary, count).tolist())[:count]


def _speeds(
    folders: Mapping[str, Path],
    samples: Sequence[Mapping[str, Mapping[str, float]]],
    counts: Mapping[str, int],
    library: bool | None,
) -> dict[str, Any]:
    """Each folder with its tokens per second, and the comparison of each phase; `counts` are the tokens of a phase."""
    speeds: dict[str, Any] = {}
    for role, folder in folders.items():
        rates = {
            f"{phase}_tokens_per_s": count / statistics.median(sample[role][f"{phase}_s"] for sample in samples)
            for phase, count in counts.items()
        }
        speeds[role] = describe(folder, library) | rates
    for phase in counts:
        speeds[phase] = compare(*([sample[role][f"{phase}_s"] for sample in samples] for role in folders))
    return speeds


def clean(timed: Sequence[Round[tuple[float, float]]]) -> tuple[list[dict[str, dict[str, float]]], bool | None, str]:
    """The undisturbed rounds as samples in seconds, or all where none is; whether there are any (None: not known); and
    the same in words.
    """
    quiet = [entry for entry in timed if entry.quiet(*entry.values)]
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
        for entry in quiet or timed
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

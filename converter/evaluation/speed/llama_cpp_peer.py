"""llama.cpp, through the low-level functions of llama-cpp-python: what is timed is `llama_decode` alone, no sampling
and no text.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....runtime_onnx.errors import InputError


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _silent(level: int, text: bytes, data: Any) -> None:
    """llama.cpp's log goes nowhere."""


class Llama:
    """A GGUF file, mapped, on the CPU with a given number of threads for prompts and tokens alike."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        from llama_cpp import llama_cpp

        self._library: Any = llama_cpp
        library = self._library
        library.llama_log_set(_silent, ctypes.c_void_p(0))
        library.llama_backend_init()
        wishes = library.llama_model_default_params()
        wishes.n_gpu_layers = 0
        wishes.use_mmap = True
        self._model = library.llama_model_load_from_file(str(path).encode(), wishes)
        if not self._model:
            raise InputError(
                f"{path} must be a GGUF file that llama.cpp {_version()} opens, got one it refuses. Bench without this "
                "peer."
            )
        settings = library.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, context, min(context, 512)
        settings.n_threads = settings.n_threads_batch = threads
        self._context = library.llama_init_from_model(self._model, settings)
        if not self._context:
            raise InputError(f"llama.cpp must get memory for {context} tokens, got none. Use fewer tokens.")

    def run(self, ids: Sequence[int], following: Sequence[int]) -> tuple[float, float]:
        """Seconds of the prompt `ids` in one call, and of the tokens `following` in one call each."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        prompt = (ctypes.c_int32 * len(ids))(*ids)
        single = [(ctypes.c_int32 * 1)(token) for token in following]
        start = time.perf_counter()
        self._decode(prompt, len(ids))
        middle = time.perf_counter()
        for token in single:
            self._decode(token, 1)
        return middle - start, time.perf_counter() - middle

    def _decode(self, tokens: Any, count: int) -> None:
        status = self._library.llama_decode(self._context, self._library.llama_batch_get_one(tokens, count))
        self._library.llama_synchronize(self._context)
        if status:
            raise InputError(f"llama.cpp must decode {count} tokens, got status {status}. Use fewer tokens.")

    def all_logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [T, V] of the tokens `ids` [T] in one call. Raises InputError where they do not fit the context."""
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        batch = library.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for at, token in enumerate(ids):
                batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = (
                    token,
                    at,
                    1,
                    0,
                    1,
                )
            if status := library.llama_decode(self._context, batch):
                raise InputError(f"llama.cpp must decode {len(ids)} tokens, got status {status}. Use fewer tokens.")
            vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
            return np.ctypeslib.as_array(library.llama_get_logits(self._context), (len(ids), vocabulary)).copy()
        finally:
            library.llama_batch_free(batch)

    def logits(self, count: int) -> list[float]:
        """The first `count` logits of the last token."""
        return [float(value) for value in self._library.llama_get_logits(self._context)[:count]]

    def close(self) -> None:
        """Gives the memory back."""
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)


def quantise(path: Path, out: Path, form: str = "Q4_0") -> Path:
    """Write the GGUF file `path` in llama.cpp's own mixture of the format `form`; values that are quantised already are
    rounded again.

    Raises InputError for a format that llama.cpp does not have and for a file that it refuses.
    """
    from llama_cpp import llama_cpp

    library: Any = llama_cpp
    library.llama_log_set(_silent, ctypes.c_void_p(0))
    library.llama_backend_init()
    settings = library.llama_model_quantize_default_params()
    kind = getattr(library, f"LLAMA_FTYPE_MOSTLY_{form}", None)
    if kind is None:
        raise InputError(f"The format must be one of llama.cpp's, such as Q4_0, got {form}. Choose another.")
    settings.ftype, settings.allow_requantize = kind, True
    partial = out.with_name(f"{out.name}.partial")
    status = library.llama_model_quantize(str(path).encode(), str(partial).encode(), settings)
    if status:
        partial.unlink(missing_ok=True)
        raise InputError(
            f"{path} must be a GGUF file that llama.cpp {_version()} quantises, got status {status}. Give another file."
        )
    return partial.replace(out)


def _version() -> str:
    from importlib.metadata import version

    return version("llama-cpp-python")

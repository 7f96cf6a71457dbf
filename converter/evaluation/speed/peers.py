"""Who stands beside the sparse model: a table of runtimes, how each is opened, and why one is not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ....runtime_onnx.bench.folders import RUNTIMES
from ....runtime_onnx.bench.op_timer import Peer
from ....runtime_onnx.library import forced_isa
from .shapes import Shape

MLP_PEERS = {"fp32": ("fp32", "fp32, fp16 predictor"), "bf16": ("fp16", "bf16")}
"""Precision of torch's MLP -> formats of the op that it stands beside."""


class Model(Protocol):
    """An opened model: seconds of a prompt in one call, and of single tokens after it."""

    def run(self, ids: list[int], following: list[int]) -> tuple[float, float]:
        """As above."""
        ...


@dataclass(frozen=True)
class Runtime:
    """A runtime.

    Attributes:
        packages: What must be installed, as import name and as what pip calls it.
        timed: What lies between the clock's readings.
        open: (path, threads, precision, tokens in all) -> Model.
    """

    packages: tuple[tuple[str, str], ...]
    timed: str
    open: Callable[[Path, int, str, int], Any]

    def missing(self) -> str | None:
        """The line "not installed: ...", or None."""
        lacking = [pip for module, pip in self.packages if find_spec(module) is None]
        return f"not installed: {', '.join(lacking)}" if lacking else None


def _ours(name: str) -> Callable[[Path, int, str, int], Any]:
    return lambda path, threads, precision, tokens: RUNTIMES[name](path, threads, None)


class _Avx2:
    """An ONNX folder in onnxruntime-genai with sparsegate's kernels forced to AVX2; ONNX Runtime's own use what the
    machine has.
    """

    def __init__(self, path: Path, threads: int) -> None:
        with forced_isa("avx2"):
            self._model = RUNTIMES["onnxruntime-genai"](path, threads, None)

    def run(self, ids: list[int], following: list[int]) -> tuple[float, float]:
        """As in `Model`."""
        with forced_isa("avx2"):
            return self._model.run(ids, following)


def _llama(path: Path, threads: int, precision: str, tokens: int) -> Any:
    from .llama_cpp_peer import Llama

    return Llama(path, threads, tokens)


def _torch(path: Path, threads: int, precision: str, tokens: int) -> Any:
    from .torch_peer import Torch

    return Torch(path, threads, precision)


OPENERS = {
    "onnxruntime": Runtime(
        (("onnxruntime", "onnxruntime"),), "InferenceSession.run with bound inputs and outputs", _ours("onnxruntime")
    ),
    "onnxruntime-genai": Runtime(
        (("onnxruntime_genai", "onnxruntime-genai"),),
        "Generator.append_tokens, without a search",
        _ours("onnxruntime-genai"),
    ),
    "onnxruntime-genai, AVX2": Runtime(
        (("onnxruntime_genai", "onnxruntime-genai"),),
        "as above, sparsegate's kernels alone forced to AVX2",
        lambda path, threads, precision, tokens: _Avx2(path, threads),
    ),
    "llama.cpp": Runtime(
        (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")),
        "llama_decode, the prompt in one call with logits of its last token",
        _llama,
    ),
    "torch": Runtime(
        (("torch", "torch"),), "the transformers model with a DynamicCache, logits of the last token", _torch
    ),
}
"""Runtimes by name."""


def prepare(
    shape: Shape, layers: int | None, precision: str, checkpoint: Path, work: Path
) -> dict[str, tuple[str, Path, str]]:
    """The peers' models of a shape: role -> (runtime, path, format). The path of one that is not installed
    is not made.
    """
    from .gguf_file import FORMATS, write_gguf

    form = FORMATS[precision].name
    gguf = work / f"{form}.gguf"
    if OPENERS["llama.cpp"].missing() is None and not gguf.is_file():
        write_gguf(shape, gguf, precision, layers)
    half = "fp32" if precision == "fp32" else "bf16"
    return {f"llama.cpp {form}": ("llama.cpp", gguf, form), f"torch {half}": ("torch", checkpoint, half)}


def mlp_peers() -> list[Peer]:
    """Torch's dense MLPs, for the op."""
    from .torch_peer import open_mlp

    return [
        Peer(
            f"torch {precision}",
            forms,
            lambda weights, threads, precision=precision: open_mlp(weights, threads, precision),
        )
        for precision, forms in MLP_PEERS.items()
    ]

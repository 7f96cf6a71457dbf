"""Runs sparse checkpoints in ONNX Runtime.

onnxruntime is needed only when a model is opened and onnxruntime-genai only to generate: see the extras [cpu] and
[gpu]. The functions `session`, `generate` and `link` have the names of their modules; reach other things there with
`from sparsegate.runtime_onnx.session import ...`.
"""

from __future__ import annotations

from .generate import Sampling, end_tokens, generate, load
from .library import Executor, executor, library_path
from .link import link, unlink
from .session import Decoder, session
from .text import Tokenizer

__all__ = [
    "Decoder",
    "Executor",
    "Sampling",
    "Tokenizer",
    "end_tokens",
    "executor",
    "generate",
    "library_path",
    "link",
    "load",
    "session",
    "unlink",
]

"""A debug copy of an exported graph that shows what enters and leaves every op of ai.sparsegate, and what leaves the
graph.

The copy lives in memory and reads the weights of the file beside it. Ops and their inputs are the file's own; only
outputs are added.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from ...runtime_onnx.errors import explained
from ...runtime_onnx.library import library_path
from ...runtime_onnx.ops.gated_mlp import DOMAIN
from ..onnx_export.base_graph import MODEL
from ..onnx_export.matmul_nbits import FOLDER_ENTRY, keep_activations


class Seen(NamedTuple):
    """What an op read and wrote, token by token: x [T, d_in], y [T, d_out]."""

    x: NDArray
    y: NDArray


class WatchedGraph:
    """A session on the debug copy of `folder`'s graph, fed token by token or in one piece.

    Attributes:
        ops: (input, output) tensor names of every ai.sparsegate op by node name.

    With `float_activations` MatMulNBits leaves its activations in float32; the ops of ai.sparsegate stay as they are.
    """

    def __init__(
        self, folder: Path, library: bool, providers: list[str] | None = None, float_activations: bool = False
    ) -> None:
        """Opens the copy, with the native library's kernels or, without `library`, with the ops' bodies in standard
        ops.
        """
        import onnxruntime

        proto = onnx.load(folder / MODEL, load_external_data=False)
        nodes = [node for node in proto.graph.node if node.domain == DOMAIN]
        self.ops: dict[str, tuple[str, str]] = {node.name: (node.input[0], node.output[0]) for node in nodes}
        _expose(proto, [name for pair in self.ops.values() for name in pair])
        if float_activations:
            keep_activations(proto)
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(FOLDER_ENTRY, str(folder))
        if library:
            options.register_custom_ops_library(str(library_path()))
        with explained(str(folder / MODEL)):
            self.session = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=providers or ["CPUExecutionProvider"]
            )
        self._file = folder / MODEL

    def run(self, tokens: NDArray[np.int64], single: int = 0) -> tuple[dict[str, Seen], NDArray[np.float32]]:
        """What every op saw of one sequence of tokens [T], and its logits [T, vocabulary].

        The last `single` tokens are fed one by one through the cache, as decoding does.
        """
        cuts = [0, *range(len(tokens) - single, len(tokens) + 1)]
        cache: Mapping[str, NDArray] = {}
        parts: list[dict[str, NDArray]] = []
        for begin, end in zip(cuts, cuts[1:], strict=False):
            if begin == end:
                continue
            parts.append(self._call(tokens[begin:end], begin, cache))
            cache = {name: value for name, value in parts[-1].items() if name.startswith("present.")}

        def joined(name: str) -> NDArray:
            return np.concatenate([part[name].reshape(-1, part[name].shape[-1]) for part in parts])

        seen = {name: Seen(joined(x), joined(y)) for name, (x, y) in self.ops.items()}
        return seen, joined("logits").astype(np.float32)

    def _call(self, tokens: NDArray[np.int64], before: int, cache: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """All outputs for `tokens` after `before` others, whose keys and values `cache` holds."""
        feeds: dict[str, Any] = {}
        for entry in self.session.get_inputs():
            if entry.name.startswith("past_key_values."):
                empty = np.zeros(
                    (1, entry.shape[1], 0, entry.shape[3]),
                    np.float16 if entry.type == "tensor(float16)" else np.float32,
                )
                feeds[entry.name] = cache.get(entry.name.replace("past_key_values.", "present."), empty)
        inputs = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, before + len(tokens)), np.int64),
            "position_ids": np.arange(before, before + len(tokens), dtype=np.int64)[None],
        }
        names = [entry.name for entry in self.session.get_inputs()]
        feeds |= {name: value for name, value in inputs.items() if name in names}
        outputs = [entry.name for entry in self.session.get_outputs()]
        with explained(str(self._file)):
            return {
                name: np.asarray(value) for name, value in zip(outputs, self.session.run(outputs, feeds), strict=True)
            }


def _expose(proto: onnx.ModelProto, names: list[str]) -> None:
    """Make tensors outputs of the graph, each once."""
    known = {value.name: value for value in proto.graph.value_info}
    shown = {value.name for value in proto.graph.output}
    for name in dict.fromkeys(names):
        if name not in shown:
            proto.graph.output.append(known.get(name, onnx.ValueInfoProto(name=name)))

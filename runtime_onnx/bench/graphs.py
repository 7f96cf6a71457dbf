"""What can be read off an ONNX folder beside its speed: bytes that a token needs, the density that its thresholds give,
and where a token's time goes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from ..errors import InputError
from ..genai_config import read_config
from ..library import PROVIDERS, library_path, model_file
from ..ops import gated_mlp, sparse_linear
from ..ops.activation import cuts_up
from ..session import Decoder, choose

_BY_ROW = ("Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding", "MultiHeadAttention")
"""Ops of which a token reads a row of a table, or no weight."""
MLP = "/mlp/"
"""Part of the names that the builder gives to a feed-forward network's nodes."""


class NeuronShares(NamedTuple):
    """Of a GatedMLP's neurons: what the score keeps, and whose up and whose down rows are read. With activations that
    have no zeros all are the same.
    """

    kept: float
    opened: float
    nonzero: float


def token_bytes(path: str | Path, density: Mapping[str, NeuronShares | float] | None = None) -> float:
    """Bytes of weights that one decoded token must read; `density` is the kept share by name of an ai.sparsegate node,
    1 where it is not given.

    Tables that are read by rows (embedding, rotation) and the cache of keys and values are not counted.
    """
    total, counted = 0.0, set()
    for node in ir.load(model_file(path)).graph:
        if node.op_type in _BY_ROW:
            continue
        if node.domain == gated_mlp.DOMAIN:
            total += _op_bytes(node, (density or {}).get(node.name or "", 1.0))
            continue
        for value in node.inputs:
            if value is not None and value.const_value is not None and value.name not in counted:
                counted.add(value.name)
                total += value.const_value.nbytes
    return total


def _op_bytes(node: ir.Node, density: NeuronShares | float) -> float:
    """The op's `traffic`, from the node's attributes and the shapes of its inputs."""
    roles = node.attributes["inputs"].as_string().split()
    shapes = {role: _shape(value) for role, value in zip(roles, node.inputs[1:], strict=True)}
    variant = _variant(node, roles)
    shares = density if isinstance(density, NeuronShares) else NeuronShares(density, density, density)
    if isinstance(variant, sparse_linear.Variant):
        rows, columns = shapes["w"]
        return sparse_linear.traffic(variant, rows, columns * (2 if variant.weights == "int4_g32" else 1), shares.kept)
    n, columns = shapes["w_up"]
    return gated_mlp.traffic(
        variant, columns * (2 if variant.weights == "int4_g32" else 1), n, shapes.get("p1", (0,))[0], *shares
    )


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    assert value is not None and value.const_value is not None
    return tuple(int(size) for size in value.const_value.shape.numpy())


def _variant(node: ir.Node, roles: Sequence[str]) -> gated_mlp.Variant | sparse_linear.Variant:
    def dtype(role: str, otherwise: str = "float32") -> str:
        initializer = next((value for name, value in zip(roles, node.inputs[1:], strict=True) if name == role), None)
        return (
            otherwise
            if initializer is None or initializer.const_value is None
            else initializer.const_value.dtype.numpy().name
        )

    weights = node.attributes["weights"].as_string()
    if node.op_type == sparse_linear.NAME:
        return sparse_linear.Variant(weights, tuple(roles), w=dtype("w") if weights == "float" else "float32")
    activation, score = (node.attributes[name].as_string() for name in ("activation", "score"))
    return gated_mlp.Variant(
        activation, score, weights, tuple(roles), w=dtype("w_up") if weights == "float" else "float32", p=dtype("p1")
    )


def mlp_inputs(path: str | Path, ids: Sequence[int], library: bool | None = None) -> dict[str, NDArray]:
    """Inputs x [T, d] of every GatedMLP node that does not keep everything, by its name, read out of a run on the
    tokens `ids` in one call on the CPU.
    """
    import onnxruntime

    file = model_file(path)
    model = onnx.load(str(file), load_external_data=False)
    taps = {name: str(node.inputs[0].name) for name, node in _gated(file).items() if node.inputs[0] is not None}
    if not taps:
        return {}
    known = {entry.name for entry in model.graph.output}
    model.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in dict.fromkeys(taps.values()) if name not in known
    )
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent.resolve()))
    if choose(file, PROVIDERS[:1], library).kernel:
        options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=PROVIDERS[:1])
    head = read_config(file)["model"]["decoder"]["head_size"]
    values = [np.asarray(value) for value in session.run(list(taps.values()), _feeds(session, ids, head))]
    return {name: value.reshape(-1, value.shape[-1]) for name, value in zip(taps, values, strict=True)}


def realised(path: str | Path, ids: Sequence[int], library: bool | None = None) -> dict[str, NeuronShares]:
    """The shares of every GatedMLP node that does not keep everything, over the tokens `ids` in one call: its reference
    decides, rounded as the kernel rounds where scores are compared with thresholds.
    """
    file = model_file(path)
    nodes, integer = _gated(file), choose(file, PROVIDERS[:1], library).kernel
    shares: dict[str, NeuronShares] = {}
    for name, x in mlp_inputs(path, ids, library).items():
        variant, tensors = _read(nodes[name])
        kept = gated_mlp.active(variant, x, tensors, integer=integer and not variant.exact)
        opened = nonzero = kept
        if gated_mlp.is_relu(variant.activation):
            gate, z = gated_mlp.parts(variant, x, tensors)
            opened, nonzero = (gate != 0) & (kept | variant.exact), (z != 0) & kept
        shares[name] = NeuronShares(*(float(share.mean()) for share in (kept, opened, nonzero)))
    return shares


def set_density(path: str | Path, rows: Sequence[Sequence[int]], density: float, library: bool | None = None) -> None:
    """Rewrites the thresholds of an ONNX folder's GatedMLP nodes so that each neuron is kept for this share of the
    tokens of `rows`, as the model now feeds it.

    For models of random weights only: a trained model's thresholds are its method's. Raises InputError for thresholds
    that do not lie in the data file.
    """
    file = model_file(path)
    nodes = _gated(file)
    inputs = [mlp_inputs(path, ids, library) for ids in rows]
    for name, node in nodes.items():
        variant, tensors = _read(node)
        if "tau" not in variant.inputs:
            continue
        x = np.concatenate([by_node[name] for by_node in inputs])
        _overwrite(node, "tau", _quantile(gated_mlp.scores(variant, x, tensors), density))


def set_opening(path: str | Path, rows: Sequence[Sequence[int]], opened: float, library: bool | None = None) -> None:
    """Rewrites b_gate, and with dReLU b_up, of an ONNX folder's GatedMLP nodes so that each neuron's gate, and up, is
    open for this share of the tokens.

    For models of random weights only, as `set_density`; the activation's parameter is counted in.
    """
    file = model_file(path)
    inputs = [mlp_inputs(path, ids, library) for ids in rows]
    for name, node in _gated(file).items():
        variant, tensors = _read(node)
        kind, parameter = gated_mlp.split_activation(variant.activation)
        x = np.concatenate([by_node[name] for by_node in inputs])
        for role, above in (("b_gate", parameter), ("b_up", 0.0))[: 2 if cuts_up(kind) else 1]:
            _overwrite(node, role, above - _quantile(gated_mlp.product(variant, x, tensors, f"w{role[1:]}"), opened))


def _quantile(values: NDArray, above: float) -> NDArray:
    """Per column of values [T, n] what this share of them exceeds; never all, never none."""
    ranked = np.sort(values, axis=0)
    cut = min(max(round((1 - above) * len(ranked)), 1), len(ranked) - 1)
    return (ranked[cut - 1] + ranked[cut]) / 2


def _overwrite(node: ir.Node, role: str, values: NDArray) -> None:
    """Writes float32 values over a node's input in the model's data file."""
    value = node.inputs[1 + node.attributes["inputs"].as_string().split().index(role)]
    stored = value.const_value if value is not None else None
    if not isinstance(stored, ir.ExternalTensor):
        raise InputError(
            f"{role} of {node.name} must lie in the model's data file, got {type(stored).__name__}. Export the model "
            "again."
        )
    with open(stored.path, "r+b") as file:
        file.seek(stored.offset or 0)
        file.write(values.astype(np.float32).tobytes())


def _gated(file: Path) -> dict[str, ir.Node]:
    """The GatedMLP nodes that do not keep everything, by name."""
    nodes = (node for node in ir.load(file).graph if node.op_type == gated_mlp.NAME)
    return {str(node.name): node for node in nodes if node.attributes["score"].as_string() != "all"}


def _read(node: ir.Node) -> tuple[gated_mlp.Variant, dict[str, Any]]:
    roles = node.attributes["inputs"].as_string().split()
    variant = _variant(node, roles)
    assert isinstance(variant, gated_mlp.Variant)
    return variant, {role: _Lazy(value) for role, value in zip(roles, node.inputs[1:], strict=True)}


class _Lazy:
    """An initialiser that is read when numpy asks for it: a predictor's density needs none of the large weights."""

    def __init__(self, value: ir.Value | None) -> None:
        assert value is not None and value.const_value is not None
        self._tensor = value.const_value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        array = self._tensor.numpy()
        return array if dtype is None else array.astype(dtype)

    def __len__(self) -> int:
        return int(self._tensor.shape.numpy()[0])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self._tensor.shape.numpy())


def _feeds(session: Any, ids: Sequence[int], head: int) -> dict[str, NDArray]:
    """The inputs of one call with an empty cache."""
    feeds: dict[str, NDArray] = {}
    count = len(ids)
    whole = {
        "input_ids": np.asarray(ids, np.int64)[None],
        "attention_mask": np.ones((1, count), np.int64),
        "position_ids": np.arange(count)[None],
    }
    for entry in session.get_inputs():
        if entry.name in whole:
            feeds[entry.name] = whole[entry.name]
        else:
            feeds[entry.name] = np.zeros(
                [1, entry.shape[1], 0, head], np.float16 if entry.type == "tensor(float16)" else np.float32
            )
    return feeds


def mlp_share(
    path: str | Path,
    ids: Sequence[int],
    following: Sequence[int],
    threads: int | None = None,
    library: bool | None = None,
) -> float:
    """The feed-forward networks' share of the time of a decoded token in plain onnxruntime, by its profiler, over the
    tokens `following` after `ids`.
    """
    import onnxruntime

    with TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        decoder = Decoder(path, PROVIDERS[:1], options, library)
        decoder(ids)
        for token in following:
            decoder([token])
        events = json.loads(Path(decoder.session.end_profiling()).read_text(encoding="utf-8"))
    return share_of(events, len(following))


def share_of(events: Sequence[Mapping[str, Any]], runs: int) -> float:
    """The share of nodes of feed-forward networks in the time of the last `runs` calls of a profile, in microseconds as
    onnxruntime writes it.
    """
    calls = sorted((event["ts"], event["dur"]) for event in events if event["name"] == "model_run")[-runs:]
    inside = sum(
        event["dur"]
        for event in events
        if event["cat"] == "Node"
        and event["name"].endswith("_kernel_time")
        and MLP in event["name"]
        and event["ts"] >= calls[0][0]
    )
    return inside / sum(duration for _, duration in calls)

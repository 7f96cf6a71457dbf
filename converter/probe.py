"""What this machine takes for a model of given sizes: the conversion's own passes over one block with random weights, a few seconds in all.

No weight is read. A block wider than _PARAMETERS gets fewer neurons, and what it takes is scaled to the real one.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .arch import Arch, Site
from .data import Batches
from .end_to_end import EndToEnd, multiplies_bf16
from .losses import kl_divergence
from .plans import Plan, Predictor, Threshold
from .recipe import Tune
from .residual import residual_rank
from .source import Source, TensorInfo
from .stats.collect import collect
from .training import Settings

_PARAMETERS = 1 << 27  # of the measured block
_VOCABULARY, _LOGITS = 512, 1 << 22  # tokens that the measured block knows; logits of one measured product with the head
_WORK = 1.5e11  # multiplications that one measured pass takes about
_REPEATS, _SPENT = 3, 0.7  # runs of a measurement, fewer when so many seconds are spent
_BYTES = 1 << 24


@dataclass(frozen=True)
class Rates:
    """Seconds, by one thing: a token and layer of a pass in float32 (`forward`), of the calibration with its statistics (`calibrate`, and `store` a layer for
    writing them), of a step of a part's training (`train`) and of ONNX Runtime (`prefill`, and `decode` with one token at a time); a position of the head's
    product with its log-probabilities (`head`), of a training step there (`train_head`) and of ONNX Runtime's product (`onnx_head`, `onnx_head_alone`); a
    parameter of a step's two optimizer moments (`update`); a byte written (`write`) and read and hashed (`hash`).
    """

    forward: float
    calibrate: float
    store: float
    train: Mapping[str, float]
    head: float
    train_head: float
    prefill: float
    decode: float
    onnx_head: float
    onnx_head_alone: float
    write: float
    hash: float


class DrawnSource(Source):
    """A source whose tensors are drawn instead of read."""

    def read(self, names: Iterable[str], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Random tensors by name."""
        return {name: _drawn(self.tensors[name].shape).to(dtype) for name in names}

    def rows(self, name: str, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random rows [k, ...]."""
        return _drawn((len(indices), *self.tensors[name].shape[1:])).to(dtype)

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """The same for all."""
        return "drawn"


@dataclass(frozen=True)
class _Block:
    """A model of one block: its parameters, and by how much the real block has more."""

    model: Any
    source: DrawnSource
    parameters: int
    scale: float


def measure(arch: Arch, config: Any, stats: Iterable[str], tunes: Mapping[str, Tune], windows: int = 8, length: int = 256) -> Rates:
    """Rates for a model of `config` on this machine: statistics `stats` (full names), training by part in `tunes`, batches of `windows` windows of `length`."""
    block = _one_block(arch, config)
    length = min(length, int(getattr(config, "max_position_embeddings", length)))
    tokens = torch.randint(0, _VOCABULARY, (_windows(block.parameters, length, windows), length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        forward = _seconds(lambda: block.model.get_decoder()(input_ids=tokens, use_cache=False)) / tokens.numel()
    calibrate, store = _calibrate(block, tokens, sorted(stats)) if stats else (forward, 0.0)
    train = {part: _train(block, arch, part, tune, length) for part, tune in tunes.items()}
    hidden, vocabulary = arch.size(config, "hidden"), arch.size(config, "vocab")
    head, train_head = _head(hidden, vocabulary, any(_half(tune) for tune in tunes.values()), bool(tunes))
    prefill, decode = _onnx(block.parameters, hidden, min(128, length))
    write, read = _disk()
    share = vocabulary * hidden / block.parameters
    return Rates(
        forward=forward * block.scale, calibrate=calibrate * block.scale, store=store * block.scale,
        train={part: seconds * block.scale for part, seconds in train.items()}, head=head, train_head=train_head, prefill=prefill * block.scale,
        decode=decode * block.scale, onnx_head=prefill * share, onnx_head_alone=decode * share, write=write, hash=read,
    )  # fmt: skip


def _seconds(run: Callable[[], Any], repeats: int = _REPEATS) -> float:
    """The median of a few runs after one that is not counted; fewer where they take long."""
    run()
    found: list[float] = []
    while len(found) < repeats and sum(found) < _SPENT:
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return median(found)


def _windows(parameters: int, length: int, most: int) -> int:
    return max(1, min(most, int(_WORK / (parameters * length))))


def _drawn(shape: tuple[int, ...]) -> Tensor:
    """Values of about the size that weights have, from a short pattern: drawing hundreds of millions takes long."""
    count = int(np.prod(shape))
    pattern = torch.randn(min(count, (1 << 18) + 1), generator=torch.Generator().manual_seed(0)) / max(1, shape[-1]) ** 0.5
    return pattern.repeat(-(-count // len(pattern)))[:count].view(shape)


def _one_block(arch: Arch, config: Any) -> _Block:
    from transformers import AutoConfig, AutoModelForCausalLM

    layers, hidden, units = (arch.size(config, space) for space in ("layers", "hidden", "units"))
    matrices = 2 if arch.ffn.kind == "plain" else 3
    kept = max(1, min(units, (_PARAMETERS - 4 * hidden * hidden) // (matrices * hidden))) if (matrices * units + 4 * hidden) * hidden > _PARAMETERS else units
    kept = units if kept == units else max(32, kept // 32 * 32)
    dropped = ("model_type", "sparsity", "architectures", "transformers_version", "_name_or_path", "pad_token_id", "bos_token_id", "eos_token_id")
    values = {key: value[:1] if isinstance(value, list) and len(value) == layers else value for key, value in config.to_dict().items() if key not in dropped}
    values |= {arch.spaces["layers"].config: 1, arch.spaces["units"].config: kept, arch.spaces["vocab"].config: _VOCABULARY, "pad_token_id": None}
    values[arch.ffn.activation.config] = _stock_activation(arch, config)
    one = AutoConfig.for_model(arch.model_type, **values)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(one, dtype=torch.float32)
    tensors = {name: TensorInfo("F32", tuple(parameter.shape), Path()) for name, parameter in shapes.named_parameters()}
    source = DrawnSource(Path(), one, arch, tensors)
    from .blocks import empty_model

    model = empty_model(source)
    model.load_state_dict(source.read(tensors), assign=True, strict=False)
    prefix = arch.block_prefix(0)
    parameters = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith(prefix))
    return _Block(model, source, parameters, (parameters + matrices * hidden * (units - kept)) / parameters)


def _stock_activation(arch: Arch, config: Any) -> str:
    """The name of the activation in a stock configuration: of a swapped model the base's."""
    name = getattr(config, arch.ffn.activation.config)
    return (getattr(config, "sparsity", None) or {}).get("base_activation", name)


def _calibrate(block: _Block, tokens: Tensor, stats: list[str]) -> tuple[float, float]:
    """Seconds a token of the calibration pass, and a layer for storing."""
    found = []
    for repeats in (1, 3):
        rows = tokens.repeat(repeats, 1)
        batches = Batches(rows, torch.ones_like(rows, dtype=torch.bool))
        with TemporaryDirectory() as folder:
            start = time.perf_counter()
            collect(block.source, batches, stats, Path(folder))
            found.append(time.perf_counter() - start)
    each = max((found[1] - found[0]) / (2 * tokens.numel()), 0.2 * found[1] / (3 * tokens.numel()))
    return each, max(0.0, found[1] - 3 * each * tokens.numel())


def _half(tune: Tune) -> bool:
    return tune.precision == "bf16" or (tune.precision == "auto" and multiplies_bf16(torch.device("cpu")))


def _train(block: _Block, arch: Arch, part: str, tune: Tune, length: int) -> float:
    """Seconds a token of a step of training end to end."""
    config, activation = block.model.config, arch.activation(block.model.config)
    hidden, units = arch.size(config, "hidden"), arch.size(config, "units")
    rank = residual_rank(units, 2 if arch.ffn.kind == "plain" else 3)
    entry: Any = Threshold("gate", torch.full((units,), 0.1), 0.5)
    if part == "predictor":
        entry = Predictor(_drawn((2 * rank, hidden)), _drawn((units, 2 * rank)), torch.full((units,), -1.0), 1.0)
    plan: Plan = {Site(0): [entry]}
    tokens = torch.randint(0, _VOCABULARY, (min(tune.windows, _windows(block.parameters, length, tune.windows)), length))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    objective = EndToEnd(block.model, arch, activation, plan, Settings(10, tune.windows, tune.rate), [0.5], 1.0, tune.local, _half(tune), tokens[:1])
    return _seconds(lambda: objective.loss(tokens, mask, 0).backward()) / tokens.numel()


def _head(hidden: int, vocabulary: int, half: bool, trains: bool) -> tuple[float, float]:
    """Seconds a position of the head with log-probabilities, and of two heads with their divergence and its gradient."""
    part = min(vocabulary, _LOGITS // 64)
    positions = max(8, min(256, _LOGITS // part))
    weight, h = _drawn((part, hidden)), torch.randn(positions, hidden)
    scale = vocabulary / part / positions
    with torch.no_grad():
        plain = _seconds(lambda: F.linear(h, weight).log_softmax(-1)) * scale
    if not trains:
        return plain, 0.0

    def step() -> None:
        given = h.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            with torch.no_grad():
                p = F.linear(h, weight)
            q = F.linear(given, weight)
        kl_divergence(p, q).backward()

    return plain, _seconds(step) * scale


def _onnx(parameters: int, hidden: int, length: int) -> tuple[float, float]:
    """Seconds a token of ONNX Runtime's products with a block's parameters, many tokens and one at a time."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    width = max(1, min(parameters // hidden, _BYTES // hidden))
    weight = numpy_helper.from_array(_drawn((hidden, width)).numpy(), "w")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["t", size]) for name, size in (("x", hidden), ("y", width))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rows = {count: np.ones((count, hidden), np.float32) for count in (length, 1)}
    many, one = (_seconds(lambda x=x: session.run(None, {"x": x})) / len(x) for x in rows.values())
    return many * parameters / (hidden * width), one * parameters / (hidden * width)


def _disk() -> tuple[float, float]:
    """Seconds a byte written to disk, and hashed."""
    data = os.urandom(1 << 20) * (_BYTES >> 20)
    with TemporaryDirectory() as folder:

        def write() -> None:
            with open(Path(folder) / "probe", "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

        written = _seconds(write, 1)
    return written / len(data), _seconds(lambda: hashlib.sha256(data), 1) / len(data)

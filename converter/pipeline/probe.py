"""What this machine takes for a model of given sizes: the conversion's own passes over one block with random weights, a
few seconds in all.

No weight is read. A block wider than _PARAMETERS gets fewer neurons, and what it takes is scaled to the real one.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...runtime_onnx.bench.samples import waits
from ..arch import Arch
from ..arch.shapes import linear_shapes
from ..arch.site import Site
from ..checkpoint.plan import Gate, Plan, Predictor, SitePlan, Threshold
from ..checkpoint.source import Source, TensorInfo
from ..evaluation.quality import Reference, compare, torch_logits
from ..methods import METHODS, load_method
from ..methods.tune import Tune
from ..modeling.empty import empty_model
from ..modeling.predictor import rank_for
from ..stats.collect import PROBE_TOKENS, collect
from ..text.windows import Batches
from ..training.inputs import Models
from ..training.selection import SelectionObjective
from ..training.settings import Settings

_PARAMETERS = 1 << 27  # of the measured block
_VOCABULARY, _HEAD = 256, 1 << 25  # tokens that the measured block knows; weights of the measured head
_WORK = 4e9  # multiplications of one measured pass, as far as a window and _MOST windows allow
_MOST = 4
_REPEATS, _SPENT = 9, 0.5  # runs of a measurement, fewer when so many seconds are spent
_SHORT = 16  # tokens of a pass that is not counted
_LEAST = 0.2  # of a run's time: what stays of it, however long its threads waited
# seconds of a run that is so long that the waits told at its end are its own: a thread's are told when it runs again
_TOLD = 0.1
_BYTES = 1 << 24


@dataclass(frozen=True)
class Rates:
    """Seconds, by one thing.

    Attributes:
        forward: A token and layer of a pass in float32.
        calibrate: A token and layer of the calibration with its statistics.
        store: A layer, for writing them.
        train: A token and layer of a step of a part's training, by part.
        head: A position of the head's product with its log-probabilities.
        train_head: A position of the head in a training step.
        prefill: A token and layer in ONNX Runtime.
        decode: The same with one token at a time.
        onnx_head: A position of ONNX Runtime's product; `onnx_head_alone` with one token at a time.
        write: A byte written.
        hash: A byte read and hashed.
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


def measure(
    arch: Arch, config: Any, stats: Iterable[str], tunes: Mapping[str, Tune], length: int = 256, device: str = "cpu"
) -> Rates:
    """Rates for a model of `config` on this machine: statistics `stats` (full names), training by part in `tunes`,
    windows of `length` tokens. torch's are those of `device`, ONNX Runtime's the CPU's.
    """
    block = _one_block(arch, config, device)
    length = min(length, int(getattr(config, "max_position_embeddings", length)))
    count = _windows(block.parameters, length, _MOST)
    tokens = torch.randint(0, _VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))
    placed = tokens.to(device)
    with torch.no_grad():
        forward = _seconds(lambda: block.model.get_decoder()(input_ids=placed, use_cache=False)) / tokens.numel()
    calibrate, store = (
        _calibrate(block, tokens[: PROBE_TOKENS // length or 1], sorted(stats), device) if stats else (forward, 0.0)
    )
    hidden, vocabulary = arch.size(config, "hidden"), arch.size(config, "vocab")
    head = _head(block, vocabulary, forward, length)
    train, train_head = _trains(block, arch, tunes, length, vocabulary)
    whole = block.scale * block.parameters * arch.size(config, "layers") + vocabulary * hidden
    prefill, decode = _onnx(block.parameters, hidden, min(128, length), whole)
    write, read = _disk()
    share = vocabulary * hidden / block.parameters
    return Rates(
        forward=forward * block.scale,
        calibrate=calibrate * block.scale,
        store=store * block.scale,
        train={part: seconds * block.scale for part, seconds in train.items()},
        head=head,
        train_head=train_head,
        prefill=prefill * block.scale,
        decode=decode * block.scale,
        onnx_head=prefill * share,
        onnx_head_alone=decode * share,
        write=write,
        hash=read,
    )


def _seconds(run: Callable[[], Any], repeats: int = _REPEATS, warm: bool = False) -> float:
    """The least of a few runs after one that is not counted, unless all is `warm`; fewer where they take long. Other
    work on the machine makes a run longer, never shorter.
    """

    def timed() -> None:
        run()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()

    if not warm:
        timed()
    samples: list[float] = []
    while len(samples) < repeats and sum(samples) < _SPENT:
        samples.append(_undisturbed(timed))
    return min(samples)


def _undisturbed(run: Callable[[], Any]) -> float:
    """Seconds of a run without those that a thread waited for a CPU, where the kernel tells them: threads meet after
    every product, so all wait for one.
    """
    start, before = time.perf_counter(), waits()
    run()
    wall, after = time.perf_counter() - start, waits()
    lost = max((after[thread] - since for thread, since in before.items() if thread in after), default=0.0)
    return wall if wall < _TOLD else max(wall - lost, _LEAST * wall)


def _windows(parameters: int, length: int, most: int) -> int:
    return max(1, min(most, int(_WORK / (parameters * length))))


def _drawn(shape: tuple[int, ...]) -> Tensor:
    """Values of about the size that weights have, from a short pattern: drawing hundreds of millions takes long."""
    count = int(np.prod(shape))
    pattern = (
        torch.randn(min(count, (1 << 18) + 1), generator=torch.Generator().manual_seed(0)) / max(1, shape[-1]) ** 0.5
    )
    return pattern.repeat(-(-count // len(pattern)))[:count].view(shape)


def _one_block(arch: Arch, config: Any, device: str) -> _Block:
    from transformers import AutoConfig, AutoModelForCausalLM

    layers, hidden, units = (arch.size(config, space) for space in ("layers", "hidden", "units"))
    matrices = arch.matrices
    kept = (
        max(1, min(units, (_PARAMETERS - 4 * hidden * hidden) // (matrices * hidden)))
        if (matrices * units + 4 * hidden) * hidden > _PARAMETERS
        else units
    )
    kept = units if kept == units else max(32, kept // 32 * 32)
    dropped = (
        "model_type",
        "sparsity",
        "architectures",
        "transformers_version",
        "_name_or_path",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
    values = {
        key: value[:1] if isinstance(value, list) and len(value) == layers else value
        for key, value in config.to_dict().items()
        if key not in dropped
    }
    values |= {
        arch.spaces["layers"].config: 1,
        arch.spaces["units"].config: kept,
        arch.spaces["vocab"].config: _VOCABULARY,
    }
    values |= {"pad_token_id": None, "tie_word_embeddings": False}
    values[arch.ffn.activation.config] = _stock_activation(arch, config)
    one = AutoConfig.for_model(arch.model_type, **values)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(one, dtype=torch.float32, trust_remote_code=False)
    tensors = {name: TensorInfo("F32", tuple(parameter.shape), Path()) for name, parameter in shapes.named_parameters()}
    source = DrawnSource(Path(), one, arch, tensors)
    model = empty_model(source)
    model.load_state_dict(source.read(tensors), assign=True, strict=False)
    prefix = arch.block_prefix(0)
    parameters = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith(prefix))
    return _Block(model.to(device), source, parameters, (parameters + matrices * hidden * (units - kept)) / parameters)


def _stock_activation(arch: Arch, config: Any) -> str:
    """The name of the activation in a stock configuration: of a swapped model the base's."""
    name = getattr(config, arch.ffn.activation.config)
    return (getattr(config, "sparsity", None) or {}).get("base_activation", name)


def _calibrate(block: _Block, tokens: Tensor, stats: list[str], device: str) -> tuple[float, float]:
    """Seconds a token of the calibration pass, and a layer for what it does once; `tokens` [B, S] are as many as
    statistics look at twice.
    """

    def collected(rows: Tensor) -> float:
        batches = Batches(rows, torch.ones_like(rows, dtype=torch.bool))

        def run() -> None:
            with TemporaryDirectory() as folder:
                collect(block.source, batches, stats, Path(folder), device=device)

        return _seconds(run, warm=True)

    collected(tokens[:1, :_SHORT])  # loads code
    once, thrice = collected(tokens), collected(tokens.repeat(3, 1))
    each = max((thrice - once) / (2 * tokens.numel()), 0.2 * thrice / (3 * tokens.numel()))
    return each, max(0.0, once - each * tokens.numel())


def _objective(block: _Block, arch: Arch, part: str, tune: Tune, tokens: Tensor) -> SelectionObjective:
    """The training end to end of the one block, for windows [B, S]."""
    config, activation = block.model.config, arch.activation(block.model.config)
    hidden, units = arch.size(config, "hidden"), arch.size(config, "units")
    gate: Gate = Threshold("gate", torch.full((units,), 0.1), 0.5)
    if hasattr(load_method(part), "rank"):
        rank = rank_for(hidden, units, arch.matrices)
        gate = Predictor(_drawn((rank, hidden)), _drawn((units, rank)), torch.full((units,), -1.0), 1.0)
    plan: Plan = {Site(0): SitePlan(gate=gate)}
    if METHODS[part].kind == "channel":
        widths = {name: d_in for name, (_, d_in) in linear_shapes(arch, config).items()}
        plan = {
            Site(0, kind=f"linear:{name}"): SitePlan(gate=Threshold("input", torch.full((width,), 0.1), 0.5))
            for name, width in widths.items()
        }
    models, settings = Models(block.model, None, arch, activation), Settings(10, tune.windows, tune.rate)
    return SelectionObjective(models, plan, tune, settings, 1.0, [0.5], tokens[:1])


def _trains(
    block: _Block, arch: Arch, tunes: Mapping[str, Tune], length: int, vocabulary: int
) -> tuple[dict[str, float], float]:
    """Seconds a token of a step of every part's training, and a position of its head."""
    if not tunes:
        return {}, 0.0
    steps: dict[str, Callable[[], None]] = {}
    counts: dict[str, int] = {}
    for part, tune in tunes.items():
        windows = min(tune.windows, _windows(block.parameters, length, tune.windows))
        tokens = torch.randint(0, _VOCABULARY, (windows, length))
        objective, mask = _objective(block, arch, part, tune, tokens), torch.ones_like(tokens, dtype=torch.bool)
        block.model.get_input_embeddings().weight.requires_grad_(
            True
        )  # gradients pass through every block but the first
        steps[part] = lambda objective=objective, tokens=tokens, mask=mask: objective.loss(tokens, mask, 0).backward()
        counts[part] = tokens.numel()
    seconds = {part: _seconds(step) / counts[part] for part, step in steps.items()}
    part = next(iter(steps))
    with _wide_head(block, vocabulary) as share:
        wide = _seconds(steps[part]) / counts[part]
    return seconds, max(wide - seconds[part], 0.1 * wide) * share


def _head(block: _Block, vocabulary: int, forward: float, length: int) -> float:
    """Seconds a position of one side of a comparison of distributions, with the product that gives its logits."""
    tokens = torch.randint(0, _VOCABULARY, (1, length))
    batches = Batches(tokens, torch.ones_like(tokens, dtype=torch.bool))
    with torch.no_grad(), _wide_head(block, vocabulary) as share:
        reference = Reference(block.model, batches)
        both = (
            _seconds(lambda: compare(reference, 0, [torch_logits(block.model, {}, reference.groups[0])]))
            / tokens.numel()
        )
    return max(both / 2 - forward, 0.1 * both) * share


@contextmanager
def _wide_head(block: _Block, vocabulary: int) -> Iterator[float]:
    """The model with a head for as much of the real vocabulary as is quick; yields how many times as large the real one
    is.
    """
    model, (_, hidden) = block.model, block.model.get_output_embeddings().weight.shape
    narrow, part = model.get_output_embeddings(), min(vocabulary, max(_VOCABULARY, _HEAD // hidden))
    wide = torch.nn.Linear(1, 1, bias=False, device="meta")
    wide.weight = torch.nn.Parameter(_drawn((part, hidden)).to(model.device), requires_grad=False)
    model.set_output_embeddings(wide)
    before, model.config.vocab_size = model.config.vocab_size, part
    try:
        yield vocabulary / part
    finally:
        model.set_output_embeddings(narrow)
        model.config.vocab_size = before


def _onnx(parameters: int, hidden: int, length: int, whole: float) -> tuple[float, float]:
    """Seconds a token of ONNX Runtime's products with a block's parameters, many tokens and one at a time. The measured
    weights are those of the `whole` model up to _BYTES of them: a token's product takes as long as its weights come
    from where they lie, and those of a small model lie in the cache.
    """
    import onnxruntime
    from onnx import numpy_helper, parser

    width = max(1, int(min(whole, _BYTES)) // hidden)
    graph = f"product (float[t, {hidden}] x) => (float[t, {width}] y) {{ y = MatMul(x, w) }}"
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{graph}')
    model.graph.initializer.append(numpy_helper.from_array(_drawn((hidden, width)).numpy(), "w"))
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

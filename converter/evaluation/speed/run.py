"""The one entry of all benchmarks: what is asked for decides between two folders, a checkpoint alone, a shape, and an
op.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ....runtime_onnx.bench.folders import RUNTIMES, BenchTiming
from ....runtime_onnx.bench.folders import bench as bench_folders
from ....runtime_onnx.bench.op import DENSITIES, RELU_DENSITIES, OpTiming, OpWorkload, bench_op
from ....runtime_onnx.bench.op_cases import CASES
from ....runtime_onnx.bench.relu_case import RIGHT, SCORES, open_share, used_share
from ....runtime_onnx.errors import InputError
from ....runtime_onnx.library import model_file, variants
from ....runtime_onnx.untrusted import read_json
from ...arch import load_arch
from ...checkpoint.plan import check_exact
from ...checkpoint.stage import write_json
from ...onnx_export.precision import PRECISIONS, named
from ...progress import stage
from ...sources.hub import local_folder
from .model import TimedModel, bench_models
from .shapes import Shape, find_shape

DEFAULT_SHAPE = "llama-1b"
_SAME = ("machine", "versions", "settings", "isa")  # of a stored result that more rows may join


@dataclass(frozen=True)
class BenchRequest:
    """What is to be benched, and how; None is what each form of a call has by default.

    Attributes:
        models: Two ONNX folders, sparse checkpoints or Hub ids, dense first; or one sparse checkpoint, whose dense
            graph is built from its own weights, with the base model's activation where it was swapped: what the dense
            source costs.
        shape: A name in SHAPES: with `op` the sizes of the op, else a model of random weights.
        op: Stem of an op to time alone.
        precision: One of PRECISIONS; for ops a list with commas or semicolons, all by default; for a shape int4 by
            default.
        density: Kept shares, with commas; with a ReLU activation the shares of neurons that are not zero.
        tokens: Tokens per call of an op, with commas.
        layers: Of a shape, in place of its own number.
        peers: Whether to run other libraries beside.
        prompt_tokens: Tokens prefilled.
        new_tokens: Tokens decoded.
        pairs: Clean pairs of an op, rounds of a model.
        runtime: onnxruntime or onnxruntime-genai.
        activation: Of the sparse side of gated_mlp or of a shape: silu, or one with exact zeros (drelu), which is timed
            with score exact and with a predictor that keeps twice what is not zero. The dense side computes with the
            model's own.
        threads: Threads within an op.
        work: Where the models of a shape are made and kept; a temporary folder by default. What lies there is used
            again.
    """

    models: Sequence[str] | None = None
    shape: str | None = None
    op: str | None = None
    precision: str | None = None
    density: str | None = None
    tokens: str | None = None
    layers: int | None = None
    peers: bool = True
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    pairs: int | None = None
    runtime: str | None = None
    activation: str | None = None
    threads: int | None = None
    work: Path | None = None

    def check(self) -> None:
        """Raises InputError for what does not go together."""
        count = len(self.models or ())
        if (self.shape or self.op) and count:
            raise InputError(f"Folders must not be given with --shape or --op, got {count} of them. Leave one out.")
        if not (self.shape or self.op) and not 1 <= count <= 2:
            raise InputError(
                f"bench must get DENSE and DIR, one DIR, --shape or --op, got {count} folders. See: sparsegate bench "
                "--help"
            )
        what, allowed = (
            ("an op", {"tokens", "density", "precision", "activation"})
            if self.op
            else ("a shape", {"layers", "density", "precision", "work", "activation"})
            if self.shape
            else ("existing folders", set())
        )
        for name in ("tokens", "layers", "density", "precision", "work", "activation"):
            if getattr(self, name) is not None and name not in allowed:
                raise InputError(f"--{name} must not be given for {what}, got {getattr(self, name)}. Leave it out.")
        if self.op and self.op not in CASES:
            raise InputError(f"--op must be {' or '.join(CASES)}, got {self.op!r}. Choose one of them.")

    def timing(self, default: BenchTiming) -> BenchTiming:
        """Tokens, pairs and threads, where they are not given those of `default`."""
        named = {name: getattr(self, name) for name in ("prompt_tokens", "new_tokens", "pairs", "threads")}
        return replace(default, **{name: value for name, value in named.items() if value is not None})

    def shares(self, default: Sequence[float]) -> list[float]:
        """The densities; `default` are those of silu."""
        return _numbers(self.density, "--density", RELU_DENSITIES if self.zeros else default)

    @property
    def zeros(self) -> bool:
        """Whether the activation has exact zeros."""
        return self.activation not in (None, "silu")


FOLDERS, SHAPE = BenchTiming(128, 64, 7), BenchTiming(64, 24, 15)
"""Of two folders, and of a shape."""
OP_PAIRS = 21

Progress = Callable[[int, int], None] | None
"""Called with the number of finished rows, pairs or rounds and how many there will be."""


def bench(
    request: BenchRequest, output: Path | None = None, command: str | None = None, progress: Progress = None
) -> dict[str, Any]:
    """Measures speed and returns it as JSON-ready numbers; the forms of a call are in `sparsegate bench --help`.

    Args:
        request: What is to be benched, and how.
        output: File for the JSON. An op's finished rows in it are not measured again.
        command: What to record as the command; this process's own by default.
        progress: As `Progress`.

    Raises:
        InputError: A field is out of range or does not go with the others, or a folder cannot be opened.
    """
    request.check()
    if output and output.suffix != ".json":
        raise InputError(f"--output must be a .json file, got {output}. Tables and plots get their names from it.")
    if request.op:
        result = _op(request.op, find_shape(request.shape or DEFAULT_SHAPE), request, output, command, progress)
    elif request.shape:
        result = _shape(find_shape(request.shape), request, command, progress)
    else:
        result = _folders(request, command, progress)
    if output:
        write_json(output, result)
    return result


def _numbers(text: str | None, flag: str, otherwise: Sequence[float]) -> list[float]:
    """Numbers with commas between them; shares may be written as 20%."""
    if text is None:
        return list(otherwise)
    try:
        return [
            float(part[:-1]) / 100 if part.endswith("%") else float(part) for part in text.replace(" ", "").split(",")
        ]
    except ValueError:
        raise InputError(f"{flag} must be numbers with commas between them, got {text!r}. Correct it.") from None


def _op(
    op: str, shape: Shape, request: BenchRequest, output: Path | None, command: str | None, progress: Progress
) -> dict[str, Any]:
    from .peers import mlp_peers
    from .random_model import default_rank

    earlier = _earlier(output)

    def keep(result: dict[str, Any]) -> None:
        if output:
            write_json(output, _joined(result, earlier))
        if progress:
            progress(len(result["rows"]) - len((earlier or {}).get("rows", [])), 0)

    names = request.precision
    formats = None if names is None else [part.strip() for part in names.split(";" if ";" in names else ",")]
    workload = OpWorkload(
        op,
        shape.hidden,
        shape.neurons,
        default_rank(shape),
        formats,
        tokens=[int(value) for value in _numbers(request.tokens, "--tokens", (1,))],
        densities=request.shares(DENSITIES),
        activation=request.activation or "silu",
    )
    result = bench_op(
        workload,
        OpTiming(request.threads, OP_PAIRS if request.pairs is None else request.pairs),
        peers=mlp_peers() if request.peers and op == "gated_mlp" else (),
        finished=(earlier or {}).get("rows", ()),
        command=command,
        keep=keep,
        accept=lambda head: _check_same(head, earlier, output),
    )
    return _joined(result | {"shape": shape.name}, earlier)


def _earlier(output: Path | None) -> dict[str, Any] | None:
    """A result that is there already and that more rows may join."""
    if output is None or not output.is_file():
        return None
    result = read_json(output, "The earlier result")
    return result if result.get("kind") == "op" else None


def _check_same(head: dict[str, Any], earlier: dict[str, Any] | None, output: Path | None) -> None:
    """Refuses to join numbers of another machine, commit or setting."""
    differing = [name for name in _SAME if earlier and json.loads(json.dumps(head[name])) != earlier.get(name)]
    if differing:
        raise InputError(
            f"{output} must hold rows of the same {', '.join(_SAME)} to be continued, got another {differing[0]}. Move "
            "the file away."
        )


def _joined(result: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """The result with all commands that made it."""
    commands = list(dict.fromkeys([*(earlier or {}).get("commands", []), result["command"]]))
    return {**result, "commands": commands}


def _shape(shape: Shape, request: BenchRequest, command: str | None, progress: Progress) -> dict[str, Any]:
    from .random_model import default_rank

    precision, activation = request.precision or "int4", request.activation or "silu"
    densities = _check_shape(shape, request, precision)
    timing, rank = request.timing(SHAPE), default_rank(shape)
    with _folder(request.work) as folder:
        folders = random_folders(shape, precision, densities, request.layers, folder, activation)
        models = _shape_models(shape, request, precision, folders, folder)
        settings = {
            "shape": shape.name,
            "layers": request.layers or shape.layers,
            "hidden": shape.hidden,
            "neurons": shape.neurons,
            "rank": rank,
            "density": densities,
            **({"activation": activation} if request.zeros else {}),
            "precision": precision,
        }
        mlp = OpWorkload("gated_mlp", shape.hidden, shape.neurons, rank, [precision], activation=activation)
        advance = None if progress is None else partial(_advance, progress, timing.pairs)
        return bench_models(models, shape.vocabulary, timing, settings, mlp, command=command, progress=advance)


def _check_shape(shape: Shape, request: BenchRequest, precision: str) -> list[float]:
    """The densities of a shape's sparse models. Raises InputError for a field out of range."""
    if precision not in PRECISIONS:
        raise InputError(
            f"--precision must be one of {', '.join(PRECISIONS)} for a shape, got {precision!r}. Choose one of them."
        )
    if request.runtime is not None and request.runtime not in RUNTIMES:
        raise InputError(f"--runtime must be {' or '.join(RUNTIMES)}, got {request.runtime!r}. Choose one of them.")
    if request.layers is not None and not 1 <= request.layers <= shape.layers:
        raise InputError(
            f"--layers must be 1 to {shape.layers} for {shape.name}, got {request.layers}. Choose another number."
        )
    densities = request.shares((0.2,))
    most = RIGHT if request.zeros else 1
    if wrong := [value for value in densities if not 0 < value <= most]:
        raise InputError(f"--density must lie above 0 and be at most {most}, got {wrong[0]:g}. Choose another share.")
    if request.activation is not None and request.zeros:
        check_exact(request.activation)
    return densities


def _shape_models(
    shape: Shape, request: BenchRequest, precision: str, folders: Mapping[str, Path], folder: Path
) -> dict[str, TimedModel]:
    """Our models of a shape, and the peers' beside them, by role."""
    from .peers import prepare

    runtime = request.runtime or "onnxruntime-genai"
    models = {
        role: TimedModel(runtime, path, "fp32" if role == "dense" and path.name == "base" else precision)
        for role, path in folders.items()
    }
    if request.peers:
        others = prepare(shape, request.layers, precision, folder / "checkpoint", folder)
        models |= {role: TimedModel(*fields) for role, fields in others.items()}
    return models


def random_folders(
    shape: Shape, precision: str, densities: Sequence[float], layers: int | None, folder: Path, activation: str = "silu"
) -> dict[str, Path]:
    """The dense and the sparse ONNX folders of a shape below `folder`, by role; those that are there are used again.

    With a ReLU activation there are two for every density: one that keeps exactly what is not zero, and one whose
    predictor keeps 1 / RIGHT of that share.
    """
    from transformers import AutoConfig

    from . import random_model as make

    wish = {"shape": shape.name, "layers": layers, "precision": precision} | (
        {} if activation == "silu" else {"activation": activation}
    )
    stamp = folder / "made.json"
    if stamp.is_file() and read_json(stamp, "The record of the models") != wish:
        raise InputError(
            f"--work must be a folder of the same shape, layers, precision and activation, got {folder}, which is of "
            "another. Choose another folder."
        )
    checkpoint = folder / "checkpoint"
    if not stamp.is_file():
        with stage(f"random {shape.name}", apart=True):
            make.make_checkpoint(shape, checkpoint, layers)
    config, arch = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False), load_arch(shape.model_type)
    dense = folder / ("base" if PRECISIONS[precision].bits is None else "dense")
    if not stamp.is_file():
        with stage(f"dense {precision} graph", apart=True):
            make.build_dense(checkpoint, precision, folder)
        write_json(stamp, wish)
    rank = make.default_rank(shape)
    folders, inputs = {"dense": dense}, None
    for density, score in itertools.product(densities, ("",) if activation == "silu" else SCORES):
        role = " ".join(filter(None, ("sparse", score, f"{density:g}")))
        out = folders[role] = folder / role.replace(" ", "_")
        if out.is_dir():
            continue
        with stage(f"{role} {precision} graph", apart=True):
            inputs = inputs or make.mlp_inputs(checkpoint, arch, config)
            if not score:
                make.build_sparse(
                    folder / "base",
                    make.random_plan(inputs, shape.neurons, rank, density),
                    arch,
                    config,
                    out,
                    precision,
                )
                continue
            plan = make.relu_plan(make.random_plan(inputs, shape.neurons, rank, density / RIGHT), activation, score)
            opened = open_share(activation, used_share(score, density))
            make.build_sparse(folder / "base", plan, arch, config, out, precision, opened)
    return folders


def _advance(progress: Callable[[int, int], None], pairs: int, done: int) -> None:
    progress(done, pairs)


def _folders(request: BenchRequest, command: str | None, progress: Progress) -> dict[str, Any]:
    timing = request.timing(FOLDERS)

    def timed(dense: Path, sparse: Path) -> dict[str, Any]:
        advance = None if progress is None else partial(_advance, progress, timing.pairs)
        runtime = request.runtime or "onnxruntime"
        return bench_folders(dense, sparse, timing, runtime=runtime, command=command, progress=advance)

    opened = [local_folder(model) for model in request.models or ()]
    if len(opened) == 2:
        return timed(*opened)
    with TemporaryDirectory(prefix="sparsegate-bench-") as folder:
        return timed(dense_beside(opened[0], Path(folder)), opened[0])


def dense_beside(checkpoint: Path, work: Path) -> Path:
    """The dense ONNX folder of a sparse checkpoint, from its own weights and in the precision of its graph.

    Raises InputError for a folder without weights and for one without an ONNX model.
    """
    from .random_model import build_dense

    file = model_file(checkpoint)
    if not (checkpoint / "config.json").is_file():
        raise InputError(
            f"A single DIR must be a sparse checkpoint with its weights, got {checkpoint}. Give the dense ONNX folder, "
            "too."
        )
    words = [name.split("/") for name in variants(file) if name.startswith("GatedMLP.")]
    precision = named(words[0][3], words[0][4].split(",")[1].removeprefix("w=")) if words else "fp32"
    return build_dense(checkpoint, precision, work)


@contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work is None:
        with TemporaryDirectory(prefix="sparsegate-bench-") as folder:
            yield Path(folder)
        return
    work.mkdir(parents=True, exist_ok=True)
    yield work

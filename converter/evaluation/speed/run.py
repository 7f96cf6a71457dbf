"""The one entry of all benchmarks: what is asked for decides between two folders, a checkpoint alone, a shape, and an
op.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ....runtime_onnx.bench.folders import RUNTIMES
from ....runtime_onnx.bench.folders import bench as bench_folders
from ....runtime_onnx.bench.op import DENSITIES, RELU_DENSITIES, bench_op
from ....runtime_onnx.bench.op_cases import CASES
from ....runtime_onnx.bench.relu_case import RIGHT, open_share
from ....runtime_onnx.errors import InputError
from ....runtime_onnx.library import model_file, variants
from ....runtime_onnx.untrusted import read_json
from ...arch import load_arch
from ...checkpoint.plan import check_exact
from ...checkpoint.stage import write_json
from ...onnx_export.precision import PRECISIONS
from ...progress import stage
from ...sources.hub import local_folder
from .model import Entry, Sizes, bench_models
from .shapes import Shape, find_shape

DEFAULT_SHAPE = "llama-1b"
_SAME = ("machine", "versions", "settings", "isa")  # of a stored result that more rows may join
_FORMATS = {"float": {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}, "int8_row": "int8", "int4_g32": "int4"}


def bench(
    models: Sequence[str] | None = None,
    shape: str | None = None,
    op: str | None = None,
    precision: str | None = None,
    density: str | None = None,
    tokens: str | None = None,
    layers: int | None = None,
    peers: bool = True,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    pairs: int | None = None,
    runtime: str | None = None,
    threads: int | None = None,
    work: Path | None = None,
    output: Path | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    activation: str | None = None,
) -> dict[str, Any]:
    """Measures speed and returns it as JSON-ready numbers; the forms of a call are in `sparsegate bench --help`.

    Args:
        models: Two ONNX folders, sparse checkpoints or Hub ids, dense first; or one sparse checkpoint, whose dense
        graph is built from its own weights, with
            the base model's activation where it was swapped: what the dense source costs.
        shape: A name in SHAPES: with `op` the sizes of the op, else a model of random weights.
        op: Stem of an op to time alone.
        precision: fp32, fp16, bf16, int8, int4; for ops a list with commas or semicolons, all by default; for a shape
        int4 by default.
        density: Kept shares, with commas; with a ReLU activation the shares of neurons that are not zero.
        tokens: Tokens per call of an op, with commas.
        layers: Of a shape, in place of its own number.
        peers: Whether to run other libraries beside.
        prompt_tokens: Tokens prefilled.
        new_tokens: Tokens decoded.
        pairs: Clean pairs of an op, rounds of a model.
        runtime: onnxruntime or onnxruntime-genai.
        threads: Threads within an op.
        work: Where the models of a shape are made and kept; a temporary folder by default. What lies there is used
        again.
        output: File for the JSON. An op's finished rows in it are not measured again.
        command: What to record as the command; this process's own by default.
        progress: Called with the number of finished rows, pairs or rounds and how many there will be.
        activation: Of the sparse side of gated_mlp or of a shape: silu, or one with exact zeros (drelu), which is timed
        with score exact and with a predictor
            that keeps twice what is not zero. The dense side computes with the model's own.

    Raises:
        InputError, ValueError: An argument is out of range or does not go with the others, or a folder cannot be
        opened.
    """
    _together(
        models,
        shape,
        op,
        tokens=tokens,
        layers=layers,
        density=density,
        precision=precision,
        work=work,
        activation=activation,
    )
    if output and output.suffix != ".json":
        raise InputError(f"--output must be a .json file, got {output}. Tables and plots get their names from it.")
    if op:
        found = find_shape(shape or DEFAULT_SHAPE)
        result = _op(
            op,
            found,
            precision,
            density,
            tokens,
            peers,
            pairs,
            threads,
            output,
            command,
            progress,
            activation or "silu",
        )
    elif shape:
        result = _shape(
            find_shape(shape),
            precision or "int4",
            density,
            layers,
            peers,
            prompt_tokens,
            new_tokens,
            pairs,
            runtime,
            threads,
            work,
            command,
            progress,
            activation or "silu",
        )
    else:
        result = _folders(list(models or ()), prompt_tokens, new_tokens, pairs, runtime, threads, command, progress)
    if output:
        write_json(output, result)
    return result


def _together(models: Sequence[str] | None, shape: str | None, op: str | None, **others: Any) -> None:
    """Refuses what does not go together."""
    count = len(models or ())
    if (shape or op) and count:
        raise InputError(f"Folders must not be given with --shape or --op, got {count} of them. Leave one out.")
    if not (shape or op) and not 1 <= count <= 2:
        raise InputError(
            f"bench must get DENSE and DIR, one DIR, --shape or --op, got {count} folders. See: sparsegate bench --help"
        )
    allowed = {
        "op": {"tokens", "density", "precision", "activation"},
        "shape": {"layers", "density", "precision", "work", "activation"},
        "folders": set(),
    }
    form = "op" if op else "shape" if shape else "folders"
    wrong = [name for name, value in others.items() if value is not None and name not in allowed[form]]
    if wrong:
        means = {"op": "an op", "shape": "a shape", "folders": "existing folders"}[form]
        raise InputError(f"--{wrong[0]} must not be given for {means}, got {others[wrong[0]]}. Leave it out.")
    if op and op not in CASES:
        raise InputError(f"--op must be {' or '.join(CASES)}, got {op!r}. Choose one of them.")


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


def _shares(density: str | None, otherwise: Sequence[float], activation: str) -> list[float]:
    return _numbers(density, "--density", otherwise if activation == "silu" else RELU_DENSITIES)


def _op(
    op: str,
    shape: Shape,
    precision: str | None,
    density: str | None,
    tokens: str | None,
    peers: bool,
    pairs: int | None,
    threads: int | None,
    output: Path | None,
    command: str | None,
    progress: Callable[[int, int], None] | None,
    activation: str,
) -> dict[str, Any]:
    from .peers import mlp_peers
    from .random_model import default_rank

    formats = (
        None if precision is None else [part.strip() for part in precision.split(";" if ";" in precision else ",")]
    )
    earlier = _earlier(output)
    stored = output if output else None

    def keep(result: dict[str, Any]) -> None:
        if stored:
            write_json(stored, _joined(result, earlier))
        if progress:
            progress(len(result["rows"]) - len((earlier or {}).get("rows", [])), 0)

    counts = [int(value) for value in _numbers(tokens, "--tokens", (1,))]
    result = bench_op(
        op,
        shape.hidden,
        shape.neurons,
        default_rank(shape),
        formats,
        _shares(density, DENSITIES, activation),
        counts,
        threads,
        wanted=21 if pairs is None else pairs,
        peers=mlp_peers() if peers and op == "gated_mlp" else (),
        finished=(earlier or {}).get("rows", ()),
        command=command,
        keep=keep,
        accept=lambda head: _check_same(head, earlier, output),
        activation=activation,
    )
    return _joined(result | {"shape": shape.name}, earlier)


def _earlier(output: Path | None) -> dict[str, Any] | None:
    """A result that is there already and that more rows may join."""
    if output is None or not output.is_file():
        return None
    found = read_json(output, "The earlier result")
    return found if found.get("kind") == "op" else None


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


def _shape(
    shape: Shape,
    precision: str,
    density: str | None,
    layers: int | None,
    peers: bool,
    prompt_tokens: int | None,
    new_tokens: int | None,
    pairs: int | None,
    runtime: str | None,
    threads: int | None,
    work: Path | None,
    command: str | None,
    progress: Callable[[int, int], None] | None,
    activation: str,
) -> dict[str, Any]:
    from .peers import prepare

    if precision not in PRECISIONS:
        raise InputError(
            f"--precision must be one of {', '.join(PRECISIONS)} for a shape, got {precision!r}. Choose one of them."
        )
    runtime = _runtime(runtime or "onnxruntime-genai")
    if layers is not None and not 1 <= layers <= shape.layers:
        raise InputError(f"--layers must be 1 to {shape.layers} for {shape.name}, got {layers}. Choose another number.")
    densities = _shares(density, (0.2,), activation)
    most = 1 if activation == "silu" else RIGHT
    if wrong := [value for value in densities if not 0 < value <= most]:
        raise InputError(f"--density must lie above 0 and be at most {most}, got {wrong[0]:g}. Choose another share.")
    if activation != "silu":
        check_exact(activation)
    count = 15 if pairs is None else pairs
    with _folder(work) as folder:
        built, sizes = random_folders(shape, precision, densities, layers, folder, activation)
        entries = {
            role: Entry(runtime, path, "fp32" if role == "dense" and path.name == "base" else precision)
            for role, path in built.items()
        }
        if peers:
            others = prepare(shape, layers, precision, folder / "checkpoint", folder)
            entries |= {role: Entry(*found) for role, found in others.items()}
        settings = {
            "shape": shape.name,
            "layers": sizes.layers,
            "hidden": sizes.d,
            "neurons": sizes.n,
            "rank": sizes.r,
            "density": densities,
        }
        settings |= {} if activation == "silu" else {"activation": activation}
        return bench_models(
            entries,
            precision,
            sizes,
            settings,
            shape.vocabulary,
            64 if prompt_tokens is None else prompt_tokens,
            24 if new_tokens is None else new_tokens,
            count,
            threads,
            command=command,
            progress=(lambda done: progress(done, count)) if progress else None,
            activation=activation,
        )


def random_folders(
    shape: Shape, precision: str, densities: Sequence[float], layers: int | None, folder: Path, activation: str = "silu"
) -> tuple[dict[str, Path], Sizes]:
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
    found, inputs = {"dense": dense}, None
    for density, score in itertools.product(densities, ("",) if activation == "silu" else ("exact", "predictor")):
        role = " ".join(filter(None, ("sparse", score, f"{density:g}")))
        out = found[role] = folder / role.replace(" ", "_")
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
            opened = open_share(activation, density if score == "exact" else RIGHT)
            make.build_sparse(folder / "base", plan, arch, config, out, precision, opened)
    return found, Sizes(shape.hidden, shape.neurons, rank, layers or shape.layers)


def _folders(
    models: list[str],
    prompt_tokens: int | None,
    new_tokens: int | None,
    pairs: int | None,
    runtime: str | None,
    threads: int | None,
    command: str | None,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    count = 7 if pairs is None else pairs
    given = {
        "prompt_tokens": 128 if prompt_tokens is None else prompt_tokens,
        "new_tokens": 64 if new_tokens is None else new_tokens,
        "pairs": count,
        "runtime": runtime or "onnxruntime",
        "threads": threads,
        "command": command,
        "progress": (lambda done: progress(done, count)) if progress else None,
    }
    if len(models) == 2:
        return bench_folders(local_folder(models[0]), local_folder(models[1]), **given)
    checkpoint = local_folder(models[0])
    with TemporaryDirectory(prefix="sparsegate-bench-") as folder:
        return bench_folders(dense_beside(checkpoint, Path(folder)), checkpoint, **given)


def dense_beside(checkpoint: Path, work: Path) -> Path:
    """The dense ONNX folder of a sparse checkpoint, from its own weights and in the precision of its graph.

    Raises InputError for a folder without weights, ValueError for one without an ONNX model.
    """
    from .random_model import build_dense

    file = model_file(checkpoint)
    if not (checkpoint / "config.json").is_file():
        raise InputError(
            f"A single DIR must be a sparse checkpoint with its weights, got {checkpoint}. Give the dense ONNX folder, "
            "too."
        )
    words = [name.split("/") for name in variants(file) if name.startswith("GatedMLP.")]
    found = _FORMATS[words[0][3]] if words else _FORMATS["float"]
    precision = (
        found if isinstance(found, str) else found[words[0][4].split(",")[1].removeprefix("w=")] if words else "fp32"
    )
    return build_dense(checkpoint, precision, work)


def _runtime(name: str) -> str:
    if name not in RUNTIMES:
        raise InputError(f"--runtime must be {' or '.join(RUNTIMES)}, got {name!r}. Choose one of them.")
    return name


@contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work is None:
        with TemporaryDirectory(prefix="sparsegate-bench-") as folder:
            yield Path(folder)
        return
    work.mkdir(parents=True, exist_ok=True)
    yield work

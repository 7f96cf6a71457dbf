"""Time prompts with AVX2 on both sides (Linux on x86-64, needs objdump and readelf): the gated MLP, and whole models
beside it.

    python tests/bench/benchmarks/avx2_prefill.py [GRAPHS NAME]

GRAPHS holds the graphs of `real_model.py` (WORK/graphs), NAME says what they are of.

sparsegate's library has a switch for its instruction set, ONNX Runtime has none. So the dense side is a copy of the
installed ONNX Runtime in which every `xgetbv` says that the system saves the registers of AVX and not those of AVX-512:
its kernels then choose themselves as on a machine without AVX-512. Rows that are stored with enough pairs are not
measured again.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

RESULT = Path(__file__).parents[1] / "results" / "prefill_avx2.json"
SIZES = (576, 1536)  # of SmolLM2-135M
DENSITY = 0.5
TOKENS = (2, 4, 8, 16, 32, 64, 128, 512)
FORMATS = ("fp32", "int8", "int4")
PROMPTS = (32, 128, 256)  # tokens, of whole models
GRAPHS = {"fp32": "base", "int8": "dense_int8", "int4": "dense_int4"}  # of the dense models
PAIRS = 15
PATIENCE = 40.0
XGETBV, SAYS_AVX = b"\x0f\x01\xd0", b"\xb0\x07\x90"  # mov al, 7: x87, SSE and AVX; nop


def limited_onnxruntime(folder: Path) -> int:
    """Copies the installed onnxruntime to `folder` without AVX-512; returns how many places were changed."""
    import onnxruntime

    shutil.copytree(Path(onnxruntime.__file__).parent, folder / "onnxruntime")
    file = next((folder / "onnxruntime" / "capi").glob("onnxruntime_pybind11_state*.so"))
    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", file], capture_output=True, text=True, check=True
    ).stdout
    loads = subprocess.run(["readelf", "-lW", file], capture_output=True, text=True, check=True).stdout
    segments = [
        [int(part, 16) for part in line.split()[1:5]] for line in loads.splitlines() if line.split()[:1] == ["LOAD"]
    ]
    content, changed = bytearray(file.read_bytes()), 0
    for line in code.splitlines():
        if not line.endswith("xgetbv"):
            continue
        address = int(line.split(":")[0], 16)
        start, virtual = next((offset, place) for offset, place, _, size in segments if place <= address < place + size)
        at = address - virtual + start
        if content[at : at + 3] != XGETBV:
            raise ValueError(
                f"{file} must hold xgetbv at {at:#x}, got {content[at : at + 3].hex()}. Its symbols were not "
                "understood."
            )
        content[at : at + 3] = SAYS_AVX
        changed += 1
    file.write_bytes(content)
    return changed


def force_avx2() -> None:
    """Holds sparsegate's library to AVX2."""
    from sparsegate.runtime_onnx import library

    if not ctypes.CDLL(str(library.library_path())).sparsegate_force_isa(b"avx2"):
        raise ValueError("The machine must have AVX2, got one without. Run this elsewhere.")


def stored_for(machine: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The stored result, empty where there is none. Raises ValueError where it is of another machine or settings."""
    if not RESULT.is_file():
        return {}
    stored = json.loads(RESULT.read_text(encoding="utf-8"))
    if (stored["machine"], stored["settings"]) != (machine, json.loads(json.dumps(settings))):
        raise ValueError(
            f"{RESULT} must hold rows of the same machine and settings to be continued, got others. Move the file away."
        )
    return stored


@dataclass(frozen=True)
class Op:
    """The gated MLP of one format beside the dense one of ONNX Runtime, both opened: a call takes x [tokens, d].
    `tau` are the thresholds of the density; `nmse` is the sparse side's error against the reference.
    """

    case: Any
    tau: Any
    dense: Callable[[Any], Any]
    sparse: Callable[[Any], Any]
    nmse: float


def open_op(name: str, threads: int, folder: Path) -> Op:
    """The op of a format with its files in `folder`. Raises ValueError where its result is not the reference's."""
    from sparsegate.runtime_onnx import library
    from sparsegate.runtime_onnx.bench.gate_case import GateCase
    from sparsegate.runtime_onnx.bench.op import INTEGER_BOUND
    from sparsegate.runtime_onnx.bench.op_graphs import FORMS
    from sparsegate.runtime_onnx.ops import gated_mlp

    folder.mkdir()
    form = FORMS[name]
    case = GateCase(form, *SIZES, 32, folder)
    tau = case.thresholds(DENSITY)
    dense = opened(case.dense(form.baselines[0], folder), threads)
    sparse = opened(case.model("op", tau), threads, library.library_path())
    x = case.pool[:4]
    expected = case.expected(x, tau)
    nmse = float(((sparse(x) - expected) ** 2).sum() / (expected**2).sum())
    bound = gated_mlp.BOUNDS["float32"] if form.weights == "float" else INTEGER_BOUND
    if not nmse <= bound:
        raise ValueError(
            f"The error of {name} must be at most {bound}, got {nmse:.1e}. The kernel is wrong: its speed means "
            "nothing."
        )
    return Op(case, tau, dense, sparse, nmse)


def op_row(op: Op, name: str, count: int, threads: int, evict: Callable[[], Any]) -> dict[str, Any] | None:
    """The row of a number of tokens; None where too few pairs of runs were undisturbed."""
    from sparsegate.runtime_onnx.bench.op_graphs import BASELINES, FORMS
    from sparsegate.runtime_onnx.bench.samples import compare, pairs, quartiles

    pool = op.case.pool
    starts = range(0, len(pool) - count + 1, max(1, (len(pool) - count) // 15))
    inputs = [pool[first : first + count] for first in starts]
    times = pairs(partial(call, op.dense, inputs), partial(call, op.sparse, inputs), PAIRS, PATIENCE, evict)
    if len(times.baseline) < PAIRS:
        print(
            f"{name}, {count} tokens, {threads} threads: {len(times.baseline)} clean pairs of {PAIRS}, not kept",
            flush=True,
        )
        return None
    against = {
        "name": f"ONNX Runtime {BASELINES[FORMS[name].baselines[0]].name}, AVX2",
        "ms": statistics.median(times.baseline) * 1e3,
        **compare(times.baseline, times.candidate),
        "dropped": times.dropped,
    }
    print(f"{name}, {count} tokens, {threads} threads: {against['ratio']:.2f}", flush=True)
    return {
        "format": name,
        "variant": op.case.variant.name,
        "tokens": count,
        "asked": DENSITY,
        "score": "gate",
        "threads": threads,
        "status": "run",
        "density": float(op.case.kept(op.tau).mean()),
        "nmse": op.nmse,
        "ms": statistics.median(times.candidate) * 1e3,
        "quartiles_ms": [value * 1e3 for value in quartiles(times.candidate)],
        "dense": [against],
    }


def measure(threads: int, changed: int) -> None:
    """Adds the rows of a number of threads to the stored result; onnxruntime must be the limited copy."""
    from sparsegate.runtime_onnx.bench.record import record
    from sparsegate.runtime_onnx.bench.stream import Stream

    force_avx2()
    d, n = SIZES
    settings = {"op": "gated_mlp", "d": d, "n": n, "score": "gate", "density": DENSITY, "pairs": PAIRS}
    settings |= {"xgetbv_changed": changed}
    head = record("python tests/bench/benchmarks/avx2_prefill.py") | {"kind": "op", "settings": settings}
    head |= {"isa": "avx2 (forced on both sides)"}
    stored = stored_for(head["machine"], settings)
    rows, models = stored.get("rows", []), {key: stored[key] for key in ("models",) if key in stored}
    have = {(row["format"], row["tokens"], row["threads"]) for row in rows}
    stream = Stream(threads)
    with TemporaryDirectory() as temporary:
        for name in FORMATS:
            missing = [count for count in TOKENS if (name, count, threads) not in have]
            if not missing:
                continue
            op = open_op(name, threads, Path(temporary) / name)
            for count in missing:
                row = op_row(op, name, count, threads, stream.evict)
                if row is None:
                    continue
                rows.append(row)
                rows.sort(key=lambda row: (FORMATS.index(row["format"]), row["threads"], row["tokens"]))
                RESULT.write_text(json.dumps({**head, "rows": rows, **models}, indent=2) + "\n", encoding="utf-8")


def measure_models(threads: int, graphs: Path, name: str) -> None:
    """Sets the rows of whole models in the stored result, whose op rows must be there; onnxruntime must be the limited
    copy.
    """
    import numpy as np
    import onnxruntime

    from sparsegate.runtime_onnx.bench.samples import compare, pairs
    from sparsegate.runtime_onnx.session import Decoder

    force_avx2()
    stored = json.loads(RESULT.read_text(encoding="utf-8"))
    rows = []
    for form, dense in GRAPHS.items():
        opened_models = []
        for folder in (dense, f"sparse_{form}"):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.add_session_config_entry(
                "session.force_spinning_stop", "1"
            )  # the other model's threads would wait for a CPU
            opened_models.append(Decoder(graphs / folder, session_options=options))
        vocabulary = opened_models[0](np.zeros(1, np.int64)).shape[-1]
        for count in PROMPTS:
            ids = np.random.default_rng(count).integers(0, vocabulary, count)

            def prompt(decoder: Decoder, _: int, ids: Any = ids) -> None:
                decoder.reset()
                decoder(ids)

            found = pairs(
                partial(prompt, opened_models[0]), partial(prompt, opened_models[1]), PAIRS, 4 * PATIENCE, lambda: None
            )
            if len(found.baseline) < PAIRS:
                print(
                    f"{name}, {form}, {count} tokens: {len(found.baseline)} clean pairs of {PAIRS}, not kept",
                    flush=True,
                )
                continue
            row = {"format": form, "tokens": count, "threads": threads, "ms": statistics.median(found.candidate) * 1e3}
            rows.append(
                {
                    **row,
                    "dense_ms": statistics.median(found.baseline) * 1e3,
                    **compare(found.baseline, found.candidate),
                    "dropped": found.dropped,
                }
            )
            print(f"{name}, {form}, {count} tokens: {rows[-1]['ratio']:.2f}", flush=True)
    stored["models"] = {"name": name, "rows": rows}
    RESULT.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def call(run: Callable[[Any], Any], inputs: list[Any], number: int) -> None:
    """Call `number`: the inputs come in turns."""
    run(inputs[number % len(inputs)])


def opened(path: Path, threads: int, kernels: Path | None = None) -> Callable[[Any], Any]:
    """What runs a model of one input x."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if kernels:
        options.register_custom_ops_library(str(kernels))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


def main(models: list[str]) -> None:
    """Makes the limited copy and measures with it, one process for each number of threads, and one for whole models."""
    with TemporaryDirectory() as copy:
        changed = limited_onnxruntime(Path(copy))
        paths = os.pathsep.join([copy, *filter(None, [os.environ.get("PYTHONPATH")])])
        for threads in (1, 2):
            subprocess.run(
                [sys.executable, __file__, "op", str(threads), str(changed)],
                env={**os.environ, "PYTHONPATH": paths},
                check=True,
            )
        if models:
            subprocess.run(
                [sys.executable, __file__, "models", *models], env={**os.environ, "PYTHONPATH": paths}, check=True
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["op"]:
        measure(int(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["models"]:
        measure_models(2, Path(sys.argv[2]), sys.argv[3])
    else:
        main(sys.argv[1:])

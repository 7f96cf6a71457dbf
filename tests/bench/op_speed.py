"""Times one GatedMLP op with its predictor against the dense MLP in ONNX Runtime on the CPU, and writes a JSON file and a table made from it.

    python tests/bench/op_speed.py --out tests/bench/results/op_cpu.json

One token, cold weights (a buffer larger than the caches is read before every timed call), a new random selection at every call (a new x: the predictor
itself selects), dense and sparse back to back. A pair counts only if the process's threads waited less than 5 % of both calls for a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from sparsegate.runtime_onnx import library
from sparsegate.runtime_onnx.ops import gated_mlp
from sparsegate.runtime_onnx.ops.gated_mlp import DOMAIN, NAME, ROLES, Variant

COLD_BYTES = 128 << 20
MAX_WAIT = 0.05  # share of a call's wall time
SEED = 7


@dataclass(frozen=True)
class Format:
    """How the sparse op stores its weights and its predictor, and which dense model it is compared with."""

    name: str
    weights: str
    w: str
    p: str
    dense: str


FORMATS = {
    f.name: f
    for f in (
        Format("fp32", "float", "float32", "float32", "fp32"),
        Format("fp32, fp16 predictor", "float", "float32", "float16", "fp32"),
        Format("fp16", "float", "float16", "float16", "fp32"),
        Format("int8_row", "int8_row", "float32", "float16", "fp32"),
        Format("int8_row against int8", "int8_row", "float32", "float16", "int8 (MatMulNBits, blocks of 32)"),
    )
}


def save(folder: Path, name: str, nodes: list[onnx.NodeProto], tensors: dict[str, np.ndarray], d: int) -> Path:
    """Writes a model x [1, d] -> y [1, d] with its weights in an external file, which ORT maps."""
    shape = [1, d]
    io = [helper.make_tensor_value_info(v, onnx.TensorProto.FLOAT, shape) for v in ("x", "y")]
    graph = helper.make_graph(nodes, name, io[:1], io[1:], [numpy_helper.from_array(a, k) for k, a in tensors.items()])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1), helper.make_opsetid("com.microsoft", 1)]
    path = folder / f"{name}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path, save_as_external_data=True, location=f"{name}.data", size_threshold=1024)
    return path


def dense_model(folder: Path, kind: str, weights: dict[str, np.ndarray], d: int, n: int) -> Path:
    """The MLP in ORT's own ops: MatMul, Sigmoid, Mul, or MatMulNBits with 8 bits."""
    tensors, nodes = {}, []

    def product(role: str, x: str, out: str, matrix: np.ndarray) -> None:
        """out = x @ matrix [k, m]."""
        if kind == "fp32":
            tensors[role] = np.ascontiguousarray(matrix)
            nodes.append(helper.make_node("MatMul", [x, role], [out]))
            return
        k, m = matrix.shape
        blocks = np.ascontiguousarray(matrix.T).reshape(m, k // 32, 32)
        scale = np.abs(blocks).max(2) / 127
        tensors[role] = np.clip(np.rint(blocks / scale[..., None]) + 128, 0, 255).astype(np.uint8)
        tensors[f"{role}_scale"] = scale.astype(np.float32)
        attributes = {"K": k, "N": m, "bits": 8, "block_size": 32, "accuracy_level": 4}
        nodes.append(helper.make_node("MatMulNBits", [x, role, f"{role}_scale"], [out], domain="com.microsoft", **attributes))

    product("w_gate", "x", "gate", weights["w_gate"].T)
    product("w_up", "x", "up", weights["w_up"].T)
    nodes += [helper.make_node("Sigmoid", ["gate"], ["s"]), helper.make_node("Mul", ["gate", "s"], ["act"]), helper.make_node("Mul", ["act", "up"], ["z"])]
    product("w_down", "z", "y", weights["w_down"])
    return save(folder, f"dense_{kind[:4]}", nodes, tensors, d)


def sparse_model(folder: Path, form: Format, weights: dict[str, np.ndarray], tau: np.ndarray, d: int) -> tuple[Path, Variant, dict[str, np.ndarray]]:
    """One GatedMLP node, silu, score predictor."""
    tensors: dict[str, np.ndarray] = {"tau": tau}
    for role in ("w_gate", "w_up", "w_down"):
        if form.weights == "float":
            tensors[role] = weights[role].astype(form.w)
        else:
            scale = np.abs(weights[role]).max(1) / 127
            tensors[role] = np.rint(weights[role] / scale[:, None]).astype(np.int8)
            tensors["s" + role[1:]] = scale.astype(np.float32)
    for role in ("p1", "p2"):
        tensors[role] = weights[role].astype(form.p)
    roles = tuple(role for role in ROLES if role in tensors)
    variant = Variant("silu", "predictor", form.weights, roles, w=form.w, p=form.p)
    node = helper.make_node(NAME, ["x", *roles], ["y"], domain=DOMAIN)
    node.attribute.extend(helper.make_attribute(k, v) for k, v in variant.attributes().items())
    return save(folder, "sparse", [node], tensors, d), variant, tensors


def session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle workers of one session must not take the other's CPU
    options.register_custom_ops_library(str(library.library_path()))
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def waited() -> int:
    """Nanoseconds that the threads of this process have waited for a CPU."""
    total = 0
    for task in os.listdir("/proc/self/task"):
        try:
            total += int(Path(f"/proc/self/task/{task}/schedstat").read_text().split()[1])
        except OSError:
            continue
    return total


class Stream:
    """Reads a buffer larger than the caches with all threads: fills the caches with something else, and says how fast memory is at this moment."""

    def __init__(self, threads: int) -> None:
        self.parts = np.array_split(np.ones(COLD_BYTES // 4, np.float32), threads)
        self.pool = ThreadPoolExecutor(threads)

    def read(self) -> float:
        """GB/s of one pass."""
        start = time.perf_counter()
        list(self.pool.map(np.max, self.parts))
        return COLD_BYTES / (time.perf_counter() - start) / 1e9


def timed(run: ort.InferenceSession, x: np.ndarray, stream: Stream) -> tuple[float, float, bool]:
    """Seconds of one call with cold weights, GB/s of the stream just before it, and whether the call was undisturbed."""
    bandwidth = stream.read()
    before, start = waited(), time.perf_counter()
    run.run(None, {"x": x})
    seconds = time.perf_counter() - start
    return seconds, bandwidth, waited() - before < MAX_WAIT * seconds * 1e9


def measure(form: Format, density: float, weights: dict[str, np.ndarray], folder: Path, args: argparse.Namespace) -> dict:
    """One row: medians over clean pairs."""
    d, n, r = args.d, args.n, args.r
    rng = np.random.default_rng(SEED)
    xs = rng.standard_normal((256, 1, d), dtype=np.float32)
    hidden = np.maximum(xs[:, 0] @ weights["p1"].astype(form.p).astype(np.float32).T, 0)
    score = hidden @ weights["p2"].astype(form.p).astype(np.float32).T
    ranked = np.sort(score, axis=0)
    cut = round((1 - density) * len(xs))
    tau = ((ranked[cut - 1] + ranked[cut]) / 2).astype(np.float32) if cut else np.full(n, -1e30, np.float32)
    kept = (score > tau).mean(1)
    overlap = (score[0] > tau)[score[1] > tau].mean() if density < 1 else 1.0
    path, variant, tensors = sparse_model(folder, form, weights, tau, d)
    dense, sparse = session(dense_model(folder, form.dense, weights, d, n), args.threads), session(path, args.threads)
    y, reference = sparse.run(None, {"x": xs[0]})[0], gated_mlp.reference(variant, xs[0], tensors)
    error = float(((y - reference) ** 2).sum() / (reference**2).sum())
    bound = gated_mlp.BOUNDS["float32" if form.weights == "float" else form.weights]
    if not error < bound:
        raise SystemExit(f"NMSE of {form.name} must be below {bound}, got {error}. Fix the kernel before timing it.")
    stream = Stream(args.threads)
    pairs, streams, dropped = [], [], 0
    deadline = time.monotonic() + args.patience
    for i in itertools.count():
        order = (dense, sparse) if i % 2 else (sparse, dense)
        first, second = (timed(s, xs[i % len(xs)], stream) for s in order)
        if i < 4:  # warm-up
            continue
        if first[2] and second[2]:
            streams += [first[1], second[1]]
            pairs.append((first[0], second[0]) if i % 2 else (second[0], first[0]))
        else:
            dropped += 1
        if len(pairs) >= args.pairs or time.monotonic() > deadline:
            break
    if len(pairs) < 15:
        raise SystemExit(f"{form.name} at {density:.0%} must have 15 clean pairs, got {len(pairs)} of {i - 3}. Repeat when the machine is quiet.")
    bandwidth = float(np.median(streams))
    ratios = np.array([a / b for a, b in pairs])
    sparse_ms = float(np.median([b for _, b in pairs])) * 1e3
    read = gated_mlp.traffic(variant, d, n, r, float(kept.mean()))
    return {
        "format": form.name,
        "variant": variant.name,
        "density": round(float(kept.mean()), 4),
        "overlap_of_two_selections": round(float(overlap), 3),
        "dense": f"ONNX Runtime {form.dense}",
        "dense_ms": round(float(np.median([a for a, _ in pairs])) * 1e3, 3),
        "sparse_ms": round(sparse_ms, 3),
        "ratio": round(float(np.median(ratios)), 3),
        "ratio_quartiles": [round(float(q), 3) for q in np.quantile(ratios, [0.25, 0.75])],
        "pairs": len(pairs),
        "pairs_dropped": dropped,
        "bytes": int(read),
        "gb_per_s": round(read / sparse_ms / 1e6, 2),
        "stream_gb_per_s": round(bandwidth, 2),
        "share_of_stream": round(read / sparse_ms / 1e6 / bandwidth, 3),
        "nmse": error,
    }


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), platform.processor())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return f"{os.cpu_count()} CPUs {model}, {memory} GiB, {platform.system()} {platform.machine()}"


def table(result: dict) -> str:
    """Markdown table of a result."""
    shape = f"d = {result['d']}, n = {result['n']}, predictor rank {result['r']}, one token, {result['threads']} threads, cold weights"
    lines = [
        f"GatedMLP on the CPU: {shape}; {result['machine']}, {result['isa']} kernels, ONNX Runtime {result['onnxruntime']}, commit {result['commit']}.",
        "",
        "| weights | density | dense baseline | dense ms | sparse ms | speed against dense (quartiles) | GB/s | share of stream |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["ratio_quartiles"]
        verdict = f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})" + (" not faster" if row["ratio"] <= 1 else "")
        lines.append(
            f"| {row['format']} | {row['density']:.0%} | {row['dense']} | {row['dense_ms']:.2f} | {row['sparse_ms']:.2f} | {verdict} "
            f"| {row['gb_per_s']:.1f} | {row['share_of_stream']:.0%} of {row['stream_gb_per_s']:.1f} |"
        )
    return "\n".join([*lines, "", f"Written by `{result['command']}`.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("--d", 2048), ("--n", 8192), ("--r", 128), ("--threads", 2), ("--pairs", 25), ("--patience", 120)):
        parser.add_argument(flag, type=int, default=default)
    # patience: seconds per row in which enough clean pairs must come together
    parser.add_argument("--density", type=float, nargs="+", default=[1.0, 0.5, 0.2, 0.1, 0.05])
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--out", type=Path, help="JSON file; the table goes beside it with suffix .md")
    args = parser.parse_args()
    rng = np.random.default_rng(SEED)
    shapes = {"w_gate": (args.n, args.d), "w_up": (args.n, args.d), "w_down": (args.n, args.d), "p1": (args.r, args.d), "p2": (args.n, args.r)}
    weights = {role: rng.standard_normal(shape, dtype=np.float32) / shape[1] ** 0.5 for role, shape in shapes.items()}
    weights["p2"] -= weights["p2"].mean(1, keepdims=True)  # relu(P1 x) has a mean: without this two selections would overlap
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    result = {
        "op": NAME,
        **{key: getattr(args, key) for key in ("d", "n", "r", "threads")},
        "machine": machine(),
        "isa": library.isa(),
        "library": library.version(),
        "onnxruntime": ort.__version__,
        "python": platform.python_version(),
        "command": "python " + " ".join([os.path.relpath(sys.argv[0]), *(f'"{a}"' if " " in a else a for a in sys.argv[1:])]),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "rows": [],
    }
    for name in args.formats:
        for density in args.density:
            with tempfile.TemporaryDirectory() as folder:
                row = measure(FORMATS[name], density, weights, Path(folder), args)
            result["rows"].append(row)
            print(json.dumps({k: row[k] for k in ("format", "density", "dense_ms", "sparse_ms", "ratio", "pairs", "gb_per_s", "stream_gb_per_s")}), flush=True)
    text = table(result)
    print(text)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()

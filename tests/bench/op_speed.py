"""Times one op against the dense computation in ONNX Runtime on the CPU, and writes a JSON file and a table made from it.

    python tests/bench/op_speed.py --out tests/bench/results/op_cpu.json
    python tests/bench/op_speed.py --op SparseLinear --n 2048 --out tests/bench/results/linear_cpu.json

GatedMLP with its predictor stands against the dense MLP, SparseLinear against one MatMul [d, n]. One token, cold weights (a buffer larger than the caches is
read before every timed call), a new random selection at every call (a new x: the op itself selects), dense and sparse back to back. A pair counts only
if the process's threads waited less than 5 % of both calls for a CPU.
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
from sparsegate.runtime_onnx.ops import gated_mlp, sparse_linear

DOMAIN = gated_mlp.DOMAIN

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


OPS = {gated_mlp.NAME: list(FORMATS), sparse_linear.NAME: [name for name in FORMATS if "predictor" not in name]}


def save(folder: Path, name: str, nodes: list[onnx.NodeProto], tensors: dict[str, np.ndarray], d: int, out: int) -> Path:
    """Writes a model x [1, d] -> y [1, out] with its weights in an external file, which ORT maps."""
    io = [helper.make_tensor_value_info(v, onnx.TensorProto.FLOAT, [1, width]) for v, width in (("x", d), ("y", out))]
    graph = helper.make_graph(nodes, name, io[:1], io[1:], [numpy_helper.from_array(a, k) for k, a in tensors.items()])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1), helper.make_opsetid("com.microsoft", 1)]
    path = folder / f"{name}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path, save_as_external_data=True, location=f"{name}.data", size_threshold=1024)
    return path


class Dense:
    """A graph of dense products in ORT's own ops: MatMul, or MatMulNBits with 8 bits."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.tensors: dict[str, np.ndarray] = {}
        self.nodes: list[onnx.NodeProto] = []

    def product(self, role: str, x: str, out: str, matrix: np.ndarray) -> None:
        """out = x @ matrix [k, m]."""
        if self.kind == "fp32":
            self.tensors[role] = np.ascontiguousarray(matrix)
            self.nodes.append(helper.make_node("MatMul", [x, role], [out]))
            return
        k, m = matrix.shape
        blocks = np.ascontiguousarray(matrix.T).reshape(m, k // 32, 32)
        scale = np.abs(blocks).max(2) / 127
        self.tensors[role] = np.clip(np.rint(blocks / scale[..., None]) + 128, 0, 255).astype(np.uint8)
        self.tensors[f"{role}_scale"] = scale.astype(np.float32)
        attributes = {"K": k, "N": m, "bits": 8, "block_size": 32, "accuracy_level": 4}
        self.nodes.append(helper.make_node("MatMulNBits", [x, role, f"{role}_scale"], [out], domain="com.microsoft", **attributes))

    def save(self, folder: Path, d: int, out: int) -> Path:
        return save(folder, f"dense_{self.kind[:4]}", self.nodes, self.tensors, d, out)


@dataclass(frozen=True)
class Case:
    """One op beside its dense counterpart: model files, inputs [256, 1, d], realised selection [256, units], fp64 y of the first input, bytes of a token."""

    dense: Path
    sparse: Path
    variant: str
    xs: np.ndarray
    keep: np.ndarray
    expected: np.ndarray
    bytes: float


def quantised(form: Format, role: str, matrix: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of a weight in a format, by role."""
    if form.weights == "float":
        return {role: matrix.astype(form.w)}
    scale = np.abs(matrix).max(1) / 127
    return {role: np.rint(matrix / scale[:, None]).astype(np.int8), f"s{role[1:]}" if role != "w" else "s_w": scale.astype(np.float32)}


def cuts(score: np.ndarray, density: float) -> np.ndarray:
    """Thresholds [units] that keep this share of scores [N, units]."""
    ranked = np.sort(score, axis=0)
    cut = round((1 - density) * len(score))
    return ((ranked[cut - 1] + ranked[cut]) / 2).astype(np.float32) if cut else np.full(score.shape[1], -1e30, np.float32)


def node_model(folder: Path, op: str, variant: gated_mlp.Variant | sparse_linear.Variant, tensors: dict[str, np.ndarray], d: int, out: int) -> Path:
    node = helper.make_node(op, ["x", *variant.inputs], ["y"], domain=DOMAIN)
    node.attribute.extend(helper.make_attribute(k, v) for k, v in variant.attributes().items())
    return save(folder, "sparse", [node], tensors, d, out)


def mlp_case(form: Format, density: float, xs: np.ndarray, folder: Path, args: argparse.Namespace) -> Case:
    """GatedMLP, silu, score predictor, n neurons over d channels."""
    d, n, r = args.d, args.n, args.r
    rng = np.random.default_rng(SEED)
    shapes = {"w_gate": (n, d), "w_up": (n, d), "w_down": (n, d), "p1": (r, d), "p2": (n, r)}
    weights = {role: rng.standard_normal(shape, dtype=np.float32) / shape[1] ** 0.5 for role, shape in shapes.items()}
    weights["p2"] -= weights["p2"].mean(1, keepdims=True)  # relu(P1 x) has a mean: without this two selections would overlap
    dense = Dense(form.dense)
    dense.product("w_gate", "x", "gate", weights["w_gate"].T)
    dense.product("w_up", "x", "up", weights["w_up"].T)
    for op, given, out in (("Sigmoid", ["gate"], "s"), ("Mul", ["gate", "s"], "act"), ("Mul", ["act", "up"], "z")):
        dense.nodes.append(helper.make_node(op, given, [out]))
    dense.product("w_down", "z", "y", weights["w_down"])
    tensors: dict[str, np.ndarray] = {role: weights[role].astype(form.p) for role in ("p1", "p2")}
    for role in ("w_gate", "w_up", "w_down"):
        tensors |= quantised(form, role, weights[role])
    hidden = np.maximum(xs[:, 0] @ tensors["p1"].astype(np.float32).T, 0)
    score = hidden @ tensors["p2"].astype(np.float32).T
    tensors["tau"] = cuts(score, density)
    keep = score > tensors["tau"]
    variant = gated_mlp.Variant("silu", "predictor", form.weights, tuple(role for role in gated_mlp.ROLES if role in tensors), w=form.w, p=form.p)
    expected, read = gated_mlp.reference(variant, xs[0], tensors), gated_mlp.traffic(variant, d, n, r, float(keep.mean()))
    return Case(dense.save(folder, d, d), node_model(folder, gated_mlp.NAME, variant, tensors, d, d), variant.name, xs, keep, expected, read)


def linear_case(form: Format, density: float, xs: np.ndarray, folder: Path, args: argparse.Namespace) -> Case:
    """SparseLinear, d input channels, n outputs."""
    d, n = args.d, args.n
    weight = np.random.default_rng(SEED).standard_normal((d, n), dtype=np.float32) / d**0.5
    dense = Dense(form.dense)
    dense.product("w", "x", "y", weight)
    score = np.abs(xs[:, 0])
    tensors = quantised(form, "w", weight) | {"tau": cuts(score, density)}
    keep = score > tensors["tau"]
    variant = sparse_linear.Variant(form.weights, tuple(role for role in sparse_linear.ROLES if role in tensors), w=form.w)
    expected, read = sparse_linear.reference(variant, xs[0], tensors), sparse_linear.traffic(variant, d, n, float(keep.mean()))
    return Case(dense.save(folder, d, n), node_model(folder, sparse_linear.NAME, variant, tensors, d, n), variant.name, xs, keep, expected, read)


CASES = {gated_mlp.NAME: mlp_case, sparse_linear.NAME: linear_case}


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


def measure(form: Format, density: float, folder: Path, args: argparse.Namespace) -> dict:
    """One row: medians over clean pairs."""
    xs = np.random.default_rng(SEED + 1).standard_normal((256, 1, args.d), dtype=np.float32)
    case = CASES[args.op](form, density, xs, folder, args)
    overlap = case.keep[0][case.keep[1]].mean() if density < 1 else 1.0
    dense, sparse = session(case.dense, args.threads), session(case.sparse, args.threads)
    y = sparse.run(None, {"x": xs[0]})[0]
    error = float(((y - case.expected) ** 2).sum() / (case.expected**2).sum())
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
    return {
        "format": form.name,
        "variant": case.variant,
        "density": round(float(case.keep.mean()), 4),
        "overlap_of_two_selections": round(float(overlap), 3),
        "dense": f"ONNX Runtime {form.dense}",
        "dense_ms": round(float(np.median([a for a, _ in pairs])) * 1e3, 3),
        "sparse_ms": round(sparse_ms, 3),
        "ratio": round(float(np.median(ratios)), 3),
        "ratio_quartiles": [round(float(q), 3) for q in np.quantile(ratios, [0.25, 0.75])],
        "pairs": len(pairs),
        "pairs_dropped": dropped,
        "bytes": int(case.bytes),
        "gb_per_s": round(case.bytes / sparse_ms / 1e6, 2),
        "stream_gb_per_s": round(bandwidth, 2),
        "share_of_stream": round(case.bytes / sparse_ms / 1e6 / bandwidth, 3),
        "nmse": error,
    }


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), platform.processor())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return f"{os.cpu_count()} CPUs {model}, {memory} GiB, {platform.system()} {platform.machine()}"


def table(result: dict) -> str:
    """Markdown table of a result."""
    rank = f", predictor rank {result['r']}" if result["op"] == gated_mlp.NAME else ""
    shape = f"d = {result['d']}, n = {result['n']}{rank}, one token, {result['threads']} threads, cold weights"
    lines = [
        f"{result['op']} on the CPU: {shape}; {result['machine']}, {result['isa']} kernels, ONNX Runtime {result['onnxruntime']}, commit {result['commit']}.",
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
    parser.add_argument("--op", choices=list(OPS), default=gated_mlp.NAME)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), help="all that the op has, unless given")
    parser.add_argument("--out", type=Path, help="JSON file; the table goes beside it with suffix .md")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    result = {
        "op": args.op,
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
    for name in args.formats or OPS[args.op]:
        for density in args.density:
            with tempfile.TemporaryDirectory() as folder:
                row = measure(FORMATS[name], density, Path(folder), args)
            result["rows"].append(row)
            print(json.dumps({k: row[k] for k in ("format", "density", "dense_ms", "sparse_ms", "ratio", "pairs", "gb_per_s", "stream_gb_per_s")}), flush=True)
    text = table(result)
    print(text)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()

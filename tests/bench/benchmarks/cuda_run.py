"""Everything about the CUDA kernels that needs a GPU, in one command: builds them, checks them, and times decode and
prefill against the dense MLP.

    python tests/bench/benchmarks/cuda_run.py --out tests/bench/results/cuda.json

Needs nvcc, g++, torch with CUDA, and what the package's ops need (numpy, onnx, ml_dtypes); neither onnxruntime with
CUDA nor an installed sparsegate. The kernels are built with the entry of tests/runtime_onnx/cuda_emulation and run on
torch's memory and stream:

correctness   every case of tests/runtime_onnx/cuda_cases.py against the float64 reference, twice for the same bits,
with its negative control
    bandwidth     a device-to-device copy, bytes read plus bytes written
    decode        a CUDA graph of several layers with weights of their own (so that the caches are cold), one token, a
    forced density, dense and sparse
                  replayed in turns; medians of CUDA events
    prefill       the same, one layer, for several numbers of tokens

Dense is torch's (cuBLAS): three products and two elementwise kernels in float16. Where onnxruntime has CUDA its dense
MLP is timed too, once, after the rest: wall time of a run with a CUDA graph, by layer.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
for folder in ("typing_root", "tests", "tests/runtime_onnx"):
    sys.path.insert(0, str(ROOT / folder))

import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from cuda_cases import LINEAR_CASES, MLP_CASES, check_linear, check_mlp, linear, mlp, run_linear, run_mlp  # noqa: E402
from cuda_emulation.emulation import HERE, KERNELS, SHARED, SOURCES, TYPES  # noqa: E402

from sparsegate.runtime_onnx.bench.record import record  # noqa: E402
from sparsegate.runtime_onnx.ops.gated_mlp import ROLES, Variant, traffic  # noqa: E402

DECODE = Variant(
    "silu", "predictor", "float", ("w_gate", "w_up", "w_down", "tau", "p1", "p2"), "float16", "float16", "float16"
)


def build(folder: Path) -> Path:
    """The kernels for this GPU, with nvcc."""
    major, minor = torch.cuda.get_device_capability()
    library = folder / "cuda_kernels.so"
    sources = [str(SOURCES / name) for name in (*KERNELS, *SHARED)] + [str(HERE / "entry.cc")]
    options = [
        "-std=c++17",
        "-O3",
        f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}",
        "-t",
        "0",
        "-shared",
        "-Xcompiler",
        "-fPIC",
        "-x",
        "cu",
    ]
    subprocess.run(["nvcc", *options, f"-I{SOURCES}", *sources, "-o", str(library)], check=True)
    return library


class Op:
    """One op with its tensors on the GPU; `launch` queues it on torch's current stream."""

    def __init__(
        self,
        library: ctypes.CDLL,
        op: str,
        variant: str,
        roles: tuple[str, ...],
        tensors: dict[str, torch.Tensor],
        types: dict[str, int],
    ) -> None:
        self._function = getattr(library, f"run_{op}")
        self._function.restype = ctypes.c_char_p
        self._held, count = tensors, len(roles)
        dims = [(*tensors[role].shape, 0)[:2] if role in tensors else (0, 0) for role in roles]
        self._fixed = (
            variant.encode(),
            (ctypes.c_void_p * count)(*[tensors[role].data_ptr() if role in tensors else None for role in roles]),
            (ctypes.c_int * count)(*[types.get(role, 0) for role in roles]),
            (ctypes.c_int64 * (2 * count))(*[size for pair in dims for size in pair]),
        )
        self._scratch: torch.Tensor | None = None

    def _call(self, x: torch.Tensor, y: torch.Tensor, scratch: int | None) -> int:
        needed = ctypes.c_int64()
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        rest = (ctypes.c_int64(x.shape[0]), ctypes.c_void_p(scratch), ctypes.byref(needed), stream)
        wrong = self._function(*self._fixed, ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), *rest)
        if wrong:
            raise RuntimeError(wrong.decode())
        return needed.value

    def reserve(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Scratch memory for this number of tokens, filled with NaN."""
        self._scratch = torch.full((self._call(x, y, None) + 256,), 0xFF, dtype=torch.uint8, device="cuda")

    def launch(self, x: torch.Tensor, y: torch.Tensor) -> None:
        assert self._scratch is not None
        self._call(x, y, self._scratch.data_ptr())


def on_gpu(array: np.ndarray) -> torch.Tensor:
    """The array's bytes on the GPU; bfloat16 as int16."""
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array.view(np.int16) if array.dtype == ml_dtypes.bfloat16 else array).cuda()


def runner(library: ctypes.CDLL) -> Callable[..., np.ndarray]:
    """`run` of cuda_cases.py on the GPU."""

    def run(
        op: str, variant: str, roles: tuple[str, ...], tensors: dict[str, np.ndarray], x: np.ndarray, width: int
    ) -> np.ndarray:
        made = Op(
            library,
            op,
            variant,
            roles,
            {k: on_gpu(v) for k, v in tensors.items()},
            {k: TYPES[str(v.dtype)] for k, v in tensors.items()},
        )
        rows, seen = on_gpu(x), []
        for _ in range(2):
            y = on_gpu(np.zeros((len(x), width), x.dtype))
            made.reserve(rows, y)
            made.launch(rows, y)
            torch.cuda.synchronize()
            seen.append(y.cpu().numpy())
        assert seen[0].tobytes() == seen[1].tobytes(), "two runs differ"
        return seen[0].view(x.dtype)

    return run


def correctness(library: ctypes.CDLL) -> dict[str, Any]:
    """NMSE per case and what failed."""
    run, errors, problems = runner(library), {}, []
    checks: list[tuple[str, Callable[[], float]]] = []
    for case in MLP_CASES:
        checks.append(
            (
                str(case),
                lambda case=case: (
                    (lambda v, t, x: check_mlp(v, t, x, run_mlp(run, v, t, x)))(*mlp(case)) if case.n > 1 else 0.0
                ),
            )
        )
    for given in LINEAR_CASES:
        name = "linear-" + "-".join(map(str, given.values()))
        checks.append(
            (
                name,
                lambda given=given: (lambda v, t, x: check_linear(v, t, x, run_linear(run, v, t, x)))(*linear(**given)),
            )
        )
    for name, check in checks:
        try:
            errors[name] = check()
        except (AssertionError, RuntimeError) as error:
            problems.append(f"{name}: {str(error).splitlines()[0] if str(error) else 'outside the bound'}")
    return {"cases": len(checks), "problems": problems, "nmse": errors}


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy of 2 GB, read plus written: the median of 20."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / 1e9 / float(np.median([events(lambda: target.copy_(source)) for _ in range(21)][1:]))


def events(work: Callable[[], object]) -> float:
    """Seconds between two CUDA events around the work."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def graph_of(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The work, captured after a first run."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


class Layer:
    """Random weights of one MLP, and thresholds that keep this share of the neurons for its x."""

    def __init__(self, library: ctypes.CDLL, d: int, n: int, r: int, tokens: int, density: float) -> None:
        make = {"dtype": torch.float16, "device": "cuda"}
        self.x = torch.randn(tokens, d, **make)
        self.y = torch.empty_like(self.x)
        self.weights = {role: torch.randn(n, d, **make) / d**0.5 for role in ("w_gate", "w_up", "w_down")}
        p1, p2 = torch.randn(r, d, **make) / d**0.5, torch.randn(n, r, **make) / r**0.5
        scores = torch.relu(self.x.float() @ p1.float().T) @ p2.float().T
        tau = (
            torch.quantile(scores, 1 - density, dim=0)
            if tokens > 1
            else torch.quantile(scores[0], 1 - density).expand(n)
        )
        self.density = float((scores > tau).float().mean())
        tensors = {**self.weights, "tau": tau.float().contiguous(), "p1": p1, "p2": p2}
        types = {role: TYPES["float32" if role == "tau" else "float16"] for role in tensors}
        self.op = Op(library, "gated_mlp", DECODE.name, ROLES, tensors, types)
        self.op.reserve(self.x, self.y)

    def sparse(self) -> None:
        self.op.launch(self.x, self.y)

    def dense(self) -> None:
        w = self.weights
        gate = torch.nn.functional.silu(torch.nn.functional.linear(self.x, w["w_gate"]))
        torch.mm(gate * torch.nn.functional.linear(self.x, w["w_up"]), w["w_down"], out=self.y)


def pairs(dense: torch.cuda.CUDAGraph, sparse: torch.cuda.CUDAGraph, count: int) -> tuple[float, float, list[float]]:
    """Median seconds of each, replayed in turns, and the quartiles of the pairs' ratios."""
    for graph in (dense, sparse):
        graph.replay()
    seconds = np.array([[events(dense.replay), events(sparse.replay)] for _ in range(count)])
    ratios = np.quantile(seconds[:, 0] / seconds[:, 1], [0.25, 0.5, 0.75])
    return float(np.median(seconds[:, 0])), float(np.median(seconds[:, 1])), [round(float(q), 3) for q in ratios]


def onnxruntime_dense(d: int, n: int, layers: int) -> float | None:
    """Seconds of one dense float16 MLP in onnxruntime, one token, in a CUDA graph of several layers with weights of
    their own; None without CUDA there.
    """
    import onnxruntime as ort
    from onnx import TensorProto, helper

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return None
    half, shapes, nodes, value = TensorProto.FLOAT16, {"x": [1, d]}, [], "x"
    for i in range(layers):
        shapes |= {f"gate{i}": [d, n], f"up{i}": [d, n], f"down{i}": [n, d]}
        for op, inputs, output in (
            ("MatMul", [value, f"gate{i}"], f"g{i}"),
            ("Sigmoid", [f"g{i}"], f"s{i}"),
            ("Mul", [f"g{i}", f"s{i}"], f"a{i}"),
            ("MatMul", [value, f"up{i}"], f"u{i}"),
            ("Mul", [f"a{i}", f"u{i}"], f"z{i}"),
            ("MatMul", [f"z{i}", f"down{i}"], f"y{i}"),
        ):
            nodes.append(helper.make_node(op, inputs, [output]))
        value = f"y{i}"
    given = [helper.make_tensor_value_info(name, half, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "dense", given, [helper.make_tensor_value_info(value, half, [1, d])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    session = ort.InferenceSession(model, providers=[("CUDAExecutionProvider", {"enable_cuda_graph": "1"})])
    if session.get_providers()[0] != "CUDAExecutionProvider":
        return None
    held = {
        name: torch.randn(shape, dtype=torch.float16, device="cuda") / shape[0] ** 0.5 for name, shape in shapes.items()
    }
    y, binding = torch.empty(1, d, dtype=torch.float16, device="cuda"), session.io_binding()
    for name, tensor in held.items():
        binding.bind_input(name, "cuda", 0, np.float16, shapes[name], tensor.data_ptr())
    binding.bind_output(value, "cuda", 0, np.float16, [1, d], y.data_ptr())
    torch.cuda.synchronize()
    for _ in range(3):
        session.run_with_iobinding(binding)
    start = time.perf_counter()  # the session has a stream of its own; a run returns when it is done
    for _ in range(40):
        session.run_with_iobinding(binding)
    return (time.perf_counter() - start) / 40 / layers


def timings(library: ctypes.CDLL, d: int, n: int, r: int, layers: int, copy: float) -> list[dict[str, Any]]:
    """Rows of decode and prefill."""
    rows = []
    points = [(1, density, layers) for density in (1.0, 0.5, 0.2, 0.1)] + [
        (tokens, 0.2, 1) for tokens in (2, 4, 8, 64, 512)
    ]
    for tokens, density, depth in points:
        stack = [Layer(library, d, n, r, tokens, density) for _ in range(depth)]
        with torch.inference_mode():
            dense, sparse = (
                graph_of(lambda stack=stack: [layer.dense() for layer in stack] and None),
                graph_of(lambda stack=stack: [layer.sparse() for layer in stack] and None),
            )
            slow, fast, ratios = pairs(dense, sparse, 40)
        needed = traffic(DECODE, d, n, r, float(np.mean([layer.density for layer in stack])))
        row = {
            "tokens": tokens,
            "density": round(stack[0].density, 4),
            "layers": depth,
            "dense_us": slow / depth * 1e6,
            "sparse_us": fast / depth * 1e6,
        }
        row |= {"ratio": ratios[1], "quartiles": ratios, "dense_gb_per_s": 6 * n * d / (slow / depth) / 1e9}
        if tokens == 1:
            row |= {
                "sparse_gb_per_s": needed / (fast / depth) / 1e9,
                "share_of_copy": needed / (fast / depth) / 1e9 / copy,
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
        del stack, dense, sparse
        torch.cuda.empty_cache()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--n", type=int, default=14336)
    parser.add_argument("--r", type=int, default=128)
    parser.add_argument(
        "--layers",
        type=int,
        default=8,
        help="of the decode graph: their weights must be many times the second-level cache",
    )
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch must see a GPU, got none. Run this on a machine with one.")
        return 1
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(build(Path(folder))))
        result: dict[str, Any] = {
            **record(),
            "gpu": torch.cuda.get_device_name(),
            "torch_cuda": torch.version.cuda,
            "variant": DECODE.name,
        }
        result["correctness"] = correctness(library)
        print(
            f"{result['correctness']['cases']} cases, {len(result['correctness']['problems'])} problems",
            *result["correctness"]["problems"],
            sep="\n  ",
        )
        result["copy_gb_per_s"] = copy_bandwidth()
        print(f"copy {result['copy_gb_per_s']:.0f} GB/s")
        result["shape"] = {"d": given.d, "n": given.n, "r": given.r}
        result["rows"] = timings(library, given.d, given.n, given.r, given.layers, result["copy_gb_per_s"])
        dense = onnxruntime_dense(given.d, given.n, given.layers)
        result["onnxruntime_dense_us"] = dense and dense * 1e6
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(result["correctness"]["problems"]))


if __name__ == "__main__":
    sys.exit(main())

"""The CUDA kernels of both ops: their source on the emulation of cuda_emulation/ everywhere, and through ONNX Runtime
where it has a GPU.
"""

from __future__ import annotations

import ctypes
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from cuda_cases import (
    CUDA,
    LINEAR_CASES,
    MLP_CASES,
    Mlp,
    Run,
    bound,
    check_linear,
    check_mlp,
    linear,
    mlp,
    run_linear,
    run_mlp,
)
from cuda_emulation import emulation
from op_harness.sessions import make_model, nmse

from sparsegate.runtime_onnx import library
from sparsegate.runtime_onnx.ops import gated_mlp, sparse_linear
from sparsegate.runtime_onnx.ops.gated_mlp import active, emulate, scores


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> emulation.Emulation:
    if not emulation.compiler():
        pytest.skip("the emulation of the CUDA kernels needs g++")
    return emulation.Emulation(emulation.build(tmp_path_factory.mktemp("cuda_emulation")))


@pytest.fixture
def run(emulated: emulation.Emulation) -> Run:
    return emulated.run


# emulation: the kernels' own source, threads as fibers


@pytest.mark.parametrize("case", MLP_CASES, ids=str)
def test_gated_mlp_is_the_reference(emulated: emulation.Emulation, case: Mlp) -> None:
    """Within the bound; the same bits when threads and blocks run in falling order, so no barrier is missing where it
    would show.
    """
    variant, tensors, x = mlp(case)
    y = run_mlp(emulated.run, variant, tensors, x)
    if case.n > 1:
        check_mlp(variant, tensors, x, y)
    assert nmse(y, emulate(variant, x, tensors, CUDA)) < bound(variant)
    if case.tokens < 100:
        assert run_mlp(partial(emulated.run, reverse=True), variant, tensors, x).tobytes() == y.tobytes()


@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_sparse_linear_is_the_reference(emulated: emulation.Emulation, case: dict) -> None:
    variant, tensors, x = linear(**case)
    y = run_linear(emulated.run, variant, tensors, x)
    check_linear(variant, tensors, x, y)
    if case["tokens"] < 100:
        assert run_linear(partial(emulated.run, reverse=True), variant, tensors, x).tobytes() == y.tobytes()


@pytest.mark.parametrize("weights", ["float", "int4_g32"])
@pytest.mark.parametrize(("few", "many"), [(1, 4), (5, 131)])
def test_a_token_does_not_depend_on_the_others(run: Run, few: int, many: int, weights: str) -> None:
    """Bit for bit within a path, in both ops; 131 tokens are two tiles."""
    dtype = "float16" if weights == "float" else "float32"
    variant, tensors, x = mlp(Mlp(many, weights=weights, x="float16", w=dtype, p="float16", res=True, d=64, n=72))
    assert (run_mlp(run, variant, tensors, x)[-few:] == run_mlp(run, variant, tensors, x[-few:])).all()
    sparse, given, rows = linear(many, weights, "float16", dtype, d_in=70, d_out=64)
    assert (run_linear(run, sparse, given, rows)[-few:] == run_linear(run, sparse, given, rows[-few:])).all()


@pytest.mark.parametrize("tokens", [1, 7])
def test_active_set_is_exact(run: Run, tokens: int) -> None:
    """Gate and up are 1, w_down is the identity: y is the mask itself."""
    variant, tensors, x = mlp(
        Mlp(tokens, activation="identity", x="float16", w="float16", p="float16", bias=True, d=97, n=97)
    )
    tensors |= {role: np.zeros_like(tensors[role]) for role in ("w_gate", "w_up", "b_down")} | {
        "w_down": np.eye(97, dtype=np.float16)
    }
    tensors |= {role: np.ones_like(tensors[role]) for role in ("b_gate", "b_up")}
    keep = active(variant, x, tensors)
    assert 0.2 < keep.mean() < 0.4
    np.testing.assert_array_equal(run_mlp(run, variant, tensors, x), keep.astype(np.float16))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("score", ["predictor", "gate"])
def test_a_score_at_the_threshold_is_not_kept(run: Run, score: str, tokens: int) -> None:
    """Small integers, so that scores are exact: at tau dropped, one step below tau kept."""
    variant, tensors, x = mlp(
        Mlp(
            tokens,
            score,
            "identity",
            x="float16",
            w="float16",
            p="float16" if score == "predictor" else "float32",
            d=24,
            n=40,
            r=6,
        )
    )
    rng = np.random.default_rng(3)
    x = np.repeat(rng.integers(-3, 4, (1, 24)), tokens, 0).astype(np.float16)
    x[:, 0] = 1
    for role in set(tensors) & {"w_gate", "w_up", "p1", "p2"}:
        tensors[role] = rng.integers(-3, 4, tensors[role].shape).astype(tensors[role].dtype)
        if role[0] == "w":
            tensors[role][:, 0] = 100  # no product is 0
    tensors["w_down"] = np.eye(40, 24, dtype=np.float16)
    at = scores(variant, x, tensors)[0].astype(np.float32)
    for tau, kept in ((at, False), (np.nextafter(at, np.float32(-np.inf)), True)):
        assert ((run_mlp(run, variant, {**tensors, "tau": tau}, x) != 0) == kept).all()


@pytest.mark.parametrize("tokens", [2, 7])
def test_a_dropped_neuron_reaches_no_result(run: Run, tokens: int) -> None:
    """NaN in rows that no token keeps. (Prefill multiplies rows of w_down that another token keeps by 0, and those
    beside them.)
    """
    variant, tensors, x = mlp(Mlp(tokens, x="float16", w="float16", p="float16", d=40, n=200))
    tensors["tau"][:64] = np.inf  # of a whole tile
    keep = active(variant, x, tensors)
    assert keep.any(0)[64:].any()
    clean = run_mlp(run, variant, tensors, x)
    dropped = np.flatnonzero(~keep.any(0))
    assert dropped.size > 64
    for role, rows in {"w_gate": dropped, "w_up": dropped, "w_down": np.arange(64)}.items():
        broken = tensors[role].copy()
        broken[rows] = np.nan
        assert (run_mlp(run, variant, {**tensors, role: broken}, x) == clean).all()
    broken = tensors["w_gate"].copy()
    broken[np.flatnonzero(keep[0])[0]] = np.nan
    assert np.isnan(run_mlp(run, variant, {**tensors, "w_gate": broken}, x)[0]).all()


@pytest.mark.parametrize("tokens", [2, 7])
def test_launches_do_not_depend_on_the_data(emulated: emulation.Emulation, tokens: int) -> None:
    """As a CUDA graph needs it; with nothing kept y is the bias."""
    variant, tensors, x = mlp(Mlp(tokens, bias=True, d=40, n=70))
    counts = []
    for tau in (-np.inf, np.inf):
        before = emulated.launches()
        y = run_mlp(emulated.run, variant, {**tensors, "tau": np.full(70, tau, np.float32)}, x)
        counts.append(emulated.launches() - before)
    assert counts[0] == counts[1] > 2
    np.testing.assert_array_equal(y, np.repeat(tensors["b_down"][None], tokens, 0))


def test_several_passes_are_one(run: Run) -> None:
    """More tokens than prefill takes at once: the last ones are a pass of their own."""
    variant, tensors, x = mlp(Mlp(515, "all", x="float16", w="float16", d=8, n=8))
    y = run_mlp(run, variant, tensors, x)
    check_mlp(variant, tensors, x, y)
    assert (y[:3] == run_mlp(run, variant, tensors, x[:7])[:3]).all()
    assert (y[-7:] == run_mlp(run, variant, tensors, x[-7:])).all()


TOY = """
#include "cuda_runtime.h"
__global__ void shift(int mode, int* out) {
  static int seat[64];
  seat[threadIdx.x] = 100 + threadIdx.x;
  if (mode == 1) __syncthreads();
  if (mode == 2 && threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = seat[63 - threadIdx.x];
  if (mode != 2) __syncthreads();
  seat[threadIdx.x] = 0;
}
extern "C" const char* toy(int mode, int* out) {
  cudaLaunchConfig_t config;
  config.gridDim = 1;
  config.blockDim = 64;
  cudaLaunchKernelEx(&config, shift, mode, out);
  return cudaGetLastError() == cudaSuccess ? nullptr : cudaGetErrorString(cudaGetLastError());
}
"""


def test_the_emulation_finds_a_missing_barrier(tmp_path: Path) -> None:
    """The order of threads shows it (mode 0), and threads that wait in different places are an error (mode 2); with the
    barrier (mode 1) all is well.
    """
    if not emulation.compiler():
        pytest.skip("the emulation of the CUDA kernels needs g++")
    source, built = tmp_path / "toy.cc", tmp_path / "toy.so"
    source.write_text(TOY)
    command = [
        emulation.compiler(),
        "-std=c++17",
        "-shared",
        "-fPIC",
        f"-I{emulation.HERE}",
        str(source),
        str(emulation.HERE / "emulator.cc"),
        "-o",
        str(built),
    ]
    subprocess.run(list(map(str, command)), check=True)
    toy = ctypes.CDLL(str(built))
    toy.toy.restype = ctypes.c_char_p

    def call(mode: int, reverse: bool) -> tuple[list[int], bytes | None]:
        out = (ctypes.c_int * 64)()
        toy.set_reversed(ctypes.c_int(reverse))
        return list(out), toy.toy(mode, out) if mode == 2 else (toy.toy(mode, out), list(out))[1]

    right = [163 - i for i in range(64)]
    assert call(1, False)[1] == call(1, True)[1] == right
    assert call(0, False)[1] != call(0, True)[1]
    assert b"different places" in (call(2, False)[1] or b"")


# a GPU


@pytest.fixture(scope="module")
def gpu() -> None:
    """Skips where onnxruntime cannot run on a GPU or the library has no CUDA kernels."""
    if CUDA not in ort.get_available_providers():
        pytest.skip("onnxruntime has no CUDA provider")
    variant, tensors, _ = mlp(Mlp(1, "all", d=8, n=8))
    if not library.supports(variant.name, CUDA):
        pytest.skip("the library was built without CUDA")
    if open_cuda(make_model(gated_mlp, variant, tensors)).get_providers()[0] != CUDA:
        pytest.skip("no GPU")


def open_cuda(model: bytes, **options: str) -> ort.InferenceSession:
    session = ort.SessionOptions()
    session.log_severity_level = 4
    session.register_custom_ops_library(str(library.library_path()))
    return ort.InferenceSession(model, session, providers=[(CUDA, options), "CPUExecutionProvider"])


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("case", MLP_CASES, ids=str)
def test_gated_mlp_on_a_gpu(case: Mlp) -> None:
    variant, tensors, x = mlp(case)
    session = open_cuda(make_model(gated_mlp, variant, tensors))
    y = session.run(None, {"x": x.astype(np.float32)})[0]
    assert nmse(y, emulate(variant, x, tensors, CUDA)) < bound(variant)
    np.testing.assert_array_equal(session.run(None, {"x": x.astype(np.float32)})[0], y)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_sparse_linear_on_a_gpu(case: dict) -> None:
    variant, tensors, x = linear(**case)
    session = open_cuda(make_model(sparse_linear, variant, tensors))
    check_linear(variant, tensors, x, session.run(None, {"x": x.astype(np.float32)})[0])


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("score", ["predictor", "gate"])
def test_a_cuda_graph_replays_other_selections(score: str, tokens: int) -> None:
    """One graph, three inputs with selections of their own, each with the bits of a run without a graph."""
    p = "float16" if score == "predictor" else "float32"
    variant, tensors, x = mlp(Mlp(tokens, score, x="float16", w="float16", p=p, d=256, n=1024))
    model = make_model(gated_mlp, variant, tensors)
    plain, graph = open_cuda(model), open_cuda(model, enable_cuda_graph="1")
    shape = list(x.shape)
    given = ort.OrtValue.ortvalue_from_numpy(x.astype(np.float32), "cuda", 0)
    taken = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cuda", 0)
    binding = graph.io_binding()
    binding.bind_ortvalue_input("x", given)
    binding.bind_ortvalue_output("y", taken)
    seen = []
    for seed in range(4):
        rows = np.random.default_rng(seed).standard_normal(shape).astype(np.float16).astype(np.float32)
        given.update_inplace(rows)
        graph.run_with_iobinding(binding)
        np.testing.assert_array_equal(taken.numpy(), plain.run(None, {"x": rows})[0])
        seen.append(active(variant, rows, tensors).tobytes())
    assert len(set(seen)) == 4

"""The native library: exports, what it says it supports, builds per instruction set, error statuses, threads."""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from op_harness.gated_mlp import OP, make_tensors, make_variant, make_x, with_tau
from op_harness.sessions import make_model, nmse, open_model, run

from sparsegate.runtime_onnx import library
from sparsegate.runtime_onnx.ops import OPS
from sparsegate.runtime_onnx.ops.activation import spell_activation, split_activation
from sparsegate.runtime_onnx.ops.gated_mlp import FLOATS, ROLES, SCORES, Variant, reference
from sparsegate.runtime_onnx.ops.vocabulary import ACTIVATIONS, WEIGHTS

ROOT = Path(__file__).parents[2]
CPU, CUDA = library.PROVIDERS


def test_every_op_has_its_source_and_its_tests() -> None:
    lines = (ROOT / "runtime_onnx/csrc/ops.inc").read_text()
    for stem, module in OPS.items():
        assert module == f"sparsegate.runtime_onnx.ops.{stem}"
        assert (ROOT / f"runtime_onnx/csrc/{stem}.cc").is_file() and (
            ROOT / f"tests/runtime_onnx/test_{stem}.py"
        ).is_file()
        assert f"{stem}_cpu" in lines


def test_version_is_the_project_s() -> None:
    line = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert line and library.version() == line[1]


SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2"}


def dynamic_entries(path: Path, tag: str) -> list[str]:
    """Values of the dynamic section's entries of one tag: NEEDED or SONAME."""
    text = subprocess.run(["readelf", "-dW", str(path)], capture_output=True, text=True, check=True).stdout
    return re.findall(rf"\({tag}\).*\[(.*)\]", text)


@pytest.mark.skipif(not shutil.which("readelf") or sys.platform != "linux", reason="needs readelf")
def test_links_nothing_of_onnx_runtime_or_cuda() -> None:
    assert set(dynamic_entries(library.library_path(), "NEEDED")) <= SYSTEM_LIBRARIES
    assert dynamic_entries(library.library_path(), "SONAME") == [library.LIBRARY]


PARAMETRIC_TEXTS = (
    "fatrelu(0.01)",
    "shifted_relu(-1.0)",
    "shifted_relu(0.5)",
    "fatrelu(1)",
    "fatrelu(0.010)",
    "fatrelu(-0.1)",
    "fatrelu",
    "relu(0.0)",
)


def random_variant(rng: random.Random) -> tuple[str, ...]:
    """Fields of a variant that may be wrong in its roles or dtypes."""
    roles = set(ROLES[:3])
    score, weights = rng.choice(SCORES), rng.choice(WEIGHTS)
    if score in ("predictor", "gate"):
        roles.add("tau")
    if score == "predictor":
        roles |= {"p1", "p2"}
    if weights != "float":
        roles |= {"s_gate", "s_up", "s_down"}
    if rng.random() < 0.3:
        roles -= {"w_gate", "s_gate"}
    p = rng.choice((*FLOATS, "int8")) if "p1" in roles and rng.random() < 0.5 else "float32"
    if p == "int8":
        roles |= {"s_p1", "s_p2"}
    for _ in range(rng.choice((0, 0, 1, 2))):
        roles ^= {rng.choice(ROLES)}
    w = rng.choice(FLOATS) if weights == "float" or rng.random() < 0.1 else "float32"
    return (
        rng.choice((*ACTIVATIONS, *PARAMETRIC_TEXTS)),
        score,
        weights,
        "+".join(role for role in ROLES if role in roles),
        rng.choice(FLOATS),
        w,
        p,
    )


def test_library_and_python_accept_the_same_variants() -> None:
    rng = random.Random(5)
    seen = {True: 0, False: 0}
    for _ in range(4000):
        activation, score, weights, roles, x, w, p = random_variant(rng)
        try:
            Variant(activation, score, weights, tuple(roles.split("+")), x, w, p)
            good = True
        except ValueError:
            good = False
        name = f"GatedMLP.1/{activation}/{score}/{weights}/x={x},w={w},p={p}/{roles}"
        assert library.supports(name, CPU) == good, name
        seen[good] += 1
    assert min(seen.values()) > 1000


def test_library_and_python_spell_parameters_alike() -> None:
    rng = np.random.default_rng(6)
    name = make_variant("relu", "exact").name
    values = [0.0, 1e-40, 1e6, 0.1, 16777217.0 / 1024, *(10.0 ** rng.uniform(-8, 5, 40) * rng.choice([1.0, -1.0], 40))]
    texts = [spell_activation("shifted_relu", value) for value in values]
    texts += (
        [text.replace(".", ".0") for text in texts]
        + [text.replace(")", "0)") for text in texts]
        + [text.replace(")", "1)") for text in texts]
    )
    texts += [
        "fatrelu(-1.0)",
        "fatrelu(1000001.0)",
        "fatrelu( 1.0)",
        "fatrelu(1.0",
        "fatrelu(1.0))",
        "fatrelu()",
        "fatrelu(.5)",
        "fatrelu(5.)",
        "fatrelu(1e2)",
    ]
    good = []
    for text in texts:
        try:
            split_activation(text)
            good.append(True)
        except ValueError:
            good.append(False)
    assert [library.supports(name.replace("relu", text), CPU) for text in texts] == good
    assert sum(good) >= len(values) and good.count(False) > 2 * len(values)


# CUDA


def test_cuda_kernels_are_built_on_request_alone() -> None:
    text = (ROOT / "runtime_onnx/csrc/CMakeLists.txt").read_text()
    assert re.search(r"option\(SPARSEGATE_CUDA .* OFF\)", text)
    listed = re.search(r"target_sources\(sparsegate_onnx PRIVATE\s([^)]*\.cu)\)", text)
    assert listed and sorted(listed[1].split()) == sorted(
        path.name for path in (ROOT / "runtime_onnx/csrc").glob("*.cu")
    )
    assert library.has_cuda() == (CUDA.encode() in library.library_path().read_bytes())


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
def test_library_builds_with_cuda(tmp_path: Path) -> None:
    """With nvcc it claims the CUDA kernels and still needs no library of CUDA's; without it the configuration says what
    to do.
    """
    configure = ["cmake", "-S", str(ROOT / "runtime_onnx/csrc"), "-B", str(tmp_path), "-DSPARSEGATE_CUDA=ON"]
    done = subprocess.run(configure, capture_output=True, text=True, check=False)
    if not shutil.which("nvcc") and "CUDACXX" not in os.environ:
        assert done.returncode and "must have a CUDA compiler, got none" in " ".join(done.stderr.split())
        pytest.skip("needs nvcc")
    assert done.returncode == 0, done.stderr
    subprocess.run(["cmake", "--build", str(tmp_path), "--parallel", "2"], check=True, capture_output=True)
    built = tmp_path / library.LIBRARY
    handle = library._open(built)
    variant = Variant("silu", "gate", "float", ("w_gate", "w_up", "w_down", "tau"), x="float16", w="float16")
    assert handle.sparsegate_supports(variant.name.encode(), CUDA.encode()) and handle.sparsegate_supports(
        variant.name.encode(), CPU.encode()
    )
    assert not shutil.which("readelf") or set(dynamic_entries(built, "NEEDED")) <= SYSTEM_LIBRARIES


def test_names_from_a_newer_sparsegate_are_not_supported() -> None:
    name = make_variant().name
    assert library.supports(name, CPU)
    changes = {
        "GatedMLP.1": "GatedMLP.2",
        "silu": "swiglu",
        "predictor": "topk",
        "/float/": "/int2/",
        "tau": "tau+zeta",
        "w_gate+w_up": "w_up+w_gate",
    }
    for old, new in changes.items():
        assert old in name and not library.supports(name.replace(old, new), CPU)
    assert not library.supports(name + "/more", CPU) and not library.supports("", CPU)
    assert not library.supports(name, "TensorrtExecutionProvider")


def test_builds_can_be_forced() -> None:
    handle = library._open(library.library_path())
    best = library.isa()
    assert best in ("avx512vnni", "avx512", "avx2", "portable")
    assert not handle.sparsegate_force_isa(b"neon") and not handle.sparsegate_force_isa(None)
    assert library.isa() == best
    assert handle.sparsegate_force_isa(b"portable") and library.isa() == "portable"
    assert handle.sparsegate_force_isa(b"auto") and library.isa() == best


# inputs, threads and memory

D, N, R = 24, 40, 6


def test_weights_may_be_graph_inputs() -> None:
    variant = make_variant(bias=True)
    x = make_x(variant, (3, D))
    tensors = with_tau(variant, x, make_tensors(variant, D, N, R), 0.4)
    expected = run(open_model(make_model(OP, variant, tensors)), x)
    session = open_model(make_model(OP, variant, tensors, fed=variant.inputs))
    np.testing.assert_array_equal(run(session, x, **tensors), expected)


def test_concurrent_runs_of_one_session_and_of_two() -> None:
    """Eight threads, every one with other tokens and other numbers of tokens, on two models of different width: each
    gets its own result.
    """
    sessions, inputs, expected = [], [], []
    for d, n, weights in ((93, 200, "float"), (64, 733, "int4_g32")):
        variant = make_variant(weights=weights, bias=True, p="float32" if weights == "float" else "int8")
        x = make_x(variant, (40, d))
        tensors = with_tau(variant, x, make_tensors(variant, d, n), 0.3)
        sessions.append(open_model(make_model(OP, variant, tensors)))
        inputs.append(x)
        expected.append(run(sessions[-1], x))
        assert weights != "float" or nmse(expected[-1], reference(variant, x, tensors)) < 1e-12

    def work(seed: int) -> int:
        rng = random.Random(seed)
        wrong = 0
        for _ in range(60):
            which, first = rng.randrange(2), rng.randrange(39)
            last = first + rng.randint(1, 40 - first)
            wrong += not np.array_equal(run(sessions[which], inputs[which][first:last]), expected[which][first:last])
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_runs_keep_no_memory() -> None:
    class Mallinfo(ctypes.Structure):
        names = (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
        _fields_ = [(name, ctypes.c_size_t) for name in names]

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs mallinfo2")
    libc.mallinfo2.restype = Mallinfo
    variant = make_variant()
    x = make_x(variant, (64, D))
    tensors = with_tau(variant, x, make_tensors(variant, D, N, R), 0.4)
    session = open_model(make_model(OP, variant, tensors))

    def in_use() -> int:
        info = libc.mallinfo2()
        return info.uordblks + info.hblkhd

    for tokens in (64, 1, 7):
        run(session, x[:tokens])
    before = in_use()
    for i in range(600):
        run(session, x[: 1 + i % 64])
    assert in_use() - before < 256 << 10  # one leaked arena of the largest call alone would be more, 600 times


def test_two_sessions_share_one_domain() -> None:
    variant = make_variant()
    x = make_x(variant, (2, D))
    tensors = with_tau(variant, x, make_tensors(variant, D, N, R), 0.4)
    model = make_model(OP, variant, tensors)
    first = open_model(model)
    y = run(first, x)
    del first
    np.testing.assert_array_equal(run(open_model(model), x), y)

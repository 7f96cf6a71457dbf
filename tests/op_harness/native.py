"""The library's CPU kernels without ONNX Runtime: cases as a file, builds of the driver with sanitizers and for other
processors.

`native/driver.cc` reads what `write_cases` writes and runs it against a stand-in for ORT (`native/fake_ort.h`).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from onnx import helper

from . import CASES, cases_of
from .case import Case
from .testing import bound_of, draw

HERE = Path(__file__).parent / "native"
CSRC = Path(__file__).parents[2] / "runtime_onnx" / "csrc"


def chosen(tokens: Sequence[int], every: int = 1) -> list[tuple[str, Case]]:
    """(Stem, case) of the sampled cases with one of these numbers of tokens, every so many of them, whatever build they
    name.
    """
    found = [(stem, case) for stem in CASES for case in cases_of(stem).SAMPLED if case.tokens in tokens]
    return found[::every]


def write_cases(path: Path, cases: Iterable[tuple[str, Case]]) -> int:
    """Writes cases with what is expected of them, as native/driver.cc reads them; returns their number."""
    number = 0
    with path.open("wb") as file:

        def put(*lines: object) -> None:
            file.writelines(f"{line}\n".encode() for line in lines)

        for stem, case in cases:
            module, variant = cases_of(stem), case.variant
            x, tensors, _ = draw(stem, case)
            attributes = variant.attributes()
            put(case.name, module.OP.NAME, bound_of(module.OP, variant), len(attributes))
            for key, value in attributes.items():
                put(key, value)
            put(1 + len(variant.inputs))
            for role, value in {"x": x, **{role: tensors[role] for role in variant.inputs}}.items():
                put(role, " ".join(map(str, (helper.np_dtype_to_tensor_dtype(value.dtype), *value.shape))))
                file.write(np.ascontiguousarray(value).tobytes())
            expected = np.ascontiguousarray(module.expected(variant, x, tensors), np.float64)
            put(expected.size)
            file.write(expected.tobytes())
            put("")
            number += 1
    return number


def sources() -> tuple[list[Path], list[Path]]:
    """(Sources of the library, sources that are compiled per instruction set), as csrc/CMakeLists.txt lists them."""
    text = (CSRC / "CMakeLists.txt").read_text()
    once = re.search(r"add_library\(sparsegate_onnx SHARED ([^)]*)\)", text)
    rows = re.search(r"set\(SPARSEGATE_ROW_SOURCES ([^)]*)\)", text)
    assert once and rows
    return [CSRC / name for name in once[1].split()], [CSRC / name for name in rows[1].split()]


def build_with_sanitizer(folder: Path, sanitizer: str, compiler: str = "c++") -> Path:
    """Builds the CPU library with -fsanitize=address,undefined ("address") or thread ("thread") through its CMake
    option, and the driver beside it.

    Returns the driver.
    """
    configure = [
        "cmake",
        "-S",
        CSRC,
        "-B",
        folder,
        "-DSPARSEGATE_CUDA=OFF",
        f"-DSPARSEGATE_SANITIZE={sanitizer}",
        "-DCMAKE_BUILD_TYPE=Release",
    ]
    subprocess.run([*map(str, configure)], check=True, capture_output=True, text=True)
    subprocess.run(["cmake", "--build", str(folder), "--parallel", "2"], check=True, capture_output=True, text=True)
    flags = {"address": "address,undefined", "thread": "thread"}[sanitizer]
    driver = folder / "driver"
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-g",
        f"-fsanitize={flags}",
        "-fno-sanitize-recover=all",
        "-Wall",
        "-Wextra",
        f"-I{CSRC}",
    ]
    command += [
        str(HERE / "driver.cc"),
        f"-L{folder}",
        "-lsparsegate_onnx",
        f"-Wl,-rpath,{folder}",
        "-pthread",
        "-o",
        str(driver),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return driver


def build_for_arm(folder: Path, zig: Sequence[str]) -> Path:
    """Builds the driver and the library's CPU sources as one static aarch64 program with this zig command;
    returns it.
    """
    once, rows = sources()
    driver = folder / "driver"
    flags = [
        "-target",
        "aarch64-linux-musl",
        "-static",
        "-std=gnu++17",
        "-O3",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    flags += ["-DSPARSEGATE_ISA=portable", '-DSPARSEGATE_VERSION="0"', f"-I{CSRC}"]
    environment = {
        **os.environ,
        "ZIG_GLOBAL_CACHE_DIR": str(folder / "cache"),
        "ZIG_LOCAL_CACHE_DIR": str(folder / "cache"),
    }
    command = [*zig, "c++", *flags, *map(str, (HERE / "driver.cc", *once, *rows)), "-o", str(driver)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if built.returncode:
        raise RuntimeError(f"The sources must compile for aarch64, got: {built.stderr[-4000:]}")
    return driver


def vector_instructions(program: Path) -> set[str]:
    """Those of `wanted` NEON operations on 32-bit floats and 8-bit products that an aarch64 program holds, by their
    encodings (Arm ARM, C7).
    """
    words = np.frombuffer(program.read_bytes()[: program.stat().st_size // 4 * 4], "<u4")
    wanted = {
        "fmla v.4s": (0xFFE0FC00, 0x4E20CC00),
        "fmla v.4s by element": (0xFFC0F400, 0x4F801000),
        "fcvtns v.4s": (0xFFFFFC00, 0x4E21A800),
        "fcvtl v.4s": (0xFFFFFC00, 0x0E217800),
    }
    return {name for name, (mask, value) in wanted.items() if ((words & np.uint32(mask)) == np.uint32(value)).any()}


def run_driver(command: Sequence[str], timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """Runs a driver; sanitizers end it with exit status 99."""
    environment = {
        **os.environ,
        **{f"{name}_OPTIONS": "exitcode=99:halt_on_error=1" for name in ("ASAN", "UBSAN", "TSAN")},
    }
    return subprocess.run([*command], capture_output=True, text=True, timeout=timeout, check=False, env=environment)

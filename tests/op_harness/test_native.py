"""The CPU kernels under sanitizers, and on aarch64: slow, since each builds the library."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import native
from .case import ISAS
from .sessions import has_isa

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux"),
    pytest.mark.timeout(3000),
]

FOUND = 99
"""Exit status of a driver whose sanitizer found something."""
TOKENS = {"address": (1, 2, 3, 5, 7, 12, 130), "thread": (1, 3, 12)}
PLANTS = {
    "address": {"short": "heap-buffer-overflow", "overflow": "signed integer overflow"},
    "thread": {"race": "data race"},
}


@pytest.fixture(scope="module", params=["address", "thread"])
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(Sanitizer, driver, cases)."""
    folder = tmp_path_factory.mktemp(request.param)
    if not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("needs cmake and a C++ compiler")
    empty = folder / "empty.cc"
    empty.write_text("int main() { return 0; }")
    flag = f"-fsanitize={request.param}"
    if subprocess.run(
        ["c++", flag, str(empty), "-o", str(folder / "empty")], capture_output=True, check=False
    ).returncode:
        pytest.skip(f"the C++ compiler has no {flag}")
    cases = folder / "cases"
    assert native.write_cases(cases, native.chosen(TOKENS[request.param])) > 30
    return request.param, native.build_with_sanitizer(folder / "build", request.param), cases


@pytest.mark.parametrize("isa", ISAS)
def test_sanitizers_find_nothing(sanitized: tuple[str, Path, Path], isa: str) -> None:
    """Every case by itself against its bound, then from four threads at once, with the same bits."""
    _, driver, cases = sanitized
    if not has_isa(isa):
        pytest.skip(f"this CPU or library has no {isa}")
    result = native.run_driver([str(driver), str(cases), "--isa", isa, "--runs", "1"], timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    assert result.stdout.startswith(f"{isa}: ") and " 0 above their bound, 0 concurrent runs" in result.stdout


def test_sanitizers_find_planted_mistakes(sanitized: tuple[str, Path, Path]) -> None:
    """A row that is missing from memory, one y for two runs, an int that overflows."""
    sanitizer, driver, cases = sanitized
    for plant, words in PLANTS[sanitizer].items():
        result = native.run_driver(
            [str(driver), str(cases), "--runs", "1", "--isa", "portable", "--plant", plant], timeout=900
        )
        assert result.returncode == FOUND and words in result.stderr, (plant, result.returncode, result.stderr[-3000:])


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver with the library's sources, cross-compiled."""
    if not importlib.util.find_spec("ziglang"):
        pytest.skip("needs the package ziglang (100 MB): pip install ziglang")
    return native.build_for_arm(tmp_path_factory.mktemp("arm"), [sys.executable, "-m", "ziglang"])


def test_sources_compile_for_arm_to_vector_instructions(arm: Path) -> None:
    assert arm.read_bytes()[:20] == b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xb7\x00"  # an aarch64 program
    assert native.vector_instructions(arm) >= {"fmla v.4s", "fcvtns v.4s", "fcvtl v.4s"}
    assert native.vector_instructions(Path(native.__file__)) == set()


def test_arm_program_meets_the_bounds(arm: Path, tmp_path: Path) -> None:
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if not emulator:
        pytest.skip("needs qemu-aarch64 (package qemu-user-static)")
    assert native.write_cases(tmp_path / "cases", native.chosen((1, 3, 5, 12, 130))) > 40
    result = native.run_driver([emulator, str(arm), str(tmp_path / "cases"), "--runs", "1"], timeout=1500)
    assert result.returncode == 0 and result.stdout.startswith("portable: "), (
        result.stdout[-3000:] + result.stderr[-3000:]
    )

"""doctor: what it shows of an installation, and the command for everything that is missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnxruntime
import pytest
from small_recipe import Done, call_cli

import sparsegate.runtime_onnx as runtime
from sparsegate.converter.pipeline import doctor as diagnosis


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the command line in this process."""
    return partial(call_cli, capsys)


def test_doctor(call: Callable[..., Done]) -> None:
    done = call("doctor")
    assert (done.status, done.err) == (0, "") and done.out.splitlines()[-1] == "nothing is missing"
    for name in (
        "python",
        "torch",
        "onnxruntime",
        "execution providers",
        "cpu features",
        "native library",
        "cuda in torch",
    ):
        assert f"\n{name} " in done.out, name
    found = json.loads(call("doctor", "--json").out)
    assert found["remedies"] == [] and str(runtime.library_path()) in found["facts"]["native library"]


@pytest.mark.parametrize(
    "missing, added, remedy",
    [
        ("onnxruntime", "", 'pip install "onnxruntime>=1.23"'),
        ("onnxruntime-genai", "", 'pip install "onnxruntime-genai>=0.18,<0.19"'),
        ("torch", "", "pip install torch"),
        ("onnx-ir", "", "pip install onnx-ir"),
        ("", "onnxruntime-gpu", "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"),
    ],
)
def test_doctor_names_the_command_that_mends(
    missing: str, added: str, remedy: str, call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {name: version for name, version in diagnosis.installed_versions().items() if name != missing} | (
        {added: "1.30"} if added else {}
    )
    monkeypatch.setattr(diagnosis, "installed_versions", lambda: versions)
    done = call("doctor")
    lines = [line for line in done.out.splitlines() if line.startswith("missing: ")]
    assert done.status == 1 and len(lines) == 1 and lines[0].startswith(f"missing: {remedy}")


def test_doctor_says_how_to_build_the_cuda_kernels(call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ONNX Runtime has a CUDA provider and the library has no kernels for it, and only there."""
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    for built, lines in ((False, 1), (True, 0)):
        monkeypatch.setattr(diagnosis.library, "has_cuda", lambda built=built: built)
        assert call("doctor").out.count("-C cmake.define.SPARSEGATE_CUDA=ON") == lines


def test_doctor_finds_packages_that_do_not_import_and_a_missing_library(
    call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = call("doctor")
    assert (
        done.status == 1
        and "missing: pip install --force-reinstall --no-deps onnxruntime" in done.out
        and "onnxruntime import" in done.out
    )

    def none() -> Path:
        raise ValueError("the library must lie in the package, got none")

    monkeypatch.undo()
    monkeypatch.setattr(diagnosis.library, "library_path", none)
    done = call("doctor")
    assert (
        done.status == 1
        and "missing: pip install --force-reinstall --no-deps sparsegate" in done.out
        and "got none" in done.out
    )

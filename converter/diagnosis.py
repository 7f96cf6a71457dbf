"""doctor: the state of an installation and the exact commands that mend it."""

from __future__ import annotations

import platform
import sys

from pydantic import BaseModel

from ..runtime_onnx import library
from .artifact import VERSION
from .manifest import installed_versions

_CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16")


class Diagnosis(BaseModel):
    """`facts` in the order to print; `remedies` are commands, one for each thing that is missing."""

    facts: dict[str, str]
    remedies: list[str]


def diagnose() -> Diagnosis:
    """Look at versions, execution providers, the native library, CPU features and the GPU as torch sees it."""
    versions = installed_versions()
    facts = {"sparsegate": VERSION, "python": sys.version.split()[0], "platform": platform.platform(), **versions}
    remedies = []
    facts["cpu features"] = " ".join(_cpu_features()) or "unknown on this platform"
    if {"onnxruntime", "onnxruntime-gpu"} <= set(versions):
        remedies.append("pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu   # the two overwrite each other")
    if not {"onnxruntime", "onnxruntime-gpu"} & set(versions):
        remedies.append('pip install "sparsegate[cpu]"   # onnxruntime; [gpu] for CUDA')
    else:
        import onnxruntime

        facts["execution providers"] = ", ".join(onnxruntime.get_available_providers())
    if not {"onnxruntime-genai", "onnxruntime-genai-cuda"} & set(versions):
        remedies.append("pip install onnxruntime-genai   # onnxruntime-genai-cuda for CUDA")
    try:
        facts["native library"] = f"{library.library_path()} ({library.version()}, {library.isa()})"
    except (ValueError, OSError) as error:
        facts["native library"] = f"missing: {error}"
        remedies.append("pip install --force-reinstall --no-deps sparsegate   # the native library; models run standard ONNX ops without it")
    import torch

    facts["cuda in torch"] = f"{torch.version.cuda}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no GPU"
    return Diagnosis(facts=facts, remedies=remedies)


def _cpu_features() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line.split() for line in file if line.startswith("flags")), [])
    except OSError:
        return []
    return [name for name in _CPU_FEATURES if name in flags]

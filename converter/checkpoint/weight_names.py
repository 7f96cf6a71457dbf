"""Weights under other names than those of a causal language model as transformers saves it: what they are, and what
mends it.
"""

from __future__ import annotations

from collections.abc import Collection

from ...runtime_onnx.errors import InputError
from ..arch import Arch

WRAPPERS = {
    "_orig_mod.": ("torch.compile", "model._orig_mod.save_pretrained(DIR)"),
    "module.": ("DataParallel or DistributedDataParallel", "model.module.save_pretrained(DIR)"),
}
"""What a wrapper puts before every name -> the wrapper, and what saves the model inside."""


def check_names(arch: Arch, names: Collection[str]) -> None:
    """Raise InputError for the weights of a wrapped model, and for those of a model without its head, which have names
    of their own.
    """
    for prefix, (wrapper, remedy) in WRAPPERS.items():
        if wrapped := min((name for name in names if name.startswith(prefix)), default=None):
            raise InputError(
                f"Weights must be named as in {arch.embedding}, got {wrapped}, saved from inside {wrapper}. Save "
                f"again: {remedy}."
            )
    bare = arch.embedding.partition(".")[2]
    if bare in names and arch.embedding not in names:
        raise InputError(
            f"The safetensors must hold {arch.embedding}, got {bare}: a model without the head of a language model. "
            "Save the whole one: AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(DIR)."
        )

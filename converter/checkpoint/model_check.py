"""Whether safetensors hold a model: every tensor that its class names, of a float dtype and of its shape. Headers tell,
so nothing is read or allocated.

`inspect`, `convert` and every other reader of weights ask this one check: what transformers does not find it makes up,
at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...runtime_onnx.errors import InputError
from ..arch import Arch
from .tensor_files import FLOATS, first_line

Stored = Mapping[str, tuple[tuple[int, ...], str]]
"""Names in safetensors -> shape and dtype, as safetensors names it."""


def check_model(arch: Arch, config: Any, stored: Stored) -> None:
    """Compare the tensors in a model's files with its configuration.

    Raises InputError naming the first tensor, dtype or shape that is wrong, and for a configuration that transformers
    cannot build.
    """
    for layer in range(arch.size(config, "layers")):  # a count beyond the files ends at the first layer that they lack
        for weight in arch.weights:
            name = arch.block_prefix(layer) + weight.name
            if name in stored or not weight.optional:
                _check_tensor(name, arch.shape(config, weight), stored)
    _check_tensor(arch.embedding, (arch.size(config, "vocab"), arch.size(config, "hidden")), stored)
    check_parameters(config, stored)


def check_parameters(config: Any, stored: Stored) -> None:
    """The part of `check_model` that needs no architecture file: every parameter of transformers' class. Raises
    InputError as it does.
    """
    model = meta_model(config)
    needed = {name for name, _ in model.named_parameters()}  # of tied ones the first name
    for name, tensor in model.state_dict().items():
        if name in needed or (name in stored and tensor.is_floating_point()):
            _check_tensor(name, tuple(tensor.shape), stored)


def meta_model(config: Any) -> Any:
    """The transformers model of a configuration with everything on the meta device. Raises InputError where
    transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # modelling classes raise what they like on impossible sizes
        raise InputError(
            f"config.json must describe a model that transformers builds, got: {first_line(error)}. Mend the file."
        ) from None


def _check_tensor(name: str, expected: tuple[int, ...], stored: Stored) -> None:
    if name not in stored:
        raise InputError(
            f"The safetensors must hold {name} {list(expected)}, got no such tensor. Fetch the weights again."
        )
    shape, dtype = stored[name]
    if dtype not in FLOATS:
        raise InputError(f"{name} must be a float tensor, got {dtype}. Convert the unquantised model.")
    if tuple(shape) != expected:
        raise InputError(
            f"{name} must have shape {list(expected)} by config.json, got {list(shape)}. Config and weights do not "
            "belong together; fetch both again."
        )

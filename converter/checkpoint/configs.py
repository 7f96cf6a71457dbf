"""Configuration classes of checkpoints whose activation was swapped: `Sparsegate<Base>Config`, made from
transformers' own.

The model type is `sparsegate_<base>`, which stock transformers does not know, so that it stops instead of computing
with the base's activation. Nothing here is registered by importing: `register_configs` does that.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ...runtime_onnx.errors import InputError
from ..arch import PREFIX, Arch, supported
from .sparsity import CLASS, KEY, read_key


def register_configs() -> None:
    """Make AutoConfig, and with it AutoTokenizer, know every `sparsegate_<base>`."""
    from transformers import AutoConfig

    for base in known_bases():
        AutoConfig.register(PREFIX + base, config_class(base), exist_ok=True)


def known_bases() -> list[str]:
    """The model types with an architecture file that the installed transformers has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return [base for base in supported() if base in CONFIG_MAPPING]


@cache
def config_class(base: str) -> type[Any]:
    """The configuration class of `sparsegate_<base>`: the base's, with the checkpoint's `sparsity` key."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    stock = CONFIG_MAPPING[base]
    text = f"Configuration of a {base} model whose feed-forward activation was swapped."
    attributes = {"__doc__": text, "__module__": __name__, "model_type": PREFIX + base, "sparsity": None}
    return type(CLASS + stock.__name__, (stock,), attributes)


def build_config(model_type: str, values: dict[str, Any]) -> Any:
    """The transformers configuration of a model type, stock or `sparsegate_<base>`, from the other values of its
    config.json. Raises whatever transformers does for values that it refuses.
    """
    from transformers import AutoConfig

    for base in known_bases():
        if model_type == PREFIX + base:
            return config_class(base)(**values)
    return AutoConfig.for_model(model_type, **values)


def check_swaps(arch: Arch, raw: dict[str, Any], layers: int) -> None:
    """Compare the swapped activations that the `sparsity` key of a config.json names with a model of `layers` layers.
    Raises InputError for a layer that there is not and for drelu in a plain network.
    """
    for site, activation in read_key(raw.get(KEY)).swapped().items():
        if site.layer >= layers:
            raise InputError(
                f"{site.key} must be a site of a model of {layers} layers, got another layer. Fetch the checkpoint "
                "again."
            )
        arch.check_activation(activation)


def __getattr__(name: str) -> Any:
    """The classes by name, as in `configs.SparsegateLlamaConfig`."""
    if not name.startswith(CLASS):  # importing asks for __path__, which is to stay quick
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for base in known_bases():
        if config_class(base).__name__ == name:
            return config_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

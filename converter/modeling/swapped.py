"""Model classes for checkpoints whose activation was swapped: `Sparsegate<Base>ForCausalLM`, made from transformers'
own.

`register` makes AutoConfig and AutoModelForCausalLM know them; whatever loads such a model calls it. Importing alone
changes nothing.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import Any

from ..arch import load_arch
from ..checkpoint.configs import config_class, known_bases, register_configs
from ..checkpoint.sparsity import CLASS, read_key
from .blocks import swap


def register() -> None:
    """Make transformers' auto classes know checkpoints with swapped activations: AutoConfig and AutoModelForCausalLM
    then load every `sparsegate_<base>`. A second call changes nothing.
    """
    from transformers import AutoModelForCausalLM

    register_configs()
    for base in known_bases():
        AutoModelForCausalLM.register(config_class(base), model_class(base), exist_ok=True)


@cache
def model_class(base: str) -> type[Any]:
    """The causal language model of `sparsegate_<base>`: the base's, every site that the `sparsity` key names swapped
    (`blocks.swap`).
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[base]]
    arch = load_arch(base)
    field = arch.ffn.activation.config

    def begin(self: Any, config: Any, *arguments: Any, **keywords: Any) -> None:
        swapped = read_key(config.sparsity).swapped()
        with _base_activation(config, field):
            stock.__init__(self, config, *arguments, **keywords)
        for site, activation in swapped.items():
            swap(self.get_submodule(arch.ffn_module(site.layer)), arch, activation)

    text = f"{stock.__name__} with swapped feed-forward activations."
    return type(
        CLASS + stock.__name__,
        (stock,),
        {"__doc__": text, "__module__": __name__, "config_class": config_class(base), "__init__": begin},
    )


@contextmanager
def _base_activation(config: Any, field: str) -> Any:
    """The configuration with the base model's activation while stock modules are built from it."""
    before = getattr(config, field)
    try:
        setattr(config, field, config.sparsity["base_activation"])
        yield
    finally:
        setattr(config, field, before)


def __getattr__(name: str) -> Any:
    """The classes by name, as in `swapped.SparsegateLlamaForCausalLM`."""
    if not name.startswith(CLASS):  # importing asks for __path__, which is to stay quick
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for base in known_bases():
        for made in (config_class(base), model_class(base)):
            if made.__name__ == name:
                return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Classes for checkpoints whose activation was swapped: `Sparsegate<Base>Config` and `Sparsegate<Base>ForCausalLM`,
made from transformers' own.

The model type is `sparsegate_<base>`, which stock transformers does not know, so that it stops instead of computing
with the base's activation. Importing sparsegate.converter makes AutoConfig and AutoModelForCausalLM know it (`watch`),
without importing transformers for that.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import contextmanager
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"
"""It imports _AUTO; while it is itself being imported, configurations that need it cannot be."""


def watch() -> None:
    """Register the classes as soon as transformers' auto classes are imported, or now when they are."""
    if _AUTO in sys.modules and not _half_imported(_MODELS):
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register() -> None:
    """Make AutoConfig know every `sparsegate_<base>`; AutoModelForCausalLM learns a type when its first configuration
    is made.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from ..arch import PREFIX, supported

    for base in supported():
        if base in CONFIG_MAPPING and PREFIX + base not in CONFIG_MAPPING:
            CONFIG_MAPPING.register(PREFIX + base, config_class(base))


def _half_imported(name: str) -> bool:
    """Whether a module is just being imported."""
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


class _Finder(MetaPathFinder):
    """Waits for transformers' auto classes, which the other finders load, to register after them."""

    asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (_AUTO, _MODELS) or self.asking:
            return None
        self.asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """A module's own loader, and `register` after it; the finder then has nothing to wait for."""

    def __init__(self, own: Loader, finder: _Finder) -> None:
        self.own, self.finder = own, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        if module.__name__ == _AUTO and _half_imported(_MODELS):
            return  # it comes through here when it is whole
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        register()


@cache
def config_class(base: str) -> type[Any]:
    """The configuration class of `sparsegate_<base>`: the base's, with the checkpoint's `sparsity` key."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from ..arch import PREFIX
    from ..checkpoint.sparsity import CLASS

    stock = CONFIG_MAPPING[base]

    def finish(self: Any, **values: Any) -> None:
        stock.__post_init__(self, **values)
        _register_model(base)

    text = f"Configuration of a {base} model whose feed-forward activation was swapped."
    return type(
        CLASS + stock.__name__,
        (stock,),
        {
            "__doc__": text,
            "__module__": __name__,
            "model_type": PREFIX + base,
            "sparsity": None,
            "__post_init__": finish,
        },
    )


@cache
def model_class(base: str) -> type[Any]:
    """The causal language model of `sparsegate_<base>`: the base's, every site that the `sparsity` key names swapped
    (`blocks.swap`).
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from ..arch import load_arch
    from ..checkpoint.sparsity import CLASS, read_key
    from .blocks import swap

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


@cache
def _register_model(base: str) -> None:
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    AutoModelForCausalLM.register(config_class(base), model_class(base))


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
    if not name.startswith("Sparsegate"):  # importing asks for __path__, which is to stay quick
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ..arch import supported

    for base in supported():
        for made in (config_class(base), model_class(base)):
            if made.__name__ == name:
                return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""A source's model without its weights."""

from __future__ import annotations

import re
from typing import Any

import torch

from ..checkpoint.model_check import meta_model
from ..checkpoint.source import Source
from .swapped import register


def empty_model(source: Source) -> Any:
    """The transformers model of `source` with every parameter on the meta device and every buffer real, in evaluation
    mode.

    Its parameters are those that `open_source` found in the files.
    """
    register()
    model = meta_model(source.config)
    for module in model.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if names:
            with torch.no_grad():
                model._init_weights(module)
    return model.eval()


def unused_tensors(source: Source) -> list[str]:
    """Names in the files of a model that its class does not have, so that nothing computes with them, in order; rotary
    tables, which every class makes itself, are left out.
    """
    model = empty_model(source)
    known = set(model.state_dict())
    ignored = [
        re.compile(pattern)
        for pattern in (*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$")
    ]
    return [
        name
        for name in sorted(source.tensors)
        if name not in known and not any(pattern.search(name) for pattern in ignored)
    ]
